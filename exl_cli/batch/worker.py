"""A worker of a batch job on many engines: answers batches of rows with one engine, into its own part of the output.

`cluster` starts the workers and assigns batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.batch.job import Job, Progress
from exl_cli.batch.manifest import model_hash
from exl_cli.batch.output import AnswerFile, key_of
from exl_cli.batch.passes import load_engine, prepare
from exl_cli.batch.prompts import Settings
from exl_cli.batch.rows import Row, RowReader
from exl_cli.batch.windows import Options
from exl_cli.engines.base import Engine
from exl_cli.errors import EngineError, UsageError, brief
from exl_cli.models.info import inspect
from exl_cli.models.load_options import LoadOptions
from exl_cli.system.version import installed_version


@dataclass(frozen=True)
class Plan:
    """The configuration of a worker. Can be pickled.

    Attributes:
        model, model_path, model_hash: the model's name, folder and hash.
        version: exl's version on the driver.
        settings, loading, sequences, options: see `OneEngine` and `Job`.
        load: see `loader.load`.
    """

    model: str
    model_path: Path
    model_hash: str
    settings: Settings
    loading: LoadOptions
    sequences: int | None
    options: Options
    version: str = field(default_factory=installed_version)
    load: Callable[..., Engine] = loader.load


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows for a worker, by number and key. The worker reads them itself.

    Attributes:
        input: the input file.
        manifest: the output's manifest.
        indexes: row numbers in the input, from 0, ascending.
        keys: the same rows' keys.
    """

    input: Path
    manifest: Mapping[str, Any]
    indexes: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]


@dataclass
class Report:
    """A worker's progress with an input, and its notes since the last report."""

    progress: Progress
    notes: list[str]


class Worker:
    """One engine that answers batches. Its methods may be called from several threads."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._notes = plan, list[str]()
        self._lock = threading.Lock()
        self._open: _OpenPart | None = None
        self._progress = Progress()

    def ready(self) -> int:
        """Load the engine. To be called first. Returns the most sequences that it computes at once.

        Raises:
            UsageError: exl's version or the model here differs from the driver's.
            ExlError: the engine cannot be loaded.
        """
        plan = self._plan
        if plan.version != installed_version():
            raise UsageError(
                f"exl {plan.version} started the job, but this machine has {installed_version()}",
                "install the same version",
            )
        info = inspect(plan.model_path, plan.model)
        if model_hash(info) != plan.model_hash:
            raise UsageError(
                f"{plan.model_path} is a different model on this machine", "use the same model on all machines"
            )
        self._preparer, tokenizer = prepare(info, plan.settings, plan.loading)
        self._engine = load_engine(info, tokenizer, plan.loading, plan.sequences, plan.load, self)
        return self._engine.max_batch

    def answer(self, batch: Batch, part: Path) -> None:
        """Answer a batch; returns once the part has a line for every row of it.

        Raises:
            ExlError: see `Job.run`.
        """
        with self._lock:
            if self._open is None:
                self._progress = Progress()
                self._open = _OpenPart(batch, part, self._job)
            opened = self._open
            finished = opened.give(batch)
        finished.wait()
        if opened.error is not None:
            raise opened.error

    def _job(self, rows: _GivenRows, sink: _PartFile) -> Job:
        def engine() -> EngineThread:
            return self._engine

        return Job(rows, self._preparer, sink, engine, self, self._plan.options, self._progress)

    def report(self) -> Report:
        """Report on the input in progress."""
        notes, self._notes = self._notes, []
        return Report(self._progress, notes)

    def finish(self, *, stop: bool = False) -> Report:
        """Complete the rows given, or with `stop` abandon them, and close the part."""
        with self._lock:
            opened, self._open = self._open, None
        if opened is not None:
            opened.close(stop=stop)
        return self.report()

    def ignored(self) -> set[str]:
        """Names of fields in rows that were ignored as unknown."""
        return self._preparer.ignored

    # --- `job.View` and `loader.Observer` -------------------------------------------------------------------------

    def note(self, message: str) -> None:
        """Keep a line for the next report."""
        self._notes.append(message)

    def update(self, progress: Progress) -> None:
        """Do nothing: the driver polls `report`."""

    def progress(self, done: int, total: int) -> None:
        """Ignore the progress of loading."""


class _OpenPart:
    """A part of an output that is being written by a job in a thread; `error` is what ended the job, if anything."""

    def __init__(self, first: Batch, part: Path, job: Callable[[_GivenRows, _PartFile], Job]) -> None:
        self.error: BaseException | None = None
        self._rows = _GivenRows(first.input)
        self._sink = _PartFile(part, first.manifest)
        self._job = job(self._rows, self._sink)
        self._thread = threading.Thread(target=self._run, name="exl-batch-worker", daemon=True)
        self._thread.start()

    def give(self, batch: Batch) -> threading.Event:
        """Queue a batch. The event is set once it is answered or the job has failed."""
        finished = self._sink.expect(batch)
        self._rows.give(batch)
        if self.error is not None:
            self._sink.release()
        return finished

    def close(self, *, stop: bool) -> None:
        """Wait until all batches are answered, or with `stop` end the job; then join the thread."""
        if stop:
            self._job.stop()
        self._rows.give(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            try:
                self._job.run()
            finally:
                self._sink.close()
        except BaseException as error:
            self.error = error
        else:
            if self._job.is_stopped:
                self.error = EngineError("the job was stopped")
        self._sink.release()


class _GivenRows:
    """The rows of batches as they arrive; see `windows.Rows`."""

    def __init__(self, path: Path) -> None:
        self.name, self.before = str(path), 0
        self.expected: int | None = None
        self._reader = RowReader(path)
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()

    def give(self, batch: Batch | None) -> None:
        """Append a batch, or None to end the rows."""
        self._batches.put(batch)

    def __iter__(self) -> Iterator[Row | None]:
        while (batch := self._batches.get()) is not None:
            for index, key in zip(batch.indexes.tolist(), batch.keys.tolist(), strict=True):
                row = self._reader.read(index)
                if row is None or row.key != key:
                    raise UsageError(f"{brief(self.name)} has changed since the job began", "start the job again")
                yield row
            yield None


class _PartFile(AnswerFile):
    """A part of the output that signals when a batch is complete; see `Sink`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        super().__init__(path, manifest)
        self._expected: dict[int, _Expected] = {}
        self._guard = threading.Lock()

    def expect(self, batch: Batch) -> threading.Event:
        """Return an event that is set once all rows of a batch have a line."""
        expected = _Expected(len(batch.keys))
        with self._guard:
            self._expected.update(dict.fromkeys(batch.keys.tolist(), expected))
        return expected.finished

    def append(self, line: bytes) -> None:
        """See `Sink.append`."""
        super().append(line)
        with self._guard:
            expected = self._expected.pop(key_of(line), None)
        if expected is not None:
            expected.left -= 1
            if not expected.left:
                expected.finished.set()

    def release(self) -> None:
        """Set all events, as no more lines will come."""
        with self._guard:
            for expected in self._expected.values():
                expected.finished.set()


@dataclass(eq=False)
class _Expected:
    left: int
    finished: threading.Event = field(default_factory=threading.Event)
