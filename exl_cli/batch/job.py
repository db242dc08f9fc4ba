"""Runs a batch job on one engine: rows in windows, requests side by side, answers written as they come.

A window of rows is read, turned into requests and sorted while the engine computes the one before it; the whole input
is never in memory. Where several jobs share the work, each takes the rows whose key falls to it: nothing else decides
who answers what, and each writes its own output.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from exl_cli.api.bodies import BodyError
from exl_cli.api.engine_thread import EngineThread
from exl_cli.batch.output import KeySet, Sink
from exl_cli.batch.prompts import Preparer, Task, error_line
from exl_cli.batch.rows import Row, Source
from exl_cli.engines.base import Chunk
from exl_cli.errors import DeviceError, ExitCode, ExlError, OutOfMemoryError, brief

# A window ends with so many rows, or once its prompts have so many tokens.
_WINDOW_ROWS = 2048
_WINDOW_TOKENS = 1 << 20
# Prompts that have so many first tokens in common belong together.
_SHARED = 32
# Failures of the engine in a row, with no answer between them, after which it is given up.
_MOST_FAILURES = 16


class LinesFailedError(ExlError):
    """Lines of a batch job that have an error for an answer."""

    exit_code = ExitCode.LINES_FAILED


@dataclass
class Progress:
    """How far a job is.

    Attributes:
        answered, failed: rows of this run.
        before: rows that were answered, or had failed, when it began.
        expected: rows of the input, as far as can be told.
        prompt_tokens, new_tokens: of the answers of this run.
        seconds: since its first row.
    """

    answered: int = 0
    failed: int = 0
    before: int = 0
    expected: int | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Rows that are done, in this run or before it."""
        return self.answered + self.failed + self.before

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started


class View(Protocol):
    """Takes what a job has to tell."""

    def note(self, message: str) -> None:
        """A line worth telling."""
        ...

    def update(self, progress: Progress) -> None:
        """Called with every answer, and every second."""
        ...


@dataclass(frozen=True)
class Options:
    """How a job goes about its rows.

    Attributes:
        flat: write texts alone.
        ordered: write answers in the order of the input.
        strict: end at the first row that fails.
        shard, shards: take the rows of one of so many shares, from 0.
    """

    flat: bool = False
    ordered: bool = False
    strict: bool = False
    shard: int = 0
    shards: int = 1


@dataclass
class _Slot:
    """A row of a window: its place in the input, and what became of it."""

    index: int
    row: Row
    task: Task | None
    error: BaseException | None = None


class _Windows:
    """Reads the input in a thread, a window ahead of the engine.

    Args:
        source: the input.
        preparer: turns its rows into tasks.
        answered: keys of rows to leave out.
        options: of the job.
        wake: called when `poll` has something.

    Attributes:
        before: rows left out so far.
    """

    def __init__(
        self,
        source: Source,
        preparer: Preparer,
        answered: KeySet,
        options: Options,
        wake: Callable[[], None],
    ) -> None:
        self._source, self._preparer, self._answered, self._options = source, preparer, answered, options
        self._ready: queue.Queue[list[_Slot] | BaseException | None] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        self._wake = wake
        self.before = 0
        threading.Thread(target=self._run, name="exl-batch-input", daemon=True).start()

    def poll(self) -> list[_Slot] | None:
        """The next window, empty where it is not ready yet; None after the last.

        Raises, what reading the input raised.
        """
        try:
            item = self._ready.get_nowait()
        except queue.Empty:
            return []
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Read no further."""
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            self._ready.get_nowait()

    def _run(self) -> None:
        try:
            for window in self._windows():
                self._put(window)
                if self._stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: list[_Slot] | BaseException | None) -> None:
        self._ready.put(item)
        self._wake()

    def _windows(self) -> Iterator[list[_Slot]]:
        window: list[_Slot] = []
        tokens = 0
        try:
            for index, row in enumerate(self._rows()):
                slot = self._slot(index, row)
                window.append(slot)
                tokens += 0 if slot.task is None else sum(len(request.ids) for request in slot.task.requests)
                if len(window) >= _WINDOW_ROWS or tokens >= _WINDOW_TOKENS:
                    yield self._sorted(window)
                    window, tokens = [], 0
                if self._stopped.is_set():
                    return
        except ExlError:  # the input ends before its end: what was read is good
            if window:
                yield self._sorted(window)
            raise
        if window:
            yield self._sorted(window)

    def _rows(self) -> Iterator[Row]:
        """The rows of this job's share that have no answer yet."""
        seen = KeySet()
        for row in self._source:
            if row.key % self._options.shards != self._options.shard:
                continue
            if row.key in seen and row.key != row.line_key:
                row = _repeated(row)
            seen.add(row.key)
            if row.key in self._answered:
                self.before += 1
            else:
                yield row

    def _slot(self, index: int, row: Row) -> _Slot:
        try:
            return _Slot(index, row, self._preparer.prepare(row))
        except Exception as error:  # of a bug, too: the other rows have theirs
            return _Slot(index, row, None, error)

    def _sorted(self, window: list[_Slot]) -> list[_Slot]:
        """Errors first; then shared beginnings side by side, and among these groups the short prompts first."""
        if self._options.ordered:
            return window
        failed = [slot for slot in window if slot.task is None]
        tasks = [(tuple(slot.task.requests[0].ids), slot) for slot in window if slot.task is not None]
        tasks.sort(key=lambda pair: (pair[0], pair[1].index))
        groups: list[list[tuple[tuple[int, ...], _Slot]]] = []
        for ids, slot in tasks:
            if groups and groups[-1][-1][0][:_SHARED] == ids[:_SHARED]:
                groups[-1].append((ids, slot))
            else:
                groups.append([(ids, slot)])
        groups.sort(key=lambda group: len(group[0][0]))
        return [*failed, *(slot for group in groups for _, slot in group)]


