"""One request on its way through the scheduler."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from exl_cli.engines.base import Request
from exl_cli.engines.driver import Step
from exl_cli.engines.exllamav2.block_manager import Lease
from exl_cli.engines.exllamav2.draft_length import Account
from exl_cli.engines.sampling.sampler import Sampler


@dataclass(eq=False)
class Sequence:
    """A request, its tokens and where they are.

    Attributes:
        request: what was asked for.
        limit: the most new tokens.
        sampler: chooses them.
        ids: the prompt and what followed.
        started: when it was made.
        outbox: steps that its consumer has not taken yet.
        lease: its pages, from the moment that it is no longer waiting until its end.
        cached: how many of its tokens need no computing any more.
        draft: what a drafter knows of it, if there is one that can propose something.
        account: what speculation brought it.
        ended: nothing more will come, but an `error` if there is one.
    """

    request: Request
    limit: int
    sampler: Sampler
    ids: list[int]
    started: float
    outbox: deque[Step] = field(default_factory=deque)
    lease: Lease | None = None
    cached: int = 0
    draft: Any = None
    account: Account = field(default_factory=Account)
    ended: bool = False
    error: Exception | None = None

    @property
    def pages(self) -> Lease:
        """Its lease, where it must have one."""
        if self.lease is None:
            raise RuntimeError("a sequence without pages is computed")
        return self.lease

    @property
    def positions(self) -> int:
        """The most that it can come to: the last new token is not computed."""
        return len(self.request.ids) + self.limit - 1

    @property
    def room(self) -> int:
        """How many new tokens it may still have."""
        return len(self.request.ids) + self.limit - len(self.ids)

    @property
    def unfilled(self) -> int:
        """Prompt tokens to evaluate before the first pass, which evaluates the last one."""
        return len(self.request.ids) - 1 - self.cached
