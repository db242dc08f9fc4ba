"""Results computed in the background before they are asked for; a caller that asks sooner computes them on the spot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Ahead(Generic[Key, Value]):
    """Results by key, each computed once in a process.

    An executor would finish its queue before the interpreter ends, and daemon threads crash when the libraries they
    call are torn down; these threads finish the key that each is at.

    Args:
        work: computes a result; several threads call it at once, with different keys.
        threads: the most that run in the background.
    """

    def __init__(self, work: Callable[[Key], Value], threads: int) -> None:
        self._work, self._most = work, threads
        self._lock = threading.Lock()  # of all below
        self._running = 0
        self._queue: dict[Key, None] = {}
        self._results: dict[Key, Future[Value]] = {}  # of work that has begun

    def begin(self, keys: Iterable[Key]) -> None:
        """Queue keys in this order, in front of those that are still queued."""
        with self._lock:
            first = dict.fromkeys(key for key in keys if key not in self._results)
            self._queue = {**first, **self._queue}
            for _ in range(min(len(self._queue), self._most - self._running)):
                try:
                    threading.Thread(target=self._serve, name="work ahead", daemon=False).start()
                except RuntimeError:  # no more threads: those who ask do the work
                    return
                self._running += 1

    def forget(self, keys: Iterable[Key]) -> None:
        """Take those keys that are still queued off the queue."""
        with self._lock:
            for key in keys:
                self._queue.pop(key, None)

    def get(self, key: Key) -> Value:
        """The result, from the thread that is at it or computed here.

        Raises:
            Exception: what the work raised. The next `get` tries again.
        """
        with self._lock:
            self._queue.pop(key, None)
            begun = key in self._results
            future = self._results.setdefault(key, Future())
        if not begun:
            self._compute(key, future)
        return future.result()

    def _compute(self, key: Key, future: Future[Value]) -> None:
        try:
            future.set_result(self._work(key))
        except BaseException as error:
            with self._lock:
                del self._results[key]
            future.set_exception(error)

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self._queue or not threading.main_thread().is_alive():
                    self._running -= 1
                    return
                key = next(iter(self._queue))
                del self._queue[key]
                future = self._results[key] = Future()
            self._compute(key, future)
