"""The engine thread: runs one engine, takes commands from a queue, delivers chunks.

All computation happens in this thread, so engines need no locks. Python delivers signals to the main thread only, so
engines never see a KeyboardInterrupt either. Chunks go into one queue per request, which is bounded by the request's
`max_new_tokens` alone: a slow or vanished consumer does not block the others.

Requests are started first come, first served, with up to `max_batch` in flight.
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
    """Whether the current thread is an engine thread, which must not wait for one."""
    return getattr(_local, "is_engine", False)


class EngineThread:
    """A loaded engine and its thread, which starts with the first request.

    Thread-safe, and safe to call from finalizers.

    Args:
        engine: owned by this object from now on.
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
        return self._worker.engine.facts

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._worker.closed

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request and return its id at once.

        Args:
            request: the request.
            deliver: called in the engine thread with each chunk; the last call gets a chunk with a summary, or the
                exception that ended the generation. It must not block. If it raises, the request is cancelled.

        Raises:
            PromptError: see `engines.base.Engine.check`.
            EngineError: closed, loaded before a fork, or no thread could be started.
        """
        self._worker.engine.check(request)
        job = _Job(next(self._worker.ids), request, deliver)
        self._worker.send(job)
        return job.id

    def cancel(self, request_id: int) -> None:
        """End a request soon, with finish reason "cancelled"; ignored if it has ended."""
        self._worker.cancel(request_id)

    def stream(self, request: Request) -> ChunkStream:
        """`submit`, as an iterator."""
        return ChunkStream(self, request)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self._call(lambda engine: engine.logits(ids))

    def cached_logits(self, ids: Sequence[int], step: int) -> torch.Tensor:
        """See `engines.base.CachedScoring.cached_logits`; plain `logits` for engines without it."""

        def score(engine: Engine) -> torch.Tensor:
            return engine.cached_logits(ids, step) if isinstance(engine, CachedScoring) else engine.logits(ids)

        return self._call(score)

    def memory(self) -> list[DeviceMemory]:
        return [] if self.closed else self._worker.engine.memory()

    def pages(self) -> tuple[int, int] | None:
        """See `engines.base.PagedCache.pages`; None without a paged cache."""
        engine = self._worker.engine
        return engine.pages() if isinstance(engine, PagedCache) and not self.closed else None

    def close(self, *, wait: bool = True) -> None:
        """Cancel all requests and close the engine. Idempotent.

        Args:
            wait: return only once the engine is closed. Ignored in an engine thread, which might wait for itself.
        """
        self._worker.close(wait=wait)

    def _call(self, function: Callable[[Engine], T]) -> T:
        """Run a function in the engine thread, between two steps, and return its result."""
        future: Future[T] = Future()

        def run(engine: Engine) -> None:
            try:
                future.set_result(function(engine))
            except BaseException as error:
                future.set_exception(error)

        self._worker.send(run)
        return future.result()


class ChunkStream(Iterator[Chunk]):
    """Iterates over the chunks of one response. Closing or dropping it cancels the request.

    Attributes:
        request_id: see `EngineThread.cancel`.

    Iterating raises what the engine raised.
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
        """Cancel the request; the last chunk still arrives."""
        self._thread.cancel(self.request_id)

    def close(self) -> None:
        """Cancel the request and drop the rest."""
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


# A command: a job to run, a request id to cancel, a function to call between steps, or None to end the thread.
_Command = _Job | int | Callable[[Engine], None] | None


class _Worker:
    """The thread's loop and state. It does not reference its `EngineThread`, so dropping that closes the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.closed = False
        self._process = os.getpid()
        # SimpleQueue and RLock are reentrant: a finalizer may cancel or close something at any moment.
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self.ids = itertools.count(1)  # next() is atomic
        self._thread: threading.Thread | None = None
        self._exiting = False
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}

    # --- called from any thread -----------------------------------------------------------------------------------

    def send(self, command: _Command) -> None:
        """Queue a command, starting the thread if needed."""
        if os.getpid() != self._process:
            raise EngineError("the model was loaded in another process", "load it in this process, after the fork")
        with self._lock:
            if not self.closed and self._thread is None:
                self._start()
            if not self.closed:
                self._commands.put(command)
                return
        raise EngineError("the model is closed", "load it again")

    def cancel(self, request_id: int) -> None:
        """Interrupt a running request through the engine, and drop a waiting one through the queue."""
        self.engine.cancel(request_id)
        self._commands.put(request_id)

    def close(self, *, wait: bool = True, exiting: bool = False) -> None:
        """Tell the thread to cancel everything and close the engine; without a thread, close it here.

        Args:
            wait: return only once that is done.
            exiting: the process is ending: do not free the engine's memory.
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
            # After an interrupt the thread may run all the same. It waits for this lock, then sees that it was dropped.
            self._thread = None
            if isinstance(error, RuntimeError):
                raise EngineError(f"cannot start a thread: {error}", "stop other programs, then try again") from None
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
        """Execute the queued commands; block for one when idle. False when told to end."""
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
        if request_id in self._running:  # it may have started since `cancel` was called
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
                    continue  # dropped after an engine bug, see below
                if isinstance(item, BaseException) or item.summary is not None:
                    del self._running[request_id]
                self._deliver(job, item)
        except BaseException as error:  # a bug in the engine: fail all running requests
            jobs = [*self._running.values()]
            self._running.clear()
            for job in jobs:
                self.engine.cancel(job.id)
                self._deliver(job, error)

    def _deliver(self, job: _Job, item: Chunk | BaseException) -> None:
        try:
            job.deliver(item)
        except BaseException:  # a broken consumer must not affect the others
            self.engine.cancel(job.id)


def _cancelled(request: Request) -> Chunk:
    """The last chunk of a request that was never started."""
    return Chunk("", (), Summary("cancelled", len(request.ids), 0, 0, 0.0, 0.0, 0.0))


# Workers with a running thread. The threads are daemons, to not keep a program from exiting, but one that is killed
# inside C++ code would crash the process. So end them at exit, after all other threads.
_started: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for worker in list(_started):
        worker.close(exiting=True)
