"""A batch job on many engines, here or on a cluster, through Ray (https://docs.ray.io).

Each node runs one actor per GPU (or per model's share of GPUs), or actors on its CPU, each with an engine. The driver
reads the input and sends out row numbers and keys, never texts. An actor reads its rows from the input itself and
appends the answers to its own part of the output. If an actor is lost, its part remains, and the rows missing from it
go to other actors.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exl_cli import loader
from exl_cli.batch.job import LinesFailedError, Progress, View
from exl_cli.batch.manifest import model_hash
from exl_cli.batch.output import AnswerFile, Sink
from exl_cli.batch.prompts import Settings, error_line
from exl_cli.batch.rows import Row, RowReader
from exl_cli.batch.windows import Options, Pending
from exl_cli.batch.worker import Batch, Plan, Report, Worker
from exl_cli.engines.base import Engine
from exl_cli.errors import DeviceError, EngineError, ExlError, UsageError, brief, param
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.system.units import counted

# Batches in flight per actor: while the engine computes one, the next is read and turned into requests.
_IN_FLIGHT = 2
# Rows of a batch.
_SMALLEST, _LARGEST = 16, 1024
# A batch is an actor's even share of the rows left, divided by this, within limits: batches shrink towards the end, and
# all actors finish at about the same time.
_SHARE = 4
# Interval of looking for new nodes, and of reports.
_NODES_SECONDS, _REPORT_SECONDS = 3.0, 1.0
# How long actors may take to close their parts.
_CLOSE_SECONDS = 60.0
# A row is given up when more than this many actors were lost with it; the job fails at this many losses in a row.
_ROW_LOSSES, _MOST_LOSSES = 2, 8


@dataclass(frozen=True)
class Where:
    """Where a job's engines run.

    Attributes:
        address: of a Ray cluster, or "auto" for one that runs here; None for this machine alone.
        engines: most engines; None for one per GPU, or per node without GPUs.
    """

    address: str | None = None
    engines: int | None = None


@dataclass(eq=False)
class _Task:
    """A batch, and how often it was lost."""

    batch: Batch
    losses: int = 0


@dataclass(eq=False)
class _Member:
    """An actor.

    Attributes:
        actor: Ray's handle.
        node: id of its node.
        name: for messages.
        ready: reference of the call that loads its engine.
        part: file of its answers; None before the first batch of an input.
        at_once: most sequences that it computes at once; 0 until its engine is loaded.
        tasks: batches in flight, by the reference of their call.
        report: its latest report.
        reporting: reference of the call for the next report; None if there is none.
    """

    actor: Any
    node: str
    name: str
    ready: Any
    part: Path | None = None
    at_once: int = 0
    tasks: dict[Any, _Task] = field(default_factory=dict)
    report: Report = field(default_factory=lambda: Report(Progress(), []))
    reporting: Any = None


class RayEngines:
    """Engines in Ray actors; see `passes.Engines`.

    Args:
        where: where they run.
        settings, loading, sequences, load: see `worker.Plan`.

    Attributes:
        is_stopped: see `Engines`.
        ignored: names of fields in rows that were ignored as unknown.

    Raises:
        UsageError: Ray is not installed.
    """

    def __init__(
        self,
        where: Where,
        settings: Settings,
        loading: LoadOptions,
        sequences: int | None,
        load: Callable[..., Engine] = loader.load,
    ) -> None:
        # Before the import: turn off Ray's usage statistics.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UsageError(
                "several engines need Ray, which is not installed", "run pip install 'exl-cli[ray]'"
            ) from None
        self._ray: Any = ray
        self._where, self._settings, self._loading = where, settings, loading
        self._sequences, self._load = sequences, load
        self._members: list[_Member] = []
        self._plan: Plan | None = None
        self._excluded: set[str] = set()
        self._count = self._losses = 0
        self._gpus_per_engine = 1
        self._looked_at = self._reported_at = 0.0
        self._noted: set[str] = set()
        self._owns_cluster = False
        self.ignored: set[str] = set()
        self.is_stopped = False

    def stop(self) -> None:
        """See `Engines.stop`. May be called from a signal handler."""
        self.is_stopped = True

    def close(self) -> None:
        """Kill the actors, and shut down Ray if it was started for them."""
        if self._ray.is_initialized():
            for member in self._members:
                self._kill(member)
            if self._owns_cluster:
                self._ray.shutdown()
        self._members.clear()

    def answer(
        self, rows: Pending, model: ModelInfo, sink: Sink, view: View, options: Options, progress: Progress
    ) -> None:
        """See `Engines.answer`."""
        if not isinstance(sink, AnswerFile):
            raise UsageError("several engines cannot write to stdout", f"pass a file to {param('output')}")
        run = _Run(rows, sink, view, options, progress)
        is_complete = False
        try:
            if run.has_more(_SMALLEST):
                self._use(model, options)
            while not self.is_stopped and (run.has_more(_SMALLEST) or any(member.tasks for member in self._members)):
                self._populate(run)
                self._dispatch(run)
                self._wait(run)
            is_complete = not self.is_stopped
        finally:
            self._finish(run, stop=not is_complete)
        if is_complete and run.unreadable is not None:
            raise run.unreadable

    # --- the cluster ----------------------------------------------------------------------------------------------

    def _use(self, model: ModelInfo, options: Options) -> None:
        """Switch to a model: kill the actors of another."""
        self._connect()
        path = model.path.absolute()
        if self._plan is not None and self._plan.model_path == path:
            return
        for member in self._members:
            self._kill(member)
        self._members.clear()
        self._excluded.clear()
        self._gpus_per_engine = loader.gpus_per_engine(model, self._loading)
        self._plan = Plan(
            model.name,
            path,
            model_hash(model),
            self._settings,
            self._loading,
            self._sequences,
            options,
            load=self._load,
        )

    def _connect(self) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        try:
            if self._where.address is None:
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                ray.init(address=self._where.address, **quiet)
        except Exception as error:  # its kinds differ by what is wrong
            where = self._where.address or "local"
            reason = brief(str(error).strip().partition("\n")[0])
            raise UsageError(f"{param('ray')} {where}: {reason}", "start a cluster with ray start --head") from error
        self._owns_cluster = True
        gpus = int(ray.cluster_resources().get("GPU", 0))
        wanted = self._where.engines
        if self._where.address is None and self._loading.engine != "cpu" and wanted and 0 < gpus < wanted:
            raise UsageError(f"{param('gpus')} {wanted}: this machine has {gpus} GPUs", f"use {param('gpus')} all")

    def _populate(self, run: _Run) -> None:
        """Start actors wherever there is room, including nodes that joined since."""
        if time.monotonic() < self._looked_at + _NODES_SECONDS or not run.has_more(_SMALLEST):
            return
        self._looked_at = time.monotonic()
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in self._excluded]
        for node in nodes:
            room, resources = self._room(node["Resources"], len(nodes))
            here = sum(member.node == node["NodeID"] for member in self._members)
            for _ in range(here, room):
                if self._where.engines and len(self._members) >= self._where.engines:
                    return
                self._start(node, resources)

    def _room(self, resources: dict[str, float], nodes: int) -> tuple[int, dict[str, float]]:
        """The number of engines for a node, and the resources of each."""
        each = self._gpus_per_engine
        gpus = int(resources.get("GPU", 0))
        if gpus and self._loading.engine != "cpu":
            return gpus // each, {"num_gpus": each, "num_cpus": 1}
        cores = int(resources.get("CPU", 0))
        count = min(cores, -(-(self._where.engines or nodes) // nodes))
        # Ray sets OMP_NUM_THREADS to num_cpus, which limits torch's threads.
        return count, {"num_cpus": max(1, cores // max(count, 1)), "num_gpus": 0}

    def _start(self, node: dict[str, Any], resources: dict[str, float]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        actor_class = self._ray.remote(Worker)
        actor = actor_class.options(
            scheduling_strategy=here, max_concurrency=_IN_FLIGHT + 3, max_restarts=0, **resources
        ).remote(self._plan)
        self._count += 1
        name = f"engine {self._count} on {node['NodeManagerHostname']}"
        self._members.append(_Member(actor, node["NodeID"], name, actor.ready.remote()))

    def _kill(self, member: _Member) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(member.actor)

    # --- the work -------------------------------------------------------------------------------------------------

    def _dispatch(self, run: _Run) -> None:
        loaded = [member for member in self._members if member.at_once]
        for _ in range(_IN_FLIGHT):
            for member in loaded:
                if len(member.tasks) >= _IN_FLIGHT or any(task.losses for task in member.tasks.values()):
                    continue
                task = run.next_task(member.at_once, max(len(self._members), 1), alone=not member.tasks)
                if task is None:
                    continue
                if member.part is None:
                    member.part = run.sink.part(f"{os.uname().nodename}-{os.getpid()}-{time.time_ns():x}")
                member.tasks[member.actor.answer.remote(task.batch, member.part)] = task

    def _wait(self, run: _Run) -> None:
        waiting: dict[Any, _Member] = {}
        for member in self._members:
            if not member.at_once:
                waiting[member.ready] = member
            waiting.update(dict.fromkeys(member.tasks, member))
            if member.reporting is not None:
                waiting[member.reporting] = member
        if not waiting:
            run.show(self._members)
            time.sleep(_REPORT_SECONDS)
            return
        done, _ = self._ray.wait([*waiting], num_returns=1, timeout=_REPORT_SECONDS)
        for reference in done:
            if (member := waiting[reference]) in self._members:
                self._receive(reference, member, run)
        if time.monotonic() >= self._reported_at + _REPORT_SECONDS:
            self._reported_at = time.monotonic()
            for member in self._members:
                if member.at_once and member.reporting is None:
                    member.reporting = member.actor.report.remote()
            run.sink.tick()
            run.show(self._members)

    def _receive(self, reference: Any, member: _Member, run: _Run) -> None:
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if reference == member.ready and isinstance(cause, ExlError):
                self._exclude(member, cause, run)
            elif isinstance(cause, DeviceError):
                self._lose(member, str(cause), run)
            else:
                raise cause from None
        except self._ray.exceptions.RayError as error:
            self._lose(member, _first_sentence(error), run)
        else:
            if reference == member.ready:
                member.at_once = value
                run.begin()
            elif reference == member.reporting:
                member.reporting = None
                self._note(member, value, run)
            else:
                del member.tasks[reference]
                self._losses = 0

    def _note(self, member: _Member, report: Report, run: _Run) -> None:
        member.report = report
        for line in report.notes:
            if line not in self._noted:
                self._noted.add(line)
                run.view.note(f"{member.name}: {line}")

    def _exclude(self, member: _Member, error: ExlError, run: _Run) -> None:
        """Exclude a node on which the engine cannot be loaded; raise the error if no node is left."""
        self._members.remove(member)
        self._kill(member)
        self._excluded.add(member.node)
        nodes = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        if not self._members and nodes <= self._excluded:
            raise error
        run.view.note(f"excluding {member.name}: {error}")

    def _lose(self, member: _Member, reason: str, run: _Run) -> None:
        """Handle the loss of an actor: merge its part, and give the rows that it did not answer to others."""
        self._members.remove(member)
        self._kill(member)
        if member.part is not None:
            run.take_in(member.part, member.report)
        left = sum(run.put_back(task) for task in member.tasks.values())
        run.view.note(f"{member.name} was lost ({reason}); other engines take over {counted(left, 'line')}")
        self._losses += 1
        self._looked_at = 0.0
        if self._losses >= _MOST_LOSSES:
            raise EngineError(f"{self._losses} engines in a row were lost, the last with: {reason}", "see Ray's logs")

    def _finish(self, run: _Run, *, stop: bool) -> None:
        """Have the actors close their parts, and merge these into the output."""
        closing = {member.actor.finish.remote(stop=stop): member for member in self._members if member.part}
        deadline = time.monotonic() + _CLOSE_SECONDS
        while closing and (left := deadline - time.monotonic()) > 0:
            done, _ = self._ray.wait([*closing], timeout=left)
            for reference in done:
                member = closing.pop(reference)
                try:
                    self._note(member, self._ray.get(reference), run)
                    self.ignored |= self._ray.get(member.actor.ignored.remote())
                except self._ray.exceptions.RayError:
                    self._members.remove(member)
        for member in closing.values():
            self._kill(member)
            self._members.remove(member)
        for member in self._members:
            member.tasks.clear()
            member.reporting = None
            if member.part is not None:
                run.take_in(member.part, member.report)
                member.part, member.report = None, Report(Progress(), [])
        for part in run.sink.parts():  # of actors that were lost with them still in use
            run.take_in(part, Report(Progress(), []))
        run.show([])


class _Run:
    """The work on one input: rows not given out yet, and the progress of those that were.

    Args:
        rows, sink, view, options, progress: see `Engines.answer`.

    Attributes:
        unreadable: why the input could not be read to its end.
    """

    def __init__(self, rows: Pending, sink: AnswerFile, view: View, options: Options, progress: Progress) -> None:
        self.sink, self.view = sink, view
        self._rows, self._options, self._progress = rows, options, progress
        self._numbered: Iterator[tuple[int, Row]] | None = rows.numbered()
        self.unreadable: ExlError | None = None
        self._read: deque[tuple[int, int]] = deque()
        self._again: deque[_Task] = deque()
        self._before = progress.before
        # Progress of merged parts and of the driver itself; reports of the actors in use are added to it.
        self._settled = Progress(
            progress.answered, progress.failed, 0, None, progress.prompt_tokens, progress.new_tokens
        )
        self._settled.joules = progress.joules
        self._begun = False

    def begin(self) -> None:
        """Start the clock, when the first engine is loaded."""
        if not self._begun and not self._progress.answered:
            self._progress.started = time.monotonic()
        self._begun = True

    def has_more(self, count: int) -> bool:
        """Whether there are rows to give out; reads up to this many ahead."""
        self._read_ahead(count)
        return bool(self._read or self._again)

    def next_task(self, at_once: int, members: int, *, alone: bool) -> _Task | None:
        """The next batch for an actor; None if there is none for it now.

        Args:
            at_once: most sequences that it computes at once.
            members: number of actors.
            alone: whether the actor is idle. Only idle ones get batches that were lost before: if such a batch kills
                its actor, no other batch is lost with it.
        """
        if self._again:
            return self._again.popleft() if alone else None
        left = (self._rows.expected or 0) - self._rows.before - self._done()
        size = max(min(left // (_SHARE * members), _LARGEST), min(2 * at_once, _LARGEST), _SMALLEST)
        self._read_ahead(size)
        if not self._read:
            return None
        chosen = [self._read.popleft() for _ in range(min(size, len(self._read)))]
        indexes = np.array([index for index, _ in chosen], np.int64)
        keys = np.array([key for _, key in chosen], np.uint64)
        return _Task(Batch(Path(self._rows.name).absolute(), self.sink.manifest, indexes, keys))

    def put_back(self, task: _Task) -> int:
        """Requeue the unanswered rows of a lost batch, in halves: if one row kills actors, bisection isolates it.

        Returns:
            The number of rows requeued.
        """
        batch = task.batch
        is_left = np.array([int(key) not in self.sink.answered for key in batch.keys], bool)
        indexes, keys = batch.indexes[is_left], batch.keys[is_left]
        losses = task.losses + 1
        if len(keys) == 1 and losses > _ROW_LOSSES and len(batch.keys) == 1:
            row = RowReader(batch.input).read(int(indexes[0]))
            if row is not None:
                self._fail(row, EngineError(f"{losses} engines were lost while processing it"))
            return 0
        half = (len(keys) + 1) // 2
        for some in (slice(0, half), slice(half, None)):
            if len(keys[some]):
                self._again.append(_Task(Batch(batch.input, batch.manifest, indexes[some], keys[some]), losses))
        return len(keys)

    def take_in(self, part: Path, report: Report) -> None:
        """Merge an actor's part into the output, and its last report into the progress."""
        with contextlib.suppress(UsageError):  # a process still writes to it: `_finish` tries again
            if part.exists():
                answered, failed = self.sink.take_in(part)
                self._settled.answered += answered
                self._settled.failed += failed
        self._settled.prompt_tokens += report.progress.prompt_tokens
        self._settled.new_tokens += report.progress.new_tokens
        if report.progress.joules is not None:
            self._settled.joules = (self._settled.joules or 0.0) + report.progress.joules

    def show(self, members: list[_Member]) -> None:
        """Update the view."""
        reports = [self._settled, *(member.report.progress for member in members)]
        progress = self._progress
        progress.answered = sum(report.answered for report in reports)
        progress.failed = sum(report.failed for report in reports)
        progress.prompt_tokens = sum(report.prompt_tokens for report in reports)
        progress.new_tokens = sum(report.new_tokens for report in reports)
        joules = [report.joules for report in reports if report.joules is not None]
        progress.joules = sum(joules) if joules else None
        progress.before = self._before + self._rows.before
        progress.expected = self._rows.expected
        self.view.update(progress)

    def _done(self) -> int:
        return self._progress.answered + self._progress.failed

    def _read_ahead(self, count: int) -> None:
        """Read until this many rows can be given out. Unusable rows get their error as an answer at once."""
        while self._numbered is not None and len(self._read) < count:
            try:
                index, row = next(self._numbered)
            except StopIteration:
                self._numbered = None
            except ExlError as error:  # the input breaks off: answer what was read before
                self._numbered, self.unreadable = None, error
            else:
                if row.error is None:
                    self._read.append((index, row.key))
                else:
                    self._fail(row, row.error)

    def _fail(self, row: Row, error: ExlError) -> None:
        if self._options.strict:
            raise LinesFailedError.of(self._rows.name, row, error)
        self.sink.append(error_line(row, error, flat=self._options.flat))
        self.sink.answered.add(row.key)
        self._settled.failed += 1


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Where an actor could not be made, Ray puts the traceback behind its own sentence.
    return brief(lines[-1 if "creation task" in lines[0] else 0].rstrip("."))
