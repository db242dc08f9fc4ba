"""Runs a batch job on one engine: keeps it supplied with requests, and writes answers as they complete.

A task has one retry after an engine failure. After running out of memory, requests are tried again with
half as many in flight, until one fails alone.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from exl_cli.api.engine_thread import EngineThread
from exl_cli.batch.output import Sink
from exl_cli.batch.prompts import Preparer, Task, error_line
from exl_cli.batch.rows import Row
from exl_cli.batch.windows import WINDOW_ROWS, Options, Rows, Slot, Windows
from exl_cli.engines.base import Chunk
from exl_cli.errors import DeviceError, ExitCode, ExlError, OutOfMemoryError, brief
from exl_cli.system.readings import EnergyMeter

# The job fails after this many engine failures in a row, with no answer between them.
_MOST_FAILURES = 16
# Between two readings of the energy meter.
_ENERGY_SECONDS = 1.0


class LinesFailedError(ExlError):
    """A batch job completed, but some of its lines have an error instead of an answer."""

    exit_code = ExitCode.LINES_FAILED

    @classmethod
    def of(cls, name: str, row: Row, error: BaseException) -> LinesFailedError:
        """Make a row's error that of the whole job; `name` is the input's."""
        message, hint = (error.message, error.hint) if isinstance(error, ExlError) else (str(error), "")
        return cls(f"{brief(name)}, line {row.number}: {message}", hint)


@dataclass
class Progress:
    """Progress of a job.

    Attributes:
        answered, failed: rows in this run.
        before: rows that were answered or had failed before this run.
        expected: estimated number of rows of the input; None if unknown.
        prompt_tokens, new_tokens: tokens of this run's answers.
        joules: energy used by the GPUs in this run; None if they do not report it.
        started: when the run started, by `time.monotonic`.
    """

    answered: int = 0
    failed: int = 0
    before: int = 0
    expected: int | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    joules: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Rows done in this run and before."""
        return self.answered + self.failed + self.before

    @property
    def seconds(self) -> float:
        """Seconds since the run started."""
        return time.monotonic() - self.started


class View(Protocol):
    """Shows a job's notes and progress."""

    def note(self, message: str) -> None:
        """Show a line."""
        ...

    def update(self, progress: Progress) -> None:
        """Called with every answer, and every second."""
        ...


@dataclass(eq=False)
class _Work:
    """A task in progress.

    Attributes:
        slot: its row.
        chunks: by request, once that is complete.
        left: number of requests not complete; 0 also after the task was given up.
        failures: of its requests, out-of-memory errors not counted.
    """

    slot: Slot
    chunks: list[list[Chunk]]
    left: int
    failures: int = 0


@dataclass(eq=False)
class _Flight:
    """A request in flight.

    Attributes:
        work, index: the task, and which of its requests this is.
        number: sequence number of the submission, from 1.
        engine_id: the engine's id for the request, for `cancel`.
        chunks: received so far.
        error: the error that ended it, if any.
    """

    work: _Work
    index: int
    number: int
    engine_id: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    error: BaseException | None = None


