"""What Prometheus reads at `/metrics`.

Labels come from small fixed sets (routes, statuses, models that may be used), so that nothing grows without bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from exl_cli.server.state import ServerState

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The counters of one server, in its own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"exl_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"exl_{name}_seconds", text, ["model"], registry=registry, buckets=buckets)

        self.requests = counter("http_requests", "HTTP requests.", "route", "status")
        self.generations = counter("generations", "Finished generations, by finish reason.", "model", "finish_reason")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens, including reused ones.", "model")
        self.reused_tokens = counter("reused_tokens", "Prompt tokens reused from the KV cache.", "model")
        self.new_tokens = counter("new_tokens", "Generated tokens.", "model")
        self.drafted_tokens = counter("drafted_tokens", "Draft tokens proposed by speculation.", "model")
        self.accepted_tokens = counter("accepted_tokens", "Draft tokens accepted.", "model")
        self.first_token = histogram(
            "time_to_first_token", "Time from submission to the first token, including time in the queue.", _FIRST_TOKEN
        )
        self.inter_token = histogram("inter_token_latency", "Time between two tokens of a response.", _INTER_TOKEN)


class StateCollector:
    """What is read when Prometheus asks: requests under way, pages, GPU memory."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """The gauges."""
        state, models = self._state, self._state.pool.loaded
        running = sum(model.running for model in models)
        yield GaugeMetricFamily("exl_ready", "1 while /health returns 200.", state.phase == "ok")
        yield GaugeMetricFamily("exl_requests_running", "Running generations.", running)
        yield GaugeMetricFamily("exl_requests_waiting", "Queued generations.", max(0, state.accepted - running))
        loaded = GaugeMetricFamily("exl_model_loaded", "1 if the model is in memory.", labels=["model"])
        in_use = GaugeMetricFamily("exl_pages_in_use", "KV cache pages in use.", labels=["model"])
        pages = GaugeMetricFamily("exl_pages", "KV cache pages.", labels=["model"])
        memory = GaugeMetricFamily("exl_gpu_memory_bytes", "GPU memory reserved by this process.", labels=["device"])
        devices: dict[str, int] = {}
        for model in models:
            loaded.add_metric([model.name], 1)
            if (counts := model.engine.pages()) is not None:
                in_use.add_metric([model.name], counts[0])
                pages.add_metric([model.name], counts[1])
            with contextlib.suppress(Exception):  # the device may have failed
                devices |= {gpu.device: gpu.current_bytes for gpu in model.engine.memory()}
        for device, size in devices.items():
            memory.add_metric([device], size)
        yield from (loaded, in_use, pages, memory)
