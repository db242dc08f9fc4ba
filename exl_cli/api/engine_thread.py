"""One engine, any number of threads: who generates when.

Generations take turns, first come first served, and whoever has the turn runs to the end. An engine does the work of
one generation at a time, so that alternating between two would finish neither sooner and the first one much later. An
engine that computes several in one pass is a `BatchingEngine`, and as many of its `max_batch` have their turn at once.

A generation runs in a thread of the engine's, not in its consumer's. So a consumer may read slowly, read two streams of
one model in one thread, or never come back, without holding up anyone else; an event loop needs no thread for each.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from exl_cli.engines.base import BatchingEngine, Chunk, Engine, Request
from exl_cli.errors import EngineError

_here = threading.local()


def in_engine_thread() -> bool:
    """Whether this is a thread of an engine, of any: which must not wait for one."""
    return getattr(_here, "is_engine", False)


@dataclass(eq=False)
class Job:
    """One generation, waiting or running.

    Attributes:
        request: what to generate; its `cancel` ends the job.
        deliver: called in the engine's thread with each chunk, or with the exception that ended the generation. It must
            neither block nor raise. The last call has a chunk with a summary, or an exception.
        consumer: the thread that last asked for the result.
    """

    request: Request
    deliver: Callable[[Chunk | BaseException], None]
    consumer: threading.Thread = field(default_factory=threading.current_thread)

    def cancel(self) -> None:
        """End it at the next opportunity, or before it has begun."""
        self.request.cancel.set()

    def deserted(self) -> bool:
        """Whether the program is ending and the consumer has ended: then nobody will ever read the rest."""
        return not (self.consumer.is_alive() or threading.main_thread().is_alive())


class Turns:
    """Runs the jobs of one engine.

    Args:
        engine: used by nobody else.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots: int = engine.max_batch if isinstance(engine, BatchingEngine) else 1
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        # One for each of the engine's threads, from before it is started until it has ended.
        self._threads: set[object] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def submit(self, job: Job) -> None:
        """Queue a job; returns at once.

        Raises:
            EngineError: closed, or the system gives no thread to run it in.
        """
        with self._changed:
            if self._closed:
                raise EngineError("the model is closed", "load it again")
            self._waiting.append(job)
            if len(self._threads) < self._slots:
                try:
                    self._start()
                except RuntimeError as error:
                    if not self._threads:
                        self._waiting.remove(job)
                        raise EngineError(
                            f"no thread can be started: {error}", "end other work, then try again"
                        ) from None
                except BaseException:
                    self._waiting.remove(job)
                    raise

    def close(self, *, wait: bool = True) -> None:
        """Cancel all jobs and close the engine.

        Args:
            wait: return only once the engine is closed; otherwise a running job closes it when it ends. So, too, where
                an engine's thread asks, as the garbage collector may have it do: it would wait for itself.
        """
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.cancel()
            if not self._threads:
                self._engine.close()
            elif wait and not in_engine_thread():
                self._changed.wait_for(lambda: not self._threads)

    def _start(self) -> None:
        """Start one of the engine's threads. Where that fails, at whatever point, none is left that does anything."""
        ticket = object()
        self._threads.add(ticket)
        try:
            # Not a daemon: one of those can be cut off inside the engine's C++ code, which ends the process badly.
            threading.Thread(target=self._work, args=(ticket,), name="exl-engine", daemon=False).start()
        except BaseException:
            self._threads.discard(ticket)
            raise

    def _work(self, ticket: object) -> None:
        """One of the engine's threads: it lives as long as jobs are waiting."""
        _here.is_engine = True
        while (job := self._take(ticket)) is not None:
            try:
                for chunk in self._engine.stream(job.request):
                    job.deliver(chunk)
                    if job.deserted():
                        job.cancel()
            except BaseException as error:  # whatever it is, it belongs to whoever asked
                job.deliver(error)
            with self._changed:
                self._running.discard(job)
            del job  # so that an idle moment keeps no consumer's queue alive

    def _take(self, ticket: object) -> Job | None:
        """The next job; without one this thread is done, and closes the engine if it was the last one wanted."""
        with self._changed:
            if ticket not in self._threads:
                return None  # given up while it was being started
            if self._waiting:
                job = self._waiting.popleft()
                self._running.add(job)
                return job
            self._threads.discard(ticket)
            try:
                if self._closed and not self._threads:
                    self._engine.close()
            finally:
                self._changed.notify_all()
            return None
