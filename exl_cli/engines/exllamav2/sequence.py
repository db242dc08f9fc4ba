"""One request on its way through the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from exl_cli.engines.base import Request, TokenLogprobs
from exl_cli.engines.exllamav2.block_manager import Allocation
from exl_cli.engines.exllamav2.draft_length import SpeculationStatistics
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
        started: when it was added.
        allocation: its pages, from admission to its end.
        num_to_prefill: tokens that are computed before decoding goes on with the last of them: the prompt, and all so
            far where they are computed again.
        long_after, long: see `ModelRunner` and `ScheduledTokens`.
        num_computed_tokens: its tokens whose keys and values are in the cache, or on their way there.
        outputs: what it asks of its new tokens besides; None for nothing.
        prompt_logprobs: of its prompt's tokens so far, where they are asked for.
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
    started: float
    allocation: Allocation | None = None
    num_computed_tokens: int = 0
    num_to_prefill: int = 0
    long_after: int | None = None
    long: bool = False
    outputs: OutputTokens | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    answering: bool = False
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
    def must_be_long(self) -> bool:
        """Whether its tokens so far are too many for keys and values of a short sequence."""
        return self.long_after is not None and len(self.ids) > self.long_after

    @property
    def max_draft_tokens(self) -> int:
        """The most draft tokens that a pass can use: the last new token is never computed, and a short one stays so."""
        most = self.max_new_tokens_left - 1
        return most if self.long_after is None or self.long else min(most, self.long_after - len(self.ids))

    @property
    def num_prompt_tokens_left(self) -> int:
        """Tokens to prefill; the last one is evaluated by the first decode step."""
        return self.num_to_prefill - 1 - self.num_computed_tokens
