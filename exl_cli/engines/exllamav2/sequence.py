"""The scheduler's state of one request."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Integers
from dataclasses import dataclass, field
from typing import Any

from exl_cli.engines.base import Request, TokenLogprobs
from exl_cli.engines.exllamav2.block_manager import Allocation
from exl_cli.engines.exllamav2.draft_length import SpeculationStatistics
from exl_cli.engines.exllamav2.forward_pass import Seat
from exl_cli.engines.output_tokens import OutputTokens
from exl_cli.engines.sampling.sampler import Sampler


@dataclass(eq=False)
class Sequence:
    """A request in the scheduler.

    Attributes:
        id: the request's id.
        request: the request.
        max_new_tokens: most new tokens.
        sampler: its sampler.
        ids: prompt and new tokens.
        arrival: sequence number, in order of arrival.
        started: time when it was added, in seconds.
        allocation: its pages, from admission until it ends or is preempted.
        num_to_prefill: tokens to compute before decoding: the prompt, or all tokens when it is recomputed. The last of
            them is left to the first decode step.
        rope_switches, rope_table: see `ModelRunner` and `ScheduledTokens`.
        num_reused_tokens: prompt tokens taken from the prefix cache.
        num_computed_tokens: tokens whose keys and values are in the cache, or will be once submitted work is done.
        outputs: log-probabilities and banned strings; None if it needs neither.
        prompt_logprobs: log-probabilities of its prompt so far, if requested.
        seat: its slot in the device's sampler while it decodes; None if the CPU samples it.
        leave_to_cpu: the device failed to sample a token, so it gets no seat again.
        draft: the drafter's state of it; None without draft tokens.
        statistics: costs and gains of speculation.
        answering: whether its prompt has been computed.
        ended: whether it has ended.
    """

    id: int
    request: Request
    max_new_tokens: int
    sampler: Sampler
    ids: list[int]
    arrival: int
    started: float
    allocation: Allocation | None = None
    num_computed_tokens: int = 0
    num_to_prefill: int = 0
    num_reused_tokens: int = 0
    rope_switches: Integers[int] = ()
    rope_table: int = 0
    outputs: OutputTokens | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    answering: bool = False
    seat: Seat | None = None
    leave_to_cpu: bool = False
    draft: Any = None
    statistics: SpeculationStatistics = field(default_factory=SpeculationStatistics)
    ended: bool = False

    @property
    def blocks(self) -> Allocation:
        """Its allocation, which must exist."""
        if self.allocation is None:
            raise RuntimeError("a sequence without pages is computed")
        return self.allocation

    @property
    def max_tokens(self) -> int:
        """Most positions it can occupy; the last new token is never computed."""
        return len(self.request.ids) + self.max_new_tokens - 1

    @property
    def max_new_tokens_left(self) -> int:
        """Number of new tokens it may still get."""
        return len(self.request.ids) + self.max_new_tokens - len(self.ids)

    @property
    def wanted_rope_table(self) -> int:
        """The RoPE table for its current length."""
        return bisect_left(self.rope_switches, len(self.ids))

    @property
    def max_draft_tokens(self) -> int:
        """Most draft tokens that a pass can use: not the last new token, and none beyond a RoPE switch."""
        most = self.max_new_tokens_left - 1
        if self.rope_table == len(self.rope_switches):
            return most
        return min(most, self.rope_switches[self.rope_table] - len(self.ids))

    @property
    def num_prompt_tokens_left(self) -> int:
        """Tokens to prefill; the last one is evaluated by the first decode step."""
        return self.num_to_prefill - 1 - self.num_computed_tokens
