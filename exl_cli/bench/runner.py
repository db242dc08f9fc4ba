"""A whole benchmark: one worker after the other, their events made into a `Result`."""

from __future__ import annotations

import dataclasses
import json
import pickle
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from exl_cli import loader
from exl_cli.bench import limits, perplexity, plan, worker
from exl_cli.bench.plan import Job, Settings
from exl_cli.bench.result import Memory, Perplexity, Probe, Result, Run, Sample, read
from exl_cli.engines.base import Engine
from exl_cli.errors import EngineError, ExitCode, ExlError, param
from exl_cli.models import folders
from exl_cli.models.load_options import LoadOptions
from exl_cli.sampling import Sampling
from exl_cli.system import processes
from exl_cli.system.version import installed_version

# A share of a limit that no noise in measuring the two explains.
_IMPOSSIBLE = 1.05


@dataclass(frozen=True)
class Progress:
    """Where a benchmark is."""

    what: str  # what is running
    done: int  # repetitions, the untimed ones included, as in `total`
    total: int
    eta_seconds: float | None  # until the last repetition; known once all tests of a model have been run


class Observer(Protocol):
    """Shows how a benchmark is going."""

    def note(self, message: str) -> None:
        """Something worth telling."""
        ...

    def update(self, progress: Progress) -> None:
        """It has come further."""
        ...


def jobs(
    models: Sequence[str | None],
    models_dir: Path | None,
    loadings: Sequence[LoadOptions],
    settings: Settings,
    sampling: Sampling,
    text: Path | None,
) -> list[Job]:
    """A job for each model and cache type, checked before anything is measured.

    Raises:
        ExlError: a model that is not here or cannot be read, a context that no test fits into, an unreadable text.
    """
    tests = plan.grid(settings)
    if text is not None:
        perplexity.read(text)
    for model in models:
        info = loader.resolve(model, models_dir)
        plan.fitting(tests, loadings[0].max_seq_len or info.context_length, info.name)
    loadings = [loader.with_draft(loading, models_dir) for loading in loadings]
    paths = [None if path is None else str(path) for path in (models_dir, text)]
    return [Job(model, paths[0], loading, settings, sampling, paths[1]) for model in models for loading in loadings]


def run(
    jobs: Sequence[Job], load: Callable[..., Engine], observer: Observer, *, debug: bool = False
) -> tuple[Result, ExlError | None]:
    """Do all jobs.

    Args:
        jobs: in the order in which they are done.
        load: `loader.load`, which a worker process calls; another function is called here, without cold figures.
        observer: shows how it goes.
        debug: let workers write to this process's stderr.

    Returns:
        What was measured, its `partial` saying why if something is missing; and the error that ended it early, None
        where it was interrupted.
    """
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    result = Result(installed_version(), jobs[0].settings, jobs[0].sampling.to_dict(), started)
    begin = time.monotonic()
    collector = _Collector(jobs, result, observer)
    failure = None
    try:
        for job in jobs:
            if collector.repeats(job):
                continue
            collector.start(job)
            if load is loader.load:
                for event in _spawn(job, debug):
                    collector.receive(**event)
            else:
                worker.run(job, load, collector.receive)
    except KeyboardInterrupt:
        result.partial = "interrupted"
    except ExlError as error:
        result.partial, failure = error.message, error
    result.seconds = time.monotonic() - begin
    for measured in result.runs:
        measured.tests = [entry for entry in measured.tests if entry.samples]
    result.runs = [measured for measured in result.runs if measured.cold or measured.tests]
    return result, failure


def _spawn(job: Job, debug: bool) -> Iterator[dict[str, Any]]:
    """The events of a worker process, which Ctrl-C at the terminal does not reach but through us."""
    with tempfile.TemporaryFile() as order, tempfile.TemporaryFile() as noise:
        pickle.dump(dataclasses.replace(job, spawned=time.monotonic()), order)
        order.seek(0)
        process = subprocess.Popen(  # noqa: S603 - this interpreter, and this program's own code
            processes.command("exl_cli.bench.worker"),
            stdin=order,
            stdout=subprocess.PIPE,
            stderr=None if debug else noise,
            start_new_session=True,
            encoding="utf-8",
        )
        try:
            for line in process.stdout or ():
                event = json.loads(line)
                if event["event"] == "error":
                    error = ExlError(event["message"], event["hint"])
                    error.exit_code = ExitCode(event["exit_code"])
                    raise error
                yield event
            if process.wait() != 0:
                noise.seek(0)
                raise _crashed(job, process.returncode, noise.read().decode("utf-8", "replace"))
        finally:
            processes.stop(process)


def _crashed(job: Job, code: int, noise: str) -> EngineError:
    lines = [line.strip() for line in noise.splitlines() if line.strip()]
    name, debug = job.model or folders.BUILTIN, param("debug")
    if code < 0:
        hint = "the system may have run out of memory" if -code == signal.SIGKILL else f"see {debug}"
        return EngineError(f"the process that measured {name} was ended by {signal.Signals(-code).name}", hint)
    last = f": {lines[-1]}" if lines else ""
    return EngineError(f"the process that measured {name} failed{last}", f"run again with {debug} to see where")


