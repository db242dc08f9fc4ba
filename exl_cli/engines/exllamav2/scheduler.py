"""Which sequence computes what in which pass: continuous batching over a paged KV cache.

A step collects the pass in flight, chooses tokens for each of its sequences, and submits the next pass before it
returns: so the GPU computes while whoever asked turns the tokens into text. All running sequences are in each pass.

Requests are taken first come, first served, as soon as there is room in a pass and for all the pages that they can come
to need. Prompts are evaluated in chunks between the passes of the others, at most one chunk's tokens a step. One prompt
is evaluated after the other, so that what later ones begin with alike is found in the cache.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exl_cli.engines.base import Request
from exl_cli.engines.driver import Step
from exl_cli.engines.exllamav2.block_manager import Pages
from exl_cli.engines.exllamav2.draft_length import Rate
from exl_cli.engines.exllamav2.forward_pass import ModelRunner, ScheduledTokens
from exl_cli.engines.exllamav2.sequence import Sequence
from exl_cli.engines.exllamav2.speculation import Drafter, Guess, Speculation
from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.errors import EngineError, PromptError

# Prompt tokens evaluated between two passes of the sequences that are generating.
CHUNK = 2048

_NO_GUESS = Guess((), 0, Rate(0.0))

Logits = npt.NDArray[np.float32]


class _Flown(NamedTuple):
    """A sequence's part of a pass."""

    sequence: Sequence
    row: ScheduledTokens
    guess: Guess


