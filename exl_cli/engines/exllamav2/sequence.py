"""One request on its way through the scheduler."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from exl_cli.engines.base import Request
from exl_cli.engines.driver import Step
from exl_cli.engines.exllamav2.pace import Account
from exl_cli.engines.exllamav2.pages import Lease
from exl_cli.engines.exllamav2.passes import Row
from exl_cli.engines.sampler import Sampler

Logits = npt.NDArray[np.float32]


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
        left: how many of the prompt's last tokens its first pass is to evaluate, at least 1.
        filled: when all before those had been evaluated.
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
    left: int = 1
    filled: float = 0.0
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
        """Prompt tokens to evaluate before the first pass, which evaluates those that are left to it."""
        return len(self.request.ids) - self.left - self.cached

    @property
    def done(self) -> bool:
        """Whether its last token ends it."""
        return not self.room or self.ids[-1] in self.request.stop_ids

    def extend(self, row: Row, logits: Logits) -> tuple[list[int], Exception | None]:
        """Choose the tokens that follow what a pass computed.

        Args:
            row: what that was: this sequence's tokens from `cached` on, to the last one, and then proposals.
            logits: shape (at least the row's tokens, vocabulary); those before its own last token's are not looked at.

        Returns:
            The new tokens, as far as the proposals were right; `ids` and `cached` know of them. And what went wrong
            where the next one should have been chosen: its logits or its settings; other sequences have theirs.
        """
        chosen: list[int] = []
        error: Exception | None = None
        first = len(self.ids) - row.start - 1
        try:
            for place in range(first, len(row.ids)):
                if chosen and chosen[-1] != row.ids[place]:
                    break  # these logits follow a proposal that was wrong
                chosen.append(self.sampler.sample(logits[place], self.ids))
                self.ids.append(chosen[-1])
                if self.done:
                    break
        except Exception as found:
            error = found
        self.cached += first + len(chosen)
        return chosen, error
