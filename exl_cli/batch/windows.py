"""The rows of a batch job's input that have no answer yet, as windows of tasks, sorted for the engine.

A window is read and turned into requests while the engine computes the one before it; the whole input is never in
memory. Where several jobs share the work, each takes the rows whose key falls to it: nothing else decides who answers
what, and each writes its own output.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from exl_cli.api.bodies import BodyError
from exl_cli.batch.output import KeySet
from exl_cli.batch.prompts import Preparer, Task
from exl_cli.batch.rows import Row, Source
from exl_cli.errors import ExlError, brief

# A window ends with so many rows, or once its prompts have so many tokens.
WINDOW_ROWS = 2048
_WINDOW_TOKENS = 1 << 20
# Prompts that have so many first tokens in common belong together.
_SHARED = 32


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
class Slot:
    """A row of a window: its place among the rows to answer, and its task, or why there is none."""

    index: int
    row: Row
    task: Task | None
    error: BaseException | None = None


class Rows(Protocol):
    """Rows to answer.

    Attributes:
        name: of the input, for messages.
        before: rows left out so far, as they are answered.
    """

    name: str
    before: int

    @property
    def expected(self) -> int | None:
        """How many there are, those left out included, as far as can be told."""
        ...

    def __iter__(self) -> Iterator[Row | None]:
        """The rows; None where more may be long in coming, so that what is there is not to wait for them."""
        ...


class Pending:
    """The rows of an input that are to be answered: those of this job's share, without an answer, for its model.

    Args:
        source: the input.
        answered: keys of rows to leave out.
        options: of the job.
        select: the row as it is to be answered; None to leave it to another job.

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
        """The rows, each with its place among all rows of the input, from 0."""
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
    """A row whose custom_id an earlier one has: it is known by its line."""
    error = BodyError(f"custom_id {brief(row.custom_id)!r} is that of an earlier line", code="duplicate_custom_id")
    return Row(row.number, f"line-{row.number}", row.line_key, row.line_key, row.record, error=error)


class Windows:
    """Reads rows in a thread, a window ahead of the engine.

    Args:
        rows: the rows to answer; None among them ends a window.
        preparer: turns them into tasks.
        wake: called when `poll` has something.
        is_sorted: sort each window.
    """

    def __init__(self, rows: Rows, preparer: Preparer, wake: Callable[[], None], *, is_sorted: bool = True) -> None:
        self._rows, self._preparer, self._is_sorted = rows, preparer, is_sorted
        self._ready: queue.Queue[list[Slot] | BaseException | None] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        self._wake = wake
        threading.Thread(target=self._run, name="exl-batch-input", daemon=True).start()

    def poll(self) -> list[Slot] | None:
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

    def _put(self, item: list[Slot] | BaseException | None) -> None:
        self._ready.put(item)
        self._wake()

    def _windows(self) -> Iterator[list[Slot]]:
        window: list[Slot] = []
        tokens = index = 0
        try:
            for row in self._rows:
                if row is not None:
                    slot = self._slot(index, row)
                    window.append(slot)
                    index += 1
                    tokens += 0 if slot.task is None else sum(len(request.ids) for request in slot.task.requests)
                if window and (row is None or len(window) >= WINDOW_ROWS or tokens >= _WINDOW_TOKENS):
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

    def _slot(self, index: int, row: Row) -> Slot:
        try:
            return Slot(index, row, self._preparer.prepare(row))
        except Exception as error:  # of a bug, too: the other rows have theirs
            return Slot(index, row, None, error)

    def _sorted(self, window: list[Slot]) -> list[Slot]:
        """Errors first; then shared beginnings side by side, and among these groups the short prompts first."""
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
