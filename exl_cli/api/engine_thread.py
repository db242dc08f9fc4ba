"""The thread in which an engine runs.

Everything that an engine computes is computed in one thread: it takes commands from a queue, steps the engine while
there is work, and delivers the chunks. So nothing in an engine needs a lock; and as Python delivers signals to the main
thread only, nothing in it needs to survive an interrupt either. Consumers of any kind look alike to it: a consumer may
read slowly, read two streams in one thread, or never come back, without holding up the others.

Requests are taken up first come, first served, as many at a time as the engine computes together.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from exl_cli.engines.base import CachedScoring, Chunk, Engine, PagedCache, Request, Summary
from exl_cli.errors import EngineError
from exl_cli.system.readings import DeviceMemory

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Deliver = Callable[["Chunk | BaseException"], None]

_local = threading.local()


def in_engine_thread() -> bool:
    """Whether this is the thread of some engine, which must not wait for an engine."""
    return getattr(_local, "is_engine", False)


class EngineThread:
    """A loaded engine and its thread, which starts with the first request.

    May be used from any thread, and by the garbage collector.

    Args:
        engine: used by nobody else from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._worker = _Worker(engine)
        self.name = engine.name
        self.context_length = engine.context_length
        self.max_batch = engine.max_batch
        self.has_cached_scoring = isinstance(engine, CachedScoring)
        weakref.finalize(self, self._worker.close, wait=False).atexit = False

    @property
    def facts(self) -> dict[str, str]:
        """See `engines.base.Engine.facts`."""
        return self._worker.engine.facts

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._worker.closed

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request; returns at once, with the id to cancel it by.

        Args:
            request: what to generate.
            deliver: called in the engine's thread with each chunk. The last call has a chunk with a summary, or the
                exception that ended the generation. It should return at once; if it raises, the request is cancelled.

        Raises:
            PromptError: see `engines.base.Engine.check`.
            EngineError: closed, loaded by another process, or the system gives no thread to run it in.
        """
        self._worker.engine.check(request)
        job = _Job(next(self._worker.ids), request, deliver)
        self._worker.send(job)
        return job.id

    def cancel(self, request_id: int) -> None:
        """End a request at the next opportunity with finish reason "cancelled"; nothing happens after its end."""
        self._worker.cancel(request_id)

    def stream(self, request: Request) -> ChunkStream:
        """`submit`, to be iterated over."""
        return ChunkStream(self, request)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """See `engines.base.Engine.logits`."""
        return self._call(lambda engine: engine.logits(ids))

    def cached_logits(self, ids: Sequence[int], step: int) -> torch.Tensor:
        """See `engines.base.CachedScoring.cached_logits`; for an engine that has no such cache, its `logits`."""

        def score(engine: Engine) -> torch.Tensor:
            return engine.cached_logits(ids, step) if isinstance(engine, CachedScoring) else engine.logits(ids)

        return self._call(score)

    def memory(self) -> list[DeviceMemory]:
        """See `engines.base.Engine.memory`."""
        return [] if self.closed else self._worker.engine.memory()

    def pages(self) -> tuple[int, int] | None:
        """See `engines.base.PagedCache.pages`; None for an engine that has none."""
        engine = self._worker.engine
        return engine.pages() if isinstance(engine, PagedCache) and not self.closed else None

    def close(self, *, wait: bool = True) -> None:
        """End all requests as cancelled and close the engine; closing twice is fine.

        Args:
            wait: return only once the engine is closed. An engine's thread never waits: it might wait for itself.
        """
        self._worker.close(wait=wait)

    def _call(self, function: Callable[[Engine], T]) -> T:
        """Run a function between two steps, in the engine's thread."""
        future: Future[T] = Future()

        def run(engine: Engine) -> None:
            try:
                future.set_result(function(engine))
            except BaseException as error:
                future.set_exception(error)

        self._worker.send(run)
        return future.result()


class ChunkStream(Iterator[Chunk]):
    """The chunks of one response. Closing or dropping it cancels what has not come yet.

    Attributes:
        request_id: see `EngineThread.cancel`.

    Raises, on iterating: what the engine raised.
    """

    def __init__(self, thread: EngineThread, request: Request) -> None:
        self._inbox: queue.SimpleQueue[Chunk | BaseException] = queue.SimpleQueue()
        self._thread = thread
        self._ended = False
        self.request_id = thread.submit(request, self._inbox.put)

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        item = self._inbox.get()
        self._ended = isinstance(item, BaseException) or item.summary is not None
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        """End it at the next opportunity; the last chunk still comes."""
        self._thread.cancel(self.request_id)

    def close(self) -> None:
        """Cancel it and ignore the rest."""
        self._ended = True
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "request_id") and not self._ended:
            self.cancel()