class _Collector:
    """Makes runs of events, and estimates the time that is left. Its methods `_on_…` take `worker.run`'s events."""

    def __init__(self, jobs: Sequence[Job], result: Result, observer: Observer) -> None:
        self._result = result
        self._observer = observer
        self._repetitions = 1 + jobs[0].settings.repetitions
        self._jobs_left = len(jobs)
        self._tests = len(plan.grid(jobs[0].settings))
        self._done = 0
        self._total = len(jobs) * self._tests * self._repetitions
        self._seconds: dict[str, float] = {}
        self._left: dict[str, int] = {}
        self._job: Job | None = None
        self._label = ""
        self._notes: set[str] = set()

    def repeats(self, job: Job) -> bool:
        """Whether a job differs from the last one in the cache type only, which the last one's engine does not have."""
        last, runs = self._job, self._result.runs
        if last is None or last.model != job.model or "cache" in runs[-1].engine:
            return False
        self._jobs_left -= 1
        self._total -= self._tests * self._repetitions
        cache = f"cache {job.loading.cache} left out for {job.model or folders.BUILTIN}"
        self._skip(f"{cache}: the {runs[-1].engine['name']} engine keeps its KV cache in {runs[-1].cache}")
        return True

    def start(self, job: Job) -> None:
        """The next job."""
        self._job = job
        self._jobs_left -= 1
        self._label = job.model or folders.BUILTIN
        self._seconds, self._left = {}, {}

    def receive(self, event: str, **fields: Any) -> None:
        """An event of the job that is under way."""
        getattr(self, f"_on_{event}")(**fields)

    def _on_note(self, text: str) -> None:
        if text not in self._notes:  # each worker says it again
            self._notes.add(text)
            self._observer.note(text)

    def _on_stage(self, text: str) -> None:
        self._tell(text)

    def _on_loaded(self, run: Any, skipped: list[str], environment: dict[str, Any]) -> None:
        run = read(Run, run)
        self._result.environment = self._result.environment or environment
        self._result.runs.append(run)
        for reason in skipped:
            self._skip(reason)
        self._total += (len(run.tests) - self._tests) * self._repetitions * (1 + self._jobs_left)
        self._tests = len(run.tests)
        self._left = {entry.test.name: self._repetitions - 1 for entry in run.tests}
        if run.cold is not None:
            self._done += 1  # the first generation counts as the untimed one of its test

    def _on_warmed(self, test: str, seconds: float) -> None:
        self._done += 1
        self._seconds[test] = seconds

    def _on_sample(self, test: str, seconds: float, sample: Any, time: str, memory: Any) -> None:
        self._on_warmed(test, seconds)
        self._left[test] -= 1
        run = self._result.runs[-1]
        entry = next(entry for entry in run.tests if entry.test.name == test)
        entry.samples.append(read(Sample, sample))
        entry.time = entry.time or time
        run.memory = run.memory.union(read(Memory, memory))
        self._result.order.append(test)

    def _on_finished(
        self, memory: Any, warnings: list[str], others_cpu: float | None, perplexity: Any, probe: Any, traces: Any
    ) -> None:
        run = self._result.runs[-1]
        run.memory = run.memory.union(read(Memory, memory))
        run.probe = probe and read(Probe, probe)
        run.perplexity = perplexity and read(Perplexity, perplexity)
        run.others_cpu = others_cpu
        for entry in run.tests:
            entry.kernel_ns, entry.kernels = traces.get(entry.test.name) or (None, None)
        self._result.warnings += [f"{run.where}: {warning}" for warning in [*warnings, *_doubts(run)]]

    def _skip(self, reason: str) -> None:
        if reason not in self._result.skipped:
            self._result.skipped.append(reason)
            self._observer.note(reason)

    def _tell(self, what: str) -> None:
        eta = None
        if any(self._left.values()) and all(name in self._seconds for name in self._left):
            round_seconds = sum(self._seconds[name] for name in self._left)
            left = sum(self._seconds[name] * count for name, count in self._left.items())
            eta = left + self._jobs_left * self._repetitions * round_seconds
        self._observer.update(Progress(f"{self._label}: {what}", self._done, self._total, eta))


def _doubts(run: Run) -> list[str]:
    """What the samples themselves give away."""
    doubts = []
    for entry in run.tests:
        if reused := sum(sample.reused_tokens for sample in entry.samples):
            doubts.append(f"{entry.test.name} is too fast: {reused} prompt tokens were not computed but reused")
        limit = limits.limit(run, entry)
        if limit is not None and limit.share > _IMPOSSIBLE:
            doubts.append(f"{entry.test.name} beats its limit, which was measured too low: do not trust its share")
    if limits.disturbed(run):
        doubts.append(f"other programs kept {run.others_cpu:.1f} cores busy meanwhile")
    return doubts