def _repeated(row: Row) -> Row:
    error = BodyError(f"custom_id {brief(row.custom_id)!r} is that of an earlier line", code="duplicate_custom_id")
    return Row(row.number, f"line-{row.number}", row.line_key, row.line_key, row.record, error=error)


@dataclass(eq=False)
class _Work:
    """A task under way: the chunks of each of its requests, and which have ended."""

    slot: _Slot
    chunks: list[list[Chunk]]
    left: int
    failures: int = 0


@dataclass(eq=False)
class _Flight:
    """A request in the engine.

    Attributes:
        work, index: which request of which task.
        number: counts what was submitted.
        engine_id: to cancel it by.
        chunks: so far.
        error: that ended it.
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
        source: the input.
        preparer: turns its rows into tasks.
        sink: takes the answers.
        engine: loads the engine; called once there is something to compute.
        view: takes what there is to tell.
        options: of the job.

    Attributes:
        progress: how far it is.
        is_stopped: whether `stop` was called.
    """

    def __init__(
        self,
        source: Source,
        preparer: Preparer,
        sink: Sink,
        engine: Callable[[], EngineThread],
        view: View,
        options: Options,
    ) -> None:
        self._source, self._sink, self._load, self._view, self._options = source, sink, engine, view, options
        self._engine: EngineThread | None = None
        self._inbox: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._windows = _Windows(source, preparer, sink.answered, options, lambda: self._inbox.put(None))
        self._in_flight: set[_Flight] = set()
        self._again: deque[tuple[_Work, int]] = deque()
        self._limit: int | None = None
        self._unreadable: ExlError | None = None
        self._submitted = self._last_wave = self._failures = 0
        self._next, self._held = 0, dict[int, bytes]()
        self.progress = Progress()
        self.is_stopped = False

    def stop(self) -> None:
        """End it: what is being computed is left for another run. May be called by a handler of a signal."""
        self.is_stopped = True
        self._windows.stop()
        self._inbox.put(None)

    def run(self) -> None:
        """Answer all rows.

        Raises:
            LinesFailedError: a row failed and the job is strict.
            ExlError: the input or the output fails, or the engine does for good.
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
            self._show()

    def _slots(self) -> Iterator[_Slot]:
        while not self.is_stopped:
            try:
                window = self._windows.poll()
            except ExlError as error:
                self._unreadable = error
                return
            if window is None:
                return
            yield from window
            if not window:
                self._refill()
                self._collect()

    def _start(self, slot: _Slot, task: Task) -> None:
        """Submit a task's requests as there is room for each."""
        work = _Work(slot, [[] for _ in task.requests], len(task.requests))
        for index in range(len(task.requests)):
            self._refill()
            # What is held back grows while others are answered before a long one.
            while not (self._has_room() and len(self._held) < _WINDOW_ROWS) and not self.is_stopped:
                self._collect()
                self._refill()
            if self.is_stopped or work.left == 0:
                return
            self._submit(work, index)

    def _refill(self) -> None:
        """Submit again what is to be tried again."""
        while self._again and self._has_room() and not self.is_stopped:
            work, index = self._again.popleft()
            if work.left:
                self._submit(work, index)

    def _has_room(self) -> bool:
        """Whether another request is to go to the engine: some wait there, unless it is to compute fewer at once."""
        return self._engine is None or len(self._in_flight) < (self._limit or 2 * self._engine.max_batch)

    def _submit(self, work: _Work, index: int) -> None:
        if self._engine is None:
            self._engine = self._load()
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
        """Wait for the end of a request, a second at most."""
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
        """Try a request again that the engine has ended, in smaller company where memory ran out."""
        if isinstance(error, DeviceError):
            raise error
        work = flight.work
        if isinstance(error, (OutOfMemoryError, MemoryError)) and self._engine is not None:
            at_once = min(at_once, self._engine.max_batch)
            if at_once > 1:
                # All that were in the pass fail together, and count as one failure.
                if flight.number > self._last_wave:
                    self._last_wave = self._submitted
                    self._limit = max(at_once // 2, 1)
                    self._view.note(f"out of memory: from {at_once} sequences at once to {self._limit}")
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

    def _fail(self, slot: _Slot, error: BaseException) -> None:
        if self._options.strict:
            message = error.message if isinstance(error, ExlError) else str(error)
            hint = error.hint if isinstance(error, ExlError) else ""
            raise LinesFailedError(f"{brief(self._source.name)}, line {slot.row.number}: {message}", hint)
        self._write(slot, error_line(slot.row, error, flat=self._options.flat))
        self.progress.failed += 1
        self._show()

    def _write(self, slot: _Slot, line: bytes) -> None:
        if not self._options.ordered:
            self._sink.append(line)
            return
        self._held[slot.index] = line
        while self._next in self._held:
            self._sink.append(self._held.pop(self._next))
            self._next += 1

    def _show(self) -> None:
        self.progress.before = self._windows.before
        expected = self._source.expected_rows
        self.progress.expected = None if expected is None else round(expected / self._options.shards)
        self._view.update(self.progress)
