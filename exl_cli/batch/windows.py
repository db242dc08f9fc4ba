"""Reads the rows of a batch job that have no answer yet, in windows of tasks sorted for prefix reuse.

A window is read and turned into requests while the engine computes the one before, so the whole input is never in
memory. If several jobs share an input (`shard`), each takes the rows whose key modulo the number of jobs is its own
number, and writes its own output; they need not communicate.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from exl_cli.api.bodies import BodyError
from exl_cli.batch.output import KeySet
from exl_cli.batch.prompts import Preparer, Task
from exl_cli.batch.rows import Row, Source
from exl_cli.errors import ExlError, brief

# A window ends at this many rows, or once its prompts have this many tokens.
WINDOW_ROWS = 2048
_WINDOW_TOKENS = 1 << 20
# Seconds after its first row before an idle engine gets it as it is.
_PATIENCE = 1.0
# Prompts that share this many first tokens are computed one after the other.
_SHARED = 32


@dataclass(frozen=True)
class Options:
    """Options of a job.

    Attributes:
        flat: write texts instead of response objects.
        ordered: write answers in the order of the input.
        strict: stop at the first row that fails.
        shard, shards: number of this job, from 0, and how many jobs share the input.
    """

    flat: bool = False
    ordered: bool = False
    strict: bool = False
    shard: int = 0
    shards: int = 1


@dataclass
class Slot:
    """A row of a window.

    Attributes:
        index: its number among the rows to answer, from 0.
        row: the row.
        task: its task; None if it could not be prepared, or once its row has a line.
        error: why not.
    """

    index: int
    row: Row
    task: Task | None
    error: BaseException | None = None


class Rows(Protocol):
    """Rows to answer.

    Attributes:
        name: the input's name, for messages.
        before: rows skipped so far because they have an answer.
    """

    name: str
    before: int

    @property
    def expected(self) -> int | None:
        """Estimated number of rows, skipped ones included; None if unknown."""
        ...

    def __iter__(self) -> Iterator[Row | None]:
        """Yield the rows, and None where the next row may take long: rows before it should be processed now."""
        ...


class Pending:
    """The rows of an input that this job still has to answer: in its shard, for its model, and without an answer.

    Args:
        source: the input.
        answered: keys of rows to skip.
        options: the job's options.
        select: returns the row, perhaps with an error set, or None to leave it to the pass of another model.

    Attributes:
        name, before: see `Rows`.
    """

    def __init__(
        self, source: Source, answered: KeySet, options: Options, select: Callable[[Row], Row | None] = lambda row: row
    ) -> None:
        self.name, self.before = source.name, 0
        self._source, self._answered, self._options, self._select = source, answered, options, select

    @property
    def expected(self) -> int | None:
        """See `Rows.expected`."""
        rows = self._source.expected_rows
        return None if rows is None else round(rows / self._options.shards)

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """Yield each row with its number among all rows of the input, from 0."""
        seen = KeySet()
        for index, row in enumerate(self._source):
            if row.key % self._options.shards != self._options.shard:
                continue
            if row.key in seen and row.key != row.line_key:
                row = repeated(row)
            seen.add(row.key)
            if (selected := self._select(row)) is None:
                continue
            if row.key in self._answered:
                self.before += 1
            else:
                yield index, selected


def repeated(row: Row) -> Row:
    """The row as an error, because an earlier row has its custom_id; its key becomes that of its line."""
    error = BodyError(
        f"duplicate custom_id {brief(row.custom_id)!r}: an earlier line has it", code="duplicate_custom_id"
    )
    return Row(row.number, f"line-{row.number}", row.line_key, row.line_key, row.record, error=error)


class Windows:
    """Reads rows in a thread, one window ahead of the engine.

    Args:
        rows: the rows to answer; None among them ends a window.
        preparer: turns them into tasks.
        wake: called when `poll` has something.
        is_sorted: whether to sort each window.
        patience: seconds that an idle engine waits for a window to fill.
    """

    def __init__(
        self,
        rows: Rows,
        preparer: Preparer,
        wake: Callable[[], None],
        *,
        is_sorted: bool = True,
        patience: float = _PATIENCE,
    ) -> None:
        self._rows, self._preparer, self._is_sorted, self._patience = rows, preparer, is_sorted, patience
        self._ready: queue.Queue[list[Slot] | BaseException | None] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        self._wake = wake
        self._lock = threading.Lock()
        self._window, self._tokens, self._begun = list[Slot](), 0, 0.0  # the window being read
        threading.Thread(target=self._run, name="exl-batch-input", daemon=True).start()

    def poll(self, *, is_idle: bool = False) -> list[Slot] | None:
        """The next window; empty if it is not ready yet, None after the last. Raises errors of the input.

        Args:
            is_idle: there is nothing else to do: a window that takes long to fill, as from a slow pipe, ends now.
        """
        try:
            item = self._ready.get_nowait()
        except queue.Empty:
            is_late = is_idle and time.monotonic() - self._begun >= self._patience
            return self._take() if is_late else []
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Stop reading."""
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            self._ready.get_nowait()

    def _run(self) -> None:
        try:
            for window in self._windows():
                if window:
                    self._put(window)
                if self._stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: list[Slot] | BaseException | None) -> None:
        self._ready.put(item)
        self._wake()

    def _windows(self) -> Iterator[list[Slot]]:
        index = 0
        try:
            for row in self._rows:
                if row is not None:
                    self._add(self._slot(index, row))
                    index += 1
                if row is None or len(self._window) >= WINDOW_ROWS or self._tokens >= _WINDOW_TOKENS:
                    yield self._take()
                if self._stopped.is_set():
                    return
        except ExlError:  # the input breaks off: answer what was read before
            yield self._take()
            raise
        yield self._take()

    def _add(self, slot: Slot) -> None:
        with self._lock:
            if not self._window:
                self._begun = time.monotonic()
            self._window.append(slot)
            self._tokens += 0 if slot.task is None else sum(len(request.ids) for request in slot.task.requests)

    def _take(self) -> list[Slot]:
        """End the window being read, which may be empty."""
        with self._lock:
            window, self._window, self._tokens = self._window, [], 0
        return self._sorted(window)

    def _slot(self, index: int, row: Row) -> Slot:
        try:
            return Slot(index, row, self._preparer.prepare(row))
        except Exception as error:  # even a bug must not stop the other rows
            return Slot(index, row, None, error)

    def _sorted(self, window: list[Slot]) -> list[Slot]:
        """Sort for prefix reuse: errors first, then groups of prompts with a common beginning, short prompts first."""
        if not self._is_sorted:
            return window
        failed = [slot for slot in window if slot.task is None]
        tasks = [(tuple(slot.task.requests[0].ids), slot) for slot in window if slot.task is not None]
        tasks.sort(key=lambda pair: (pair[0], pair[1].index))
        groups: list[list[tuple[tuple[int, ...], Slot]]] = []
        for ids, slot in tasks:
            if groups and groups[-1][-1][0][:_SHARED] == ids[:_SHARED]:
                groups[-1].append((ids, slot))
            else:
                groups.append([(ids, slot)])
        groups.sort(key=lambda group: len(group[0][0]))
        return [*failed, *(slot for group in groups for _, slot in group)]
