"""One request on its way through the scheduler."""

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
    """A request, its tokens and where they are.

    Attributes:
        id: the request's.
        request: what was asked for.
        max_new_tokens: the most new tokens.
        sampler: chooses them.
        ids: the prompt and what followed.
        arrival: its place in the order in which sequences came.
        started: when it was added.
        allocation: its pages, from admission to its end or until it is put back.
        num_to_prefill: tokens that are computed before decoding goes on with the last of them: the prompt, and all so
            far where they are computed again.
        rope_switches, rope_table: see `ModelRunner` and `ScheduledTokens`.
        num_reused_tokens: tokens of its prompt that were never computed for it.
        num_computed_tokens: its tokens whose keys and values are in the cache, or on their way there.
        outputs: what it asks of its new tokens besides; None for nothing.
        prompt_logprobs: of its prompt's tokens so far, where they are asked for.
        seat: its place in the device's sampler while it decodes; None where the CPU samples it.
        leave_to_cpu: whether it is to get no seat: the device could not choose a token.
        draft: the drafter's state for it; None for no draft tokens.
        statistics: what speculation brought it.
        answering: whether its prompt has been computed.
        ended: whether it is over.
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
        """Its allocation, where it must have one."""
        if self.allocation is None:
            raise RuntimeError("a sequence without pages is computed")
        return self.allocation

    @property
    def max_tokens(self) -> int:
        """The most positions that it can take up: the last new token is never computed."""
        return len(self.request.ids) + self.max_new_tokens - 1

    @property
    def max_new_tokens_left(self) -> int:
        """New tokens that it may still get."""
        return len(self.request.ids) + self.max_new_tokens - len(self.ids)

    @property
    def wanted_rope_table(self) -> int:
        """The table that its tokens so far are to be computed with."""
        return bisect_left(self.rope_switches, len(self.ids))

    @property
    def max_draft_tokens(self) -> int:
        """The most draft tokens that a pass can use: the last new token is never computed, and none changes tables."""
        most = self.max_new_tokens_left - 1
        if self.rope_table == len(self.rope_switches):
            return most
        return min(most, self.rope_switches[self.rope_table] - len(self.ids))

    @property
    def num_prompt_tokens_left(self) -> int:
        """Tokens to prefill; the last one is evaluated by the first decode step."""
        return self.num_to_prefill - 1 - self.num_computed_tokens
