"""Draft tokens from a smaller model with the same vocabulary; see `speculation`.

The draft model has its own paged KV cache and decodes greedily. Accepted draft tokens stay in its cache. If it skipped
some forward passes, it catches up on the missed tokens in one pass.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from exl_cli.engines.exllamav2.block_manager import Allocation, BlockManager
from exl_cli.engines.exllamav2.draft_length import AcceptanceEstimate, AcceptanceRate, Timing
from exl_cli.engines.exllamav2.forward_pass import ModelRunner, ScheduledTokens
from exl_cli.engines.exllamav2.speculation import ChooseLength, DraftRequest, DraftTokens
from exl_cli.errors import param

# Initial acceptance rate.
_PRIOR = 0.7


@dataclass(eq=False)
class _Draft:
    """The draft model's state of one sequence.

    Attributes:
        ids: the sequence's tokens known to the draft model.
        allocation: pages for them and for draft tokens; if pages run out, fewer tokens are drafted, or none.
        num_computed_tokens: how many of `ids` are in its cache.
        proposed: its last draft tokens; all but the last are in its cache too.
        rate: their acceptance rate.
        most: most positions it may take up.
    """

    ids: list[int]
    allocation: Allocation
    num_computed_tokens: int
    proposed: tuple[int, ...]
    rate: AcceptanceRate
    most: int


class DraftModel:
    """A `speculation.Drafter`.

    Args:
        runner: runs the draft model; not shared.
        vocab_size: size of the tokenizer's vocabulary; padding beyond it is never proposed.
        context_length: the draft model's context, in tokens.
        chunk: tokens per `prefill` call.
        clock: current time in seconds.
    """

    option = param("draft")

    def __init__(
        self,
        runner: ModelRunner,
        vocab_size: int,
        context_length: int,
        *,
        chunk: int = 2048,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._chunk = chunk
        self._clock = clock
        self._blocks = BlockManager(runner.pages, runner.page_size, runner.copy_page)
        # Over all sequences; the prior of a new one.
        self._rate = AcceptanceRate(_PRIOR)
        self._pass = Timing()

    @property
    def num_allocated_pages(self) -> int:
        """Pages held by sequences."""
        return self._blocks.num_allocated

    def begin(self, ids: list[int], positions: int) -> _Draft | None:
        """See `speculation.Drafter.begin`. Prefills the prompt; None if there is no room for it."""
        most = min(positions, self._context_length)
        if len(ids) >= most:
            return None
        own = [*ids]
        allocation = self._blocks.allocate(own, len(own))
        if allocation is None:
            return None
        draft = _Draft(own, allocation, allocation.num_reused_tokens, (), AcceptanceRate(self._rate.value), most)
        try:
            with self._in_order():
                self._fill(draft, len(own) - 1)
                self._runner.synchronize()
        except Exception:
            self._blocks.free(allocation)
            raise
        self._blocks.mark_computed(allocation, draft.num_computed_tokens)
        return draft

    def propose(self, requests: Sequence[DraftRequest], choose: ChooseLength) -> list[DraftTokens]:
        able: list[tuple[_Draft, int]] = []
        for request in requests:
            if request.draft is not None:
                self._tell(request.draft, request.ids)
                room = self._room(request) if len(able) < self._runner.max_batch else 0
                able.append((request.draft, room))
        estimates = [AcceptanceEstimate(draft.rate.value, room) for draft, room in able]
        # Sequences without draft tokens take part in the pass too.
        estimates += [AcceptanceEstimate(0.0, 0)] * (len(requests) - len(able))
        most = choose(estimates, self._pass.seconds)
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
            DraftTokens((), 0, self._rate)
            if request.draft is None
            else DraftTokens(request.draft.proposed, len(request.draft.proposed), request.draft.rate)
            for request in requests
        ]

    def end(self, draft: _Draft | None, ids: list[int]) -> None:
        if draft is not None:
            self._tell(draft, ids)
            self._blocks.free(draft.allocation)

    def reset(self) -> None:
        self._blocks.reset()
        with contextlib.suppress(Exception):
            self._runner.synchronize()

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """Synchronize the device after a failed pass; see `Scheduler`."""
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):  # the same error again
                self._runner.synchronize()
            raise

    def _tell(self, draft: _Draft, ids: list[int]) -> None:
        """Add the sequence's new tokens, and count the draft tokens among them as computed."""
        before = len(draft.ids)
        if len(ids) == before:
            return
        new = ids[before:]
        if draft.proposed:
            right = self._rate.note(draft.proposed, new)
            draft.num_computed_tokens = before + min(right, len(draft.proposed) - 1)
            draft.proposed = ()
        draft.ids += new
        self._blocks.mark_computed(draft.allocation, draft.num_computed_tokens)

    def _fill(self, draft: _Draft, end: int) -> None:
        """Prefill up to token `end`."""
        while draft.num_computed_tokens < end:
            count = min(self._chunk, end - draft.num_computed_tokens)
            self._blocks.grow(draft.allocation, draft.num_computed_tokens + count)
            ids = tuple(draft.ids[draft.num_computed_tokens : draft.num_computed_tokens + count])
            self._runner.prefill(ScheduledTokens(ids, draft.num_computed_tokens, draft.allocation.block_table))
            draft.num_computed_tokens += count

    def _room(self, request: DraftRequest) -> int:
        """How many draft tokens a sequence can get; 0 or less for none. The last is never computed."""
        draft, known = request.draft, len(request.ids)
        room: int = min(request.most, draft.most - known)
        if room > 0 and not self._blocks.grow(draft.allocation, known + room - 1):
            room = draft.allocation.capacity - known + 1
        return room

    def _propose(self, drafts: list[tuple[_Draft, int]]) -> None:
        """Draft the given number of tokens for each sequence, in batched forward passes."""
        start = self._clock()
        widest = self._runner.max_tokens // len(drafts)
        for draft, _ in drafts:
            if len(draft.ids) - draft.num_computed_tokens > max(widest, 1):
                self._fill(draft, len(draft.ids) - 1)
        passes = max(count for _, count in drafts)
        for number in range(passes):
            going = [draft for draft, count in drafts if number < count]
            self._runner.submit([self._row(draft) for draft in going])
            logits = self._runner.collect().numpy()
            for index, draft in enumerate(going):
                last = 0 if number else len(draft.ids) - draft.num_computed_tokens - 1
                draft.proposed += (int(logits[index, last, : self._vocab_size].argmax()),)
        seconds = (self._clock() - start) / passes
        self._pass.note(seconds, seconds)

    def _row(self, draft: _Draft) -> ScheduledTokens:
        """The tokens of the next pass: the last draft token, or at first all of the sequence's uncomputed tokens."""
        if draft.proposed:
            ids, begin = draft.proposed[-1:], len(draft.ids) + len(draft.proposed) - 1
        else:
            ids, begin = tuple(draft.ids[draft.num_computed_tokens :]), draft.num_computed_tokens
        return ScheduledTokens(ids, begin, draft.allocation.block_table)