class Job:
    """A batch job on one engine.

    Args:
        rows: the rows to answer.
        preparer: turns them into tasks.
        sink: takes the answers.
        engine: loads the engine; called once there is something to compute.
        view: shows notes and progress.
        options: the job's options.
        progress: progress of the run that this job is part of; None to start at zero.

    Attributes:
        progress: updated as rows complete.
        is_stopped: whether `stop` was called.
    """

    def __init__(
        self,
        rows: Rows,
        preparer: Preparer,
        sink: Sink,
        engine: Callable[[], EngineThread],
        view: View,
        options: Options,
        progress: Progress | None = None,
    ) -> None:
        self._rows, self._sink, self._load, self._view, self._options = rows, sink, engine, view, options
        self._engine: EngineThread | None = None
        self._inbox: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._windows = Windows(rows, preparer, lambda: self._inbox.put(None), is_sorted=not options.ordered)
        self._in_flight: set[_Flight] = set()
        self._again: deque[tuple[_Work, int]] = deque()
        self._limit: int | None = None
        self._unreadable: ExlError | None = None
        self._submitted = self._last_wave = self._failures = 0
        self._next, self._held = 0, dict[int, bytes]()
        self._energy: EnergyMeter | None = None
        self._energy_at = 0.0
        self.progress = progress or Progress()
        self._before = self.progress.before
        self._joules = self.progress.joules
        self.is_stopped = False

    def stop(self) -> None:
        """Stop the job; rows in progress are left for the next run. May be called from a signal handler."""
        self.is_stopped = True
        self._windows.stop()
        self._inbox.put(None)

    def run(self) -> None:
        """Answer all rows.

        Raises:
            LinesFailedError: a row failed and the job is strict.
            ExlError: the input, the output or, repeatedly, the engine fails.
        """
        try:
            for slot in self._slots():
                if slot.task is None:
                    self._fail(slot, slot.error or RuntimeError("no task"))
                else:
                    self._start(slot, slot.task)
                if self.is_stopped:
                    break
            while (self._in_flight or self._again) and not self.is_stopped:
                self._refill()
                self._collect()
            if self._unreadable is not None and not self.is_stopped:
                raise self._unreadable
        finally:
            self._windows.stop()
            if self._engine is not None:
                for flight in self._in_flight:
                    self._engine.cancel(flight.engine_id)
            self._energy_at = 0.0
            self._show()
            if self._energy is not None:
                self._energy.close()

    def _slots(self) -> Iterator[Slot]:
        while not self.is_stopped:
            try:
                window = self._windows.poll(is_idle=self._has_room())
            except ExlError as error:
                self._unreadable = error
                return
            if window is None:
                return
            yield from window
            if not window:
                self._refill()
                self._collect()

    def _start(self, slot: Slot, task: Task) -> None:
        """Submit a task's requests, waiting for room for each."""
        work = _Work(slot, [[] for _ in task.requests], len(task.requests))
        for index in range(len(task.requests)):
            self._refill()
            # In ordered output, answers after a slow row are held back; do not let them pile up.
            while not (self._has_room() and len(self._held) < WINDOW_ROWS) and not self.is_stopped:
                self._collect()
                self._refill()
            if self.is_stopped or work.left == 0:
                return
            self._submit(work, index)

    def _refill(self) -> None:
        """Resubmit requests that are due for a retry."""
        while self._again and self._has_room() and not self.is_stopped:
            work, index = self._again.popleft()
            if work.left:
                self._submit(work, index)

    def _has_room(self) -> bool:
        """Whether to submit another request: up to twice the engine's batch, so that it always has some waiting, or
        fewer after it ran out of memory."""
        return self._engine is None or len(self._in_flight) < (self._limit or 2 * self._engine.max_batch)

    def _submit(self, work: _Work, index: int) -> None:
        if self._engine is None:
            self._engine = self._load()
            self._energy = EnergyMeter(self._engine.memory())
            if not self.progress.answered:
                self.progress.started = time.monotonic()
        task = work.slot.task
        if task is None:
            raise RuntimeError("no task")
        self._submitted += 1
        flight = _Flight(work, index, self._submitted)

        def deliver(item: Chunk | BaseException) -> None:
            if isinstance(item, BaseException):
                flight.error = item
                self._inbox.put(flight)
                return
            flight.chunks.append(item)
            if item.summary is not None:
                self._inbox.put(flight)

        try:
            flight.engine_id = self._engine.submit(task.requests[index], deliver)
        except ExlError as error:
            self._give_up(work, error)
        else:
            self._in_flight.add(flight)

    def _collect(self) -> None:
        """Wait up to a second for a request to end, and handle it."""
        try:
            flight = self._inbox.get(timeout=1.0)
        except queue.Empty:
            self._sink.tick()
            self._show()
            return
        if flight is None or self.is_stopped:
            return
        at_once = len(self._in_flight)
        self._in_flight.discard(flight)
        work = flight.work
        if work.left == 0:  # given up meanwhile
            return
        if flight.error is not None:
            self._failed(flight, flight.error, at_once)
            return
        if flight.chunks[-1].summary and flight.chunks[-1].summary.finish_reason == "cancelled":
            return
        self._failures = 0
        work.chunks[flight.index] = flight.chunks
        work.left -= 1
        if work.left == 0:
            self._answer(work)

    def _answer(self, work: _Work) -> None:
        task = work.slot.task
        if task is None:
            raise RuntimeError("no task")
        summaries = [chunks[-1].summary for chunks in work.chunks]
        self.progress.prompt_tokens += sum(summary.prompt_tokens for summary in summaries if summary)
        self.progress.new_tokens += sum(summary.new_tokens for summary in summaries if summary)
        self._write(work.slot, task.line(work.chunks, flat=self._options.flat))
        self.progress.answered += 1
        self._show()

    def _failed(self, flight: _Flight, error: BaseException, at_once: int) -> None:
        """Retry a failed request or give up its task; if memory ran out, with fewer requests in flight."""
        if isinstance(error, DeviceError):
            raise error
        work = flight.work
        if isinstance(error, (OutOfMemoryError, MemoryError)) and self._engine is not None:
            at_once = min(at_once, self._engine.max_batch)
            if at_once > 1:
                # All requests in the forward pass fail together. Only the first of such a wave, one submitted after the
                # last wave, halves the limit.
                if flight.number > self._last_wave:
                    self._last_wave = self._submitted
                    self._limit = max(at_once // 2, 1)
                    self._view.note(f"out of memory: reducing concurrent sequences from {at_once} to {self._limit}")
                self._again.append((work, flight.index))
                return
            if flight.number <= self._last_wave:
                self._again.append((work, flight.index))
                return
        else:
            self._failures += 1
            work.failures += 1
            if self._failures >= _MOST_FAILURES:
                raise error
            if work.failures < 2:
                self._again.append((work, flight.index))
                return
        self._give_up(work, error)

    def _give_up(self, work: _Work, error: BaseException) -> None:
        work.left = 0
        for flight in self._in_flight:
            if flight.work is work and self._engine is not None:
                self._engine.cancel(flight.engine_id)
        self._fail(work.slot, error)

    def _fail(self, slot: Slot, error: BaseException) -> None:
        if self._options.strict:
            raise LinesFailedError.of(self._rows.name, slot.row, error)
        self._write(slot, error_line(slot.row, error, flat=self._options.flat))
        self.progress.failed += 1
        self._show()

    def _write(self, slot: Slot, line: bytes) -> None:
        slot.task = None  # the window keeps the slot, but should not keep its chunks
        if not self._options.ordered:
            self._sink.append(line)
            return
        self._held[slot.index] = line
        while self._next in self._held:
            self._sink.append(self._held.pop(self._next))
            self._next += 1

    def _show(self) -> None:
        self.progress.before = self._before + self._rows.before
        self.progress.expected = self._rows.expected
        if self._energy is not None and time.monotonic() >= self._energy_at:
            self._energy_at = time.monotonic() + _ENERGY_SECONDS
            joules = self._energy.joules()
            self.progress.joules = None if joules is None else (self._joules or 0.0) + joules
        self._view.update(self.progress)