@dataclass(frozen=True, eq=False)
class _Job:
    id: int
    request: Request
    deliver: Deliver


# To a worker: a request, the id of one to cancel, a function to run between two steps, or the end.
_Command = _Job | int | Callable[[Engine], None] | None


class _Worker:
    """What the thread runs. It holds no reference to its `EngineThread`, which can be dropped without being closed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.closed = False
        self._process = os.getpid()
        # Reentrant, as the garbage collector may have a thread cancel or close something at any moment.
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self.ids = itertools.count(1)  # a step of it is atomic
        self._thread: threading.Thread | None = None
        self._exiting = False
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}

    # --- called from any thread -----------------------------------------------------------------------------------

    def send(self, command: _Command) -> None:
        """Queue a command, and start the thread if need be."""
        if os.getpid() != self._process:
            raise EngineError("the model was loaded by another process", "load it in this one, after the fork")
        with self._lock:
            if not self.closed and self._thread is None:
                self._start()
            if not self.closed:
                self._commands.put(command)
                return
        raise EngineError("the model is closed", "load it again")

    def cancel(self, request_id: int) -> None:
        """Have the engine cut a step short where it can, and the thread see to a request that is still waiting."""
        self.engine.cancel(request_id)
        self._commands.put(request_id)

    def close(self, *, wait: bool = True, exiting: bool = False) -> None:
        """Have the thread end everything; without one, close the engine here.

        Args:
            wait: return only once that is done.
            exiting: leave the engine's memory to the end of the process.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            first, self.closed = not self.closed, True
            thread = self._thread
            if thread is None and first:
                self.engine.close()
        if thread is None:
            return
        if first:
            self._exiting = exiting
            for request_id in list(self._running):
                self.engine.cancel(request_id)
            self._commands.put(None)
        if wait and not in_engine_thread():
            thread.join()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="exl-engine", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except BaseException as error:
            # It may run all the same, as after an interrupt: it waits for this lock and then sees that it is not ours.
            self._thread = None
            if isinstance(error, RuntimeError):
                raise EngineError(f"no thread can be started: {error}", "end other work, then try again") from None
            raise
        _started.add(self)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():
                return
        _local.is_engine = True
        while self._obey():
            while self._waiting and len(self._running) < self.engine.max_batch:
                self._take_up(self._waiting.popleft())
            if self._running:
                self._step()
        for job in [*self._waiting, *self._running.values()]:
            self._deliver(job, _cancelled(job.request))
        self._waiting.clear()
        self._running.clear()
        if not self._exiting:
            self.engine.close()

    def _obey(self) -> bool:
        """Carry out the commands that have come; with nothing else to do, wait for one. False at the end."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(block=not self._running and not self._waiting)
                if command is None:
                    return False
                if isinstance(command, _Job):
                    self._waiting.append(command)
                elif isinstance(command, int):
                    self._cancel(command)
                else:
                    command(self.engine)
        return True

    def _cancel(self, request_id: int) -> None:
        if request_id in self._running:  # perhaps since it was asked to
            self.engine.cancel(request_id)
        for job in [job for job in self._waiting if job.id == request_id]:
            self._waiting.remove(job)
            self._deliver(job, _cancelled(job.request))

    def _take_up(self, job: _Job) -> None:
        try:
            self.engine.add(job.id, job.request)
        except BaseException as error:
            self._deliver(job, error)
        else:
            self._running[job.id] = job

    def _step(self) -> None:
        try:
            for request_id, item in self.engine.step():
                job = self._running.get(request_id)
                if job is None:
                    continue  # given up after a bug, see below
                if isinstance(item, BaseException) or item.summary is not None:
                    del self._running[request_id]
                self._deliver(job, item)
        except BaseException as error:  # a bug: it is told to all that it may concern
            jobs = [*self._running.values()]
            self._running.clear()
            for job in jobs:
                self.engine.cancel(job.id)
                self._deliver(job, error)

    def _deliver(self, job: _Job, item: Chunk | BaseException) -> None:
        try:
            job.deliver(item)
        except BaseException:  # its consumer is beyond help; the others are not
            self.engine.cancel(job.id)


def _cancelled(request: Request) -> Chunk:
    """The last chunk of a request that was never taken up."""
    return Chunk("", (), Summary("cancelled", len(request.ids), 0, 0, 0.0, 0.0, 0.0))


# Workers with a thread. It is a daemon and does not keep a program from ending, but one that is cut off inside the
# engine's C++ code would crash it: at exit, when all other threads have ended, each is brought to its end.
_started: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for worker in list(_started):
        worker.close(exiting=True)
