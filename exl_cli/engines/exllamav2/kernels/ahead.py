"""Work that is done ahead of being asked for, by a few threads; whoever asks before they came to it does it himself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Ahead(Generic[Key, Value]):
    """Results by key, each computed once in a process.

    The threads start when there is something to do and end when there is not. They are no daemons, which may crash a
    process whose libraries are being taken down under them: the interpreter waits at its end for what each is at, and
    what is queued then is left undone. Any thread may call any method, an interrupt spoils nothing.

    Args:
        work: computes the result; several threads call it at once, with different keys.
        threads: so many at most, besides those that ask.
    """

    def __init__(self, work: Callable[[Key], Value], threads: int) -> None:
        self._work = work
        self._most = threads
        # All below change under this lock only.
        self._lock = threading.Lock()
        self._running = 0
        # First come those of the last `begin`; with each, who began it.
        self._queue: dict[Key, frozenset[object]] = {}
        # What is being done or is over.
        self._results: dict[Key, Future[Value]] = {}

    def begin(self, keys: Iterable[Key], owner: object = None) -> None:
        """Have this done in the background, in this order, and before what was begun earlier and is still queued.

        Args:
            keys: of what; those done or being done are left alone, and so are those whose error nobody has seen yet.
            owner: for `forget`.
        """
        with self._lock:
            nobody: frozenset[object] = frozenset()
            wanted = [key for key in dict.fromkeys(keys) if key not in self._results]
            first = {key: self._queue.get(key, nobody) | {owner} for key in wanted}
            self._queue = first | {key: owners for key, owners in self._queue.items() if key not in first}
            for _ in range(min(len(self._queue), self._most - self._running)):
                # First: after an interrupt amid the start there had better be one too few than too many.
                self._running += 1
                try:
                    threading.Thread(target=self._serve, name="work ahead", daemon=False).start()
                except RuntimeError:  # no more threads can be had: those who ask do it
                    self._running -= 1
                    return

    def forget(self, owner: object) -> None:
        """Leave undone what is still queued and nobody else began."""
        with self._lock:
            left = {key: owners - {owner} for key, owners in self._queue.items()}
            self._queue = {key: owners for key, owners in left.items() if owners}

    def get(self, key: Key) -> Value:
        """The result, waiting for a thread that is at it; otherwise computed here, if that was not done before.

        Raises:
            Exception: what the work raised, to everyone who was waiting for it; who asks later has it done again.
        """
        while True:
            mine: Future[Value] = Future()
            try:
                with self._lock:
                    self._queue.pop(key, None)
                    future = self._results.setdefault(key, mine)
                if future is mine:
                    mine.set_result(self._work(key))
            except Exception as error:
                mine.set_exception(_bare(error))
                raise
            finally:
                # An interrupt may come anywhere above: then it is as if this had not been begun.
                mine.cancel()
                self._keep_results(key, mine)
            try:
                failed = future.exception()
            except CancelledError:  # whoever was at it was interrupted
                failed = None
            self._keep_results(key, future)
            if failed is not None:
                raise _bare(failed).with_traceback(failed.__traceback__)
            if not future.cancelled():
                return future.result()

    def _keep_results(self, key: Key, future: Future[Value]) -> None:
        """Forget what ended without a result."""
        with self._lock:
            ended = future.cancelled() or (future.done() and future.exception() is not None)
            if ended and self._results.get(key) is future:
                del self._results[key]

    def _serve(self) -> None:
        """A thread."""
        while True:
            with self._lock:
                if not self._queue or not threading.main_thread().is_alive():
                    self._running -= 1
                    return
                key = next(iter(self._queue))
                del self._queue[key]
                future = self._results[key] = Future()
            try:
                future.set_result(self._work(key))
            except BaseException as error:
                future.set_exception(error)


def _bare(error: BaseException) -> BaseException:
    """A copy without its traceback, through which an error that is kept would keep alive all that its askers hold."""
    try:
        return copy.copy(error)
    except Exception:  # it cannot be copied: its constructor takes something else than it says
        return error