class Scheduler:
    """Runs sequences on one model. Not thread-safe: see `batching.Batch`.

    Args:
        forward: the model; used by nobody else. After an exception out of one of its methods, an interruption among
            them, the next call is `synchronize`, and then a `prefill` or `submit` may follow, whatever was under way.
        sampler: makes the sampler of a request.
        drafter: proposes tokens to be verified in one pass; None for one token a pass.
        chunk: prompt tokens evaluated between two passes of those that are generating.
        clock: seconds that pass.
    """

    def __init__(
        self,
        forward: ModelRunner,
        sampler: Callable[[Request], Sampler],
        *,
        drafter: Drafter | None = None,
        chunk: int = CHUNK,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._forward = forward
        self._sampler = sampler
        self._chunk = chunk
        self._clock = clock
        self._pages = Pages(forward.pages, forward.page_size, forward.copy_page)
        self._added: deque[Sequence] = deque()
        self._open: set[Sequence] = set()
        self._waiting: deque[Sequence] = deque()
        self._filling: Sequence | None = None
        self._running: list[Sequence] = []
        self._flight: list[_Flown] = []
        self._whole = True
        self._speculation = (
            None if drafter is None else Speculation(drafter, forward.max_batch, forward.max_tokens, clock)
        )

    @property
    def leased_pages(self) -> int:
        """Pages that sequences hold; 0 when there are none."""
        return self._pages.leased

    def sequence(self, request: Request, limit: int) -> Sequence:
        """What `add` takes; may be called from any thread.

        Args:
            request: what to generate; its stop strings are the consumer's business.
            limit: the most new tokens, at least 1.

        Raises:
            PromptError: it would not fit even if it were alone.
        """
        started = self._clock()
        sequence = Sequence(request, limit, self._sampler(request), [*request.ids], started)
        positions, room = sequence.positions, self._pages.count * self._pages.size
        if positions > room:
            raise PromptError(
                f"prompt and response may come to {positions:,} tokens, the KV cache holds {room:,}",
                "shorten the prompt, lower --max-new-tokens or raise --max-seq-len",
            )
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; may be called from any thread, also during a step."""
        self._added.append(sequence)

    def step(self) -> None:
        """Do the next piece of work for all sequences; what comes of it is in their outboxes.

        A pass that fails ends all sequences that are being computed: each has the error. Nothing is raised.
        """
        self._begin()
        try:
            self._collect()
            self._submit(busy=self._fill())
        except Exception as error:  # whatever it is, it belongs to those whose pass it was
            self._drop(error)
        self._whole = True

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence and free its pages at once; nothing happens where it has ended.

        What a pass in flight still writes into its pages comes before anything that others will write there.
        """
        self._begin()
        if sequence in self._open:
            self._end(sequence)
        self._whole = True

    def close(self, reason: str = "the model is closed") -> None:
        """End everything and forget what the cache holds; the next request finds it empty.

        Args:
            reason: what the requests that are not finished are told.
        """
        self._begin()
        error = EngineError(reason, "start the generation again")
        while self._waiting:
            self._end(self._waiting[0], error)
        self._drop(error)
        self._pages.reset()
        if self._speculation is not None:
            self._speculation.reset()
        self._whole = True

    # --- the parts of a step --------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Wait for the pass in flight, and choose tokens for each sequence that is still wanted."""
        if self._flight:
            since = self._clock()
            logits: Logits = self._forward.collect().numpy()
            flight, self._flight = self._flight, []
            if self._speculation is not None:
                self._speculation.collected(since)
            for index, flown in enumerate(flight):
                if not flown.sequence.ended:
                    self._extend(flown, logits[index])
            self._settle_prompt()

    def _extend(self, flown: _Flown, logits: Logits) -> None:
        sequence, row, guess = flown
        ids, stops = sequence.ids, sequence.request.stop_ids
        chosen: list[int] = []
        error: Exception | None = None
        try:
            for place in range(len(row.ids)):
                if place and chosen[-1] != row.ids[place]:
                    break  # these logits follow a proposal that was wrong
                chosen.append(sequence.sampler.sample(logits[place], ids))
                ids.append(chosen[-1])
                if chosen[-1] in stops or not sequence.room:
                    break
        except Exception as found:  # its logits or its settings; the others have theirs
            error = found
        sequence.cached += len(chosen)
        self._pages.settle(sequence.pages, sequence.cached)
        if self._speculation is not None:
            sequence.outbox.append(self._speculation.outcome(sequence, guess, chosen))
        elif chosen:
            sequence.outbox.append(Step(tuple(chosen)))
        if error or chosen[-1] in stops or not sequence.room:
            self._end(sequence, error)

    def _fill(self) -> bool:
        """Evaluate one chunk's tokens of prompts; those that are complete join the running. Whether it is under way."""
        room = self._chunk
        while room > 0 and (sequence := self._filling or self._admit()):
            begin, count = sequence.cached, min(room, sequence.unfilled)
            if count:
                self._pages.grow(sequence.pages, begin + count)
                ids = tuple(sequence.ids[begin : begin + count])
                self._forward.prefill(ScheduledTokens(ids, begin, sequence.pages.table))
                sequence.cached += count
                room -= count
            if count and self._running and (sequence.unfilled or room <= 0 or not self._waiting):
                return True  # `_collect` will have waited for it
            self._forward.synchronize()
            self._settle_prompt()
        return False

    def _admit(self) -> Sequence | None:
        """The next request, if there is room for it."""
        if not self._waiting or len(self._running) >= self._forward.max_batch:
            return None
        sequence = self._waiting[0]
        try:
            sequence.lease = self._pages.lease(sequence.ids, sequence.positions)
        except BaseException:
            self._waiting.popleft()  # what failed was its own, too
            raise
        if sequence.lease is None:
            return None
        self._waiting.popleft()
        self._filling = sequence
        sequence.cached = sequence.lease.reused
        return sequence

    def _settle_prompt(self) -> None:
        """The device has done all that it was asked to: so much of the prompt is in the cache."""
        sequence = self._filling
        if sequence is None:
            return
        self._pages.settle(sequence.pages, sequence.cached)
        if not sequence.unfilled:
            if self._speculation is not None:
                self._speculation.begin(sequence)
            seconds = self._clock() - sequence.started
            sequence.outbox.append(Step(prompt_seconds=seconds, reused_tokens=sequence.pages.reused))
            self._filling = None
            self._running.append(sequence)

    def _submit(self, *, busy: bool) -> None:
        """Start the next pass for all that are running, perhaps while the device is busy with something else."""
        if not self._running:
            return
        guesses: Iterable[Guess] = repeat(_NO_GUESS)
        if self._speculation is not None:
            guesses = self._speculation.guesses(self._running, busy=busy)
        flight = []
        for sequence, guess in zip(self._running, guesses, strict=False):
            lease, start = sequence.pages, sequence.cached
            row = ScheduledTokens((sequence.ids[start], *guess.tokens[: guess.used]), start, lease.table)
            self._pages.grow(lease, start + len(row.ids))
            flight.append(_Flown(sequence, row, guess))
        self._forward.submit([flown.row for flown in flight])
        self._flight = flight

    # --- ends -----------------------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        if sequence is self._filling:
            self._filling = None
        elif sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        if self._speculation is not None:
            self._speculation.end(sequence)
        if sequence.lease is not None:
            self._pages.release(sequence.lease)
        sequence.error = error
        sequence.ended = True
        self._open.discard(sequence)

    def _drop(self, error: Exception) -> None:
        """End all that are being computed, after a pass that failed."""
        self._flight = []
        for sequence in self._open.difference(self._waiting):
            self._end(sequence, error)
        with contextlib.suppress(Exception):  # it has told the error already
            self._forward.synchronize()

    def _begin(self) -> None:
        """Change things from here on, once they are in order: an interruption may have come in the midst of it."""
        if not self._whole:
            self._pages.reset()
            if self._speculation is not None:
                self._speculation.reset()
            self._drop(EngineError("the generation was interrupted", "start it again"))
        self._whole = False
        while self._added:
            sequence = self._added[0]
            if sequence not in self._open and not sequence.ended:
                self._open.add(sequence)
                self._waiting.append(sequence)
            self._added.popleft()
