"""Speculation with a second, smaller model of the same vocabulary; see `speculation`.

The draft model has a KV cache and pages of its own. It always goes on with the likeliest token, and keeps what was
accepted; where it was left out of some passes it catches up with the tokens that came meanwhile in one of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from exl_cli.engines.exllamav2.block_manager import Lease, Pages
from exl_cli.engines.exllamav2.draft_length import Outlook, Rate, Timing
from exl_cli.engines.exllamav2.forward_pass import ModelRunner, ScheduledTokens
from exl_cli.engines.exllamav2.speculation import Choose, Guess, Wanted

# What to think of a draft model of which nothing is known yet.
_PRIOR = 0.7


@dataclass(eq=False)
class _Draft:
    """A sequence, as the draft model knows it.

    Attributes:
        ids: the sequence's tokens that it has been told.
        lease: the pages for them and for its proposals.
        cached: how many of `ids` its cache holds.
        proposed: what it proposed to follow them; all but the last are in its cache, too.
        rate: how often that was right.
        most: positions that the lease is for.
    """

    ids: list[int]
    lease: Lease
    cached: int
    proposed: tuple[int, ...]
    rate: Rate
    most: int


class DraftModel:
    """A `speculation.Drafter`.

    Args:
        forward: the draft model; used by nobody else.
        vocab_size: tokens that both models' tokenizer knows; what lies beyond is never proposed.
        context_length: the most positions that the draft model is made for.
        chunk: prompt tokens of one call of `prefill`.
        clock: seconds that pass.
    """

    flag = "--draft"

    def __init__(
        self,
        forward: ModelRunner,
        vocab_size: int,
        context_length: int,
        *,
        chunk: int = 2048,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._forward = forward
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._chunk = chunk
        self._clock = clock
        self._pages = Pages(forward.pages, forward.page_size, forward.copy_page)
        # Of all sequences: what a new one is expected to be like.
        self._rate = Rate(_PRIOR)
        self._pass = Timing()

    @property
    def leased_pages(self) -> int:
        """Pages that sequences hold; 0 when there are none."""
        return self._pages.leased

    def begin(self, ids: list[int], positions: int) -> _Draft | None:
        """See `speculation.Drafter.begin`; evaluates the prompt. None where there is no room for it."""
        most = min(positions, self._context_length)
        if len(ids) >= most:
            return None
        own = [*ids]
        lease = self._pages.lease(own, most)
        if lease is None:
            return None
        draft = _Draft(own, lease, lease.reused, (), Rate(self._rate.value), most)
        try:
            with self._in_order():
                self._fill(draft, len(own) - 1)
                self._forward.synchronize()
        except BaseException:
            self._pages.release(lease)
            raise
        self._pages.settle(lease, draft.cached)
        return draft

    def propose(self, wanted: Sequence[Wanted], choose: Choose) -> list[Guess]:
        """See `speculation.Drafter.propose`."""
        able: list[tuple[_Draft, int]] = []
        for one in wanted:
            if one.draft is not None:
                self._tell(one.draft, one.ids)
                room = min(one.most, one.draft.most - len(one.ids))
                able.append((one.draft, room if len(able) < self._forward.max_batch else 0))
        outlooks = [Outlook(draft.rate.value, room) for draft, room in able]
        # Those without proposals are in the pass as well.
        outlooks += [Outlook(0.0, 0)] * (len(wanted) - len(able))
        most = choose(outlooks, self._pass.seconds)
        for draft, room in able:
            draft.proposed = ()
            if not most or room <= 0:
                draft.rate.fade()
        if not most:
            self._pass.fade()
        else:
            with self._in_order():
                self._propose([(draft, min(most, room)) for draft, room in able if room > 0])
        return [
            Guess((), 0, self._rate)
            if one.draft is None
            else Guess(one.draft.proposed, len(one.draft.proposed), one.draft.rate)
            for one in wanted
        ]

    def end(self, draft: _Draft | None, ids: list[int]) -> None:
        """See `speculation.Drafter.end`."""
        if draft is not None:
            self._tell(draft, ids)
            self._pages.release(draft.lease)

    def reset(self) -> None:
        """See `speculation.Drafter.reset`."""
        self._pages.reset()
        with contextlib.suppress(Exception):
            self._forward.synchronize()

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """After a pass that failed, let the next one begin anew; see `Scheduler`."""
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):  # it has told the error already
                self._forward.synchronize()
            raise

    def _tell(self, draft: _Draft, ids: list[int]) -> None:
        """Learn what became of the last proposals."""
        before = len(draft.ids)
        if len(ids) == before:
            return
        new = ids[before:]
        if draft.proposed:
            right = self._rate.note(draft.proposed, new)
            draft.cached = before + min(right, len(draft.proposed) - 1)
            draft.proposed = ()
        draft.ids += new
        self._pages.settle(draft.lease, draft.cached)

    def _fill(self, draft: _Draft, end: int) -> None:
        """Have the first `end` tokens in the cache."""
        while draft.cached < end:
            count = min(self._chunk, end - draft.cached)
            self._pages.grow(draft.lease, draft.cached + count)
            ids = tuple(draft.ids[draft.cached : draft.cached + count])
            self._forward.prefill(ScheduledTokens(ids, draft.cached, draft.lease.table))
            draft.cached += count

    def _propose(self, drafts: list[tuple[_Draft, int]]) -> None:
        """Let each draft propose so many tokens, in passes over all of them."""
        start = self._clock()
        widest = self._forward.max_tokens // len(drafts)
        for draft, _ in drafts:
            if len(draft.ids) - draft.cached > max(widest, 1):
                self._fill(draft, len(draft.ids) - 1)
        passes = max(count for _, count in drafts)
        for number in range(passes):
            going = [draft for draft, count in drafts if number < count]
            self._forward.submit([self._row(draft) for draft in going])
            logits = self._forward.collect().numpy()
            for index, draft in enumerate(going):
                last = 0 if number else len(draft.ids) - draft.cached - 1
                draft.proposed += (int(logits[index, last, : self._vocab_size].argmax()),)
        seconds = (self._clock() - start) / passes
        self._pass.note(seconds, seconds)

    def _row(self, draft: _Draft) -> ScheduledTokens:
        """What it has not computed yet: tokens of the sequence, or else its own last proposal."""
        if draft.proposed:
            ids, begin = draft.proposed[-1:], len(draft.ids) + len(draft.proposed) - 1
        else:
            ids, begin = tuple(draft.ids[draft.cached :]), draft.cached
        self._pages.grow(draft.lease, begin + len(ids))
        return ScheduledTokens(ids, begin, draft.lease.table)
