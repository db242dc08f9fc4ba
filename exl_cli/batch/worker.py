"""A worker of a batch job that many engines share: one engine, which answers the batches it is given into its own part
of the output. What starts workers and gives them batches is in `cluster`."""

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
    """What a worker is to be; can be pickled.

    Attributes:
        model, model_path, model_hash: the model.
        version: of exl.
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
    """Rows for a worker, by their places and keys.

    Attributes:
        input: the file that they are in.
        manifest: of the output.
        indexes: of the rows among all of the input, ascending.
        keys: of the same.
    """

    input: Path
    manifest: Mapping[str, Any]
    indexes: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]


@dataclass
class Report:
    """How far a worker is with an input, and what there is to tell."""

    progress: Progress
    notes: list[str]


class Worker:
    """An engine that answers batches; its methods are called from several threads.

    Args:
        plan: what it is to be.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._notes = plan, list[str]()
        self._lock = threading.Lock()
        self._open: _OpenPart | None = None
        self._progress = Progress()

    def ready(self) -> int:
        """Load the engine, before anything else is asked of it; returns how many sequences it computes at once.

        Raises:
            UsageError: exl or the model here is another than where the job was started.
            ExlError: the engine cannot be loaded.
        """
        plan = self._plan
        if plan.version != installed_version():
            raise UsageError(f"exl {plan.version} started the job, here is {installed_version()}", "install the same")
        info = inspect(plan.model_path, plan.model)
        if model_hash(info) != plan.model_hash:
            raise UsageError(f"{plan.model_path} is another model here", "put the same on all machines")
        self._preparer, tokenizer = prepare(info, plan.settings, plan.loading)
        self._engine = load_engine(info, tokenizer, plan.loading, plan.sequences, plan.load, self)
        return self._engine.max_batch

    def answer(self, batch: Batch, part: Path) -> None:
        """Answer a batch; returns once all its rows have a line in the part.

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
        """How far it is with the input under way."""
        notes, self._notes = self._notes, []
        return Report(self._progress, notes)

    def finish(self, *, stop: bool = False) -> Report:
        """Close the part; with `stop` without the answers that are not complete yet."""
        with self._lock:
            opened, self._open = self._open, None
        if opened is not None:
            opened.close(stop=stop)
        return self.report()

    def ignored(self) -> set[str]:
        """Names of fields that no setting goes by."""
        return self._preparer.ignored

    # --- of the job and the load, see `View` and `loader.Observer` ------------------------------------------------

    def note(self, message: str) -> None:
        """Keep a line for the next report."""
        self._notes.append(message)

    def update(self, progress: Progress) -> None:
        """Reports are asked for."""

    def progress(self, done: int, total: int) -> None:
        """Of a load: nobody sees it."""


class _OpenPart:
    """A part of an output that is being written.

    Attributes:
        error: that ended it.
    """

    def __init__(self, first: Batch, part: Path, job: Callable[[_GivenRows, _PartFile], Job]) -> None:
        self.error: BaseException | None = None
        self._rows = _GivenRows(first.input)
        self._sink = _PartFile(part, first.manifest)
        self._job = job(self._rows, self._sink)
        self._thread = threading.Thread(target=self._run, name="exl-batch-worker", daemon=True)
        self._thread.start()

    def give(self, batch: Batch) -> threading.Event:
        """Have a batch answered; the event says when it is, or when there was an error."""
        finished = self._sink.expect(batch)
        self._rows.give(batch)
        if self.error is not None:
            self._sink.release()
        return finished

    def close(self, *, stop: bool) -> None:
        """Wait for the end of what was given, or end it."""
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
    """The rows of batches as they are given; see `windows.Rows`."""

    def __init__(self, path: Path) -> None:
        self.name, self.before = str(path), 0
        self.expected: int | None = None
        self._reader = RowReader(path)
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()

    def give(self, batch: Batch | None) -> None:
        """A batch more, or the end."""
        self._batches.put(batch)

    def __iter__(self) -> Iterator[Row | None]:
        while (batch := self._batches.get()) is not None:
            for index, key in zip(batch.indexes.tolist(), batch.keys.tolist(), strict=True):
                row = self._reader.read(index)
                if row is None or row.key != key:
                    raise UsageError(f"{brief(self.name)} has changed since the job began", "start it again")
                yield row
            yield None


class _PartFile(AnswerFile):
    """A part, which tells when a batch is complete; see `Sink`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        super().__init__(path, manifest)
        self._expected: dict[int, _Expected] = {}
        self._guard = threading.Lock()

    def expect(self, batch: Batch) -> threading.Event:
        """An event for when all rows of a batch have a line."""
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
        """Nothing more comes: let nobody wait for it."""
        with self._guard:
            for expected in self._expected.values():
                expected.finished.set()


@dataclass(eq=False)
class _Expected:
    left: int
    finished: threading.Event = field(default_factory=threading.Event)
