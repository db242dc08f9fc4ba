"""A whole benchmark: one worker after the other, their events made into a `Result`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from exl_cli import loader
from exl_cli.bench import limits, worker
from exl_cli.bench.job import Job
from exl_cli.bench.measure import Sample
from exl_cli.bench.plan import Case, grid
from exl_cli.bench.result import Cold, Measured, Memory, Perplexity, Probe, Result, Run
from exl_cli.bench.worker import Event
from exl_cli.engines.base import Engine
from exl_cli.errors import EngineError, ExitCode, ExlError
from exl_cli.models import folders

# The child finds modules where its parent does, wherever it was started.
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from exl_cli.bench.worker import main; main()"
_PATIENCE_SECONDS = 5.0

# A share of a limit that no noise in measuring the two explains.
_IMPOSSIBLE = 1.05


@dataclass(frozen=True)
class Progress:
    """Where a benchmark is.

    Attributes:
        what: what is running.
        done, total: repetitions, the untimed ones included.
        eta_seconds: until the last repetition, once all of a model's tests have been run; None where it is not known.
    """

    what: str
    done: int
    total: int
    eta_seconds: float | None


class Observer(Protocol):
    """Whoever wants to know how a benchmark is going."""

    def note(self, message: str) -> None:
        """Something worth telling."""
        ...

    def update(self, progress: Progress) -> None:
        """It has come further."""
        ...


def run(
    jobs: Sequence[Job], load: Callable[..., Engine], result: Result, observer: Observer, *, debug: bool = False
) -> ExlError | None:
    """Do all jobs and put what they find into `result`, whose `partial` says why, if something is missing.

    Args:
        jobs: in the order in which they are done.
        load: `loader.load`, which a worker of its own calls; another function is called here, without cold figures.
        result: is filled.
        observer: is told how it goes.
        debug: let workers write to this process's stderr.

    Returns:
        What ended it early; None also where it was interrupted.
    """
    begin = time.monotonic()
    collector = _Collector(jobs, result, observer)
    try:
        for job in jobs:
            if collector.repeats(job):
                continue
            collector.start(job)
            if load is loader.load:
                for event in _spawn(job, debug):
                    collector.receive(event)
            else:
                worker.run(job, load, collector.receive)
    except KeyboardInterrupt:
        result.partial = "interrupted"
    except ExlError as error:
        result.partial = error.message
        return error
    finally:
        result.seconds = time.monotonic() - begin
        result.runs = [run for run in result.runs if run.cold or any(entry.samples for entry in run.tests)]
    return None


def _spawn(job: Job, debug: bool) -> Iterator[Event]:
    """The events of a worker in a process of its own, which Ctrl-C at the terminal does not reach but through us."""
    with tempfile.TemporaryFile() as noise:
        command = [sys.executable, "-c", _CHILD, *sys.path]
        spawned = time.monotonic()
        process = subprocess.Popen(  # noqa: S603 - this interpreter, and this program's own code
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else noise,
            start_new_session=True,
            encoding="utf-8",
        )
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already, and its exit status says more
                process.stdin.write(dataclasses.replace(job, spawned=spawned).to_json())  # type: ignore[union-attr]
                process.stdin.close()  # type: ignore[union-attr]
            for line in process.stdout or ():
                event = json.loads(line)
                if event["event"] == "error":
                    raise _raised(event)
                yield event
            if process.wait() != 0:
                noise.seek(0)
                raise _crashed(job, process.returncode, noise.read().decode("utf-8", "replace"))
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            stream.close()  # type: ignore[union-attr]


def _raised(event: Event) -> ExlError:
    error = ExlError(event["message"], event["hint"])
    error.exit_code = ExitCode(event["exit_code"])
    return error


def _crashed(job: Job, code: int, noise: str) -> EngineError:
    lines = [line.strip() for line in noise.splitlines() if line.strip()]
    name = job.model or folders.BUILTIN
    if code < 0:
        hint = "the system may have run out of memory" if -code == signal.SIGKILL else "see --debug"
        return EngineError(f"the process that measured {name} was ended by {signal.Signals(-code).name}", hint)
    last = f": {lines[-1]}" if lines else ""
    return EngineError(f"the process that measured {name} failed{last}", "run again with --debug to see where")


class _Collector:
    """Makes runs of events, and estimates of the time that is left."""

    def __init__(self, jobs: Sequence[Job], result: Result, observer: Observer) -> None:
        self._result = result
        self._observer = observer
        self._repetitions = 1 + jobs[0].settings.repetitions
        self._jobs_left = len(jobs)
        self._tests = len(grid(jobs[0].settings))
        self._done = 0
        self._total = len(jobs) * self._tests * self._repetitions
        self._seconds: dict[str, float] = {}
        self._left: dict[str, int] = {}
        self._job: Job | None = None
        self._label = ""
        self._environment_notes: set[str] = set()

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

    def receive(self, event: Event) -> None:
        """One event of the job that is under way; see `worker.run`."""
        getattr(self, f"_on_{event['event']}")(event)

    def _on_note(self, event: Event) -> None:
        # Each worker says so anew.
        if event["text"] not in self._environment_notes:
            self._environment_notes.add(event["text"])
            self._observer.note(event["text"])

    def _on_stage(self, event: Event) -> None:
        share = f" {100 * event['done'] // event['total']} %" if event["total"] else ""
        self._tell(f"{event['text']}{share}")

    def _on_loaded(self, event: Event) -> None:
        job = self._job
        if job is None:
            raise RuntimeError("an event of no job")
        tests = [
            Measured(Case(**{key: entry.pop(key) for key in ("n_prompt", "n_gen", "n_depth", "n_parallel")}), **entry)
            for entry in (dict(entry) for entry in event["tests"])
        ]
        cold = event["cold"]
        self._result.environment = self._result.environment or event["environment"]
        self._result.runs.append(
            Run(
                model=event["model"],
                engine=event["engine"],
                cache=event["engine"].get("cache") or event["engine"].get("dtype", job.loading.cache),
                load_seconds=event["load_seconds"],
                tests=tests,
                memory=Memory(**event["memory"]),
                cold=None if cold is None else Cold(**{**cold, "sample": Sample.read(cold["sample"])}),
            )
        )
        for reason in event["skipped"]:
            self._skip(reason)
        self._total += (len(tests) - self._tests) * self._repetitions * (1 + self._jobs_left)
        self._tests = len(tests)
        self._left = {entry.test.name: self._repetitions - 1 for entry in tests}
        if cold is not None:
            self._done += 1  # the first generation counts as the untimed one of its test

    def _on_begin(self, event: Event) -> None:
        name, repetition = event["test"], event["repetition"]
        part = f"{repetition} of {self._repetitions - 1}" if repetition else "warming up"
        self._tell(f"{name}, {part}")

    def _on_warmed(self, event: Event) -> None:
        self._done += 1
        self._seconds[event["test"]] = event["seconds"]

    def _on_sample(self, event: Event) -> None:
        run = self._result.runs[-1]
        name = event["test"]
        entry = next(entry for entry in run.tests if entry.test.name == name)
        entry.samples.append(Sample.read(event["sample"]))
        entry.time = entry.time or event["time"]
        run.memory = run.memory.union(Memory(**event["memory"]))
        self._result.order.append(name)
        self._done += 1
        self._left[name] -= 1
        self._seconds[name] = event["seconds"]

    def _on_finished(self, event: Event) -> None:
        run = self._result.runs[-1]
        run.memory = run.memory.union(Memory(**event["memory"]))
        run.probe = None if event["probe"] is None else Probe(**event["probe"])
        run.perplexity = None if event["perplexity"] is None else Perplexity(**event["perplexity"])
        run.others_cpu = event["others_cpu"]
        for entry in run.tests:
            if found := event["traces"].get(entry.test.name):
                entry.kernel_ns, entry.kernels = found
        warnings = [*event["warnings"], *_doubts(run)]
        for warning in warnings:
            text = f"{run.label}, cache {run.cache}: {warning}"
            self._result.warnings.append(text)

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
    found = []
    for entry in run.tests:
        if reused := sum(sample.reused_tokens for sample in entry.samples):
            found.append(f"{entry.test.name} is too fast: {reused} prompt tokens were not computed but reused")
        limit = limits.limit(run, entry)
        if limit is not None and limit.share > _IMPOSSIBLE:
            found.append(f"{entry.test.name} beats its limit, which was measured too low: do not trust its share")
    if limits.disturbed(run):
        found.append(f"other programs kept {run.others_cpu:.1f} cores busy meanwhile")
    return found
