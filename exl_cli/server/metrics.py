"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram


class Metrics:
    """Counters of one server, in a registry of their own. Labels come from fixed sets, so none grows without bound."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = Counter("exl_prompt_tokens", "Prompt tokens.", registry=self.registry)
        self.reused_tokens = Counter(
            "exl_reused_tokens", "Prompt tokens found in the KV cache.", registry=self.registry
        )
        self.new_tokens = Counter("exl_new_tokens", "Tokens generated.", registry=self.registry)
        self.first_token = Histogram(
            "exl_time_to_first_token_seconds", "From acceptance to the first token.", registry=self.registry
        )
