"""The scheduler for any number of streams, in one thread or in several.

Whoever pulls a stream that has nothing ready does the next step, and that step serves all. So streams that are iterated
over at the same time are computed in the same passes, and nothing is computed while nobody asks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from exl_cli.engines.base import Request
from exl_cli.engines.driver import Step
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.exllamav2.sequence import Sequence


class Batch:
    """Runs a scheduler for its streams.

    Args:
        scheduler: used by nobody else.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._changed = threading.Condition()
        # The sequence whose stream is doing a step. Not held as a lock: those whose tokens are ready need not wait for
        # it, and where an interruption, or the garbage collector, comes between, it says whose step it was.
        self._stepping: Sequence | None = None
        self._exclusive: set[object] = set()  # those who are, or wait to be
        self._closed: deque[Sequence] = deque()

    def steps(self, request: Request, limit: int) -> Generator[Step, None, None]:
        """What `driver.run` asks for: the passes of one request. Closing it cancels the request.

        Args:
            request: what to generate.
            limit: the most new tokens, at least 1.

        Raises:
            PromptError, UsageError: see `Scheduler.sequence`.
            Exception: whatever a pass that the request was part of raised.
        """
        sequence = self._scheduler.sequence(request, limit)
        try:
            self._scheduler.add(sequence)
            while True:
                ended = sequence.ended  # before the outbox is looked at: the last step is put there before this is set
                if sequence.outbox:
                    yield sequence.outbox.popleft()
                elif not ended:
                    if not self._step(sequence):
                        yield Step()
                elif sequence.error is not None:
                    raise sequence.error
                else:
                    return
        finally:
            self._close(sequence)

    @contextmanager
    def exclusive(self) -> Iterator[Scheduler]:
        """Within it no stream does a step; a pass may still be in flight."""
        me = object()
        with self._changed:
            try:
                self._exclusive.add(me)
                self._changed.wait_for(lambda: self._stepping is None)
                yield self._scheduler
            finally:
                self._exclusive.discard(me)
                self._changed.notify_all()

    def _step(self, sequence: Sequence) -> bool:
        """Do a step, or wait until another stream's is done; whether anything came of it for this sequence."""
        try:
            with self._changed:
                if self._stepping is not None or self._exclusive:
                    self._changed.wait()
                    return bool(sequence.outbox) or sequence.ended
                if sequence.outbox or sequence.ended:
                    return True
                self._stepping = sequence
            self._scheduler.step()
        finally:
            self._stepped(sequence)
        return bool(sequence.outbox) or sequence.ended

    def _stepped(self, sequence: Sequence) -> None:
        """If it was this sequence's step, it is over; cancel what was closed meanwhile."""
        with self._changed:
            if self._stepping is sequence:
                while self._closed:
                    self._scheduler.cancel(self._closed[0])
                    self._closed.popleft()
                self._changed.notify_all()
                self._stepping = None

    def _close(self, sequence: Sequence) -> None:
        """Cancel now; or, where another stream is doing a step, right after it."""
        self._closed.append(sequence)
        with self._changed:
            if self._stepping is None:
                self._stepping = sequence
        # Also where it is still marked because an interruption came at the wrong moment.
        self._stepped(sequence)
