"""A whole benchmark: for each model and type of KV cache a process that measures, from import to the last test.

A process for each, because the first generation of a process is one of the things to measure, because peaks of memory
count from the start of a process, and because what one model leaves behind must not slow down the next. It reads a
pickled `Job` from stdin and writes to stdout, pickled too, the calls that it makes to the `Collector` of the process
that started it; libraries print on stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench import limits, machine, measure, plan
from exl_cli.bench.plan import Case, Job, Settings
from exl_cli.bench.result import Cold, Measured, Memory, Probe, Result, Run, Sample
from exl_cli.engines.base import Engine, Request
from exl_cli.errors import EngineError, ExitCode, ExlError, OutOfMemoryError, first_line, param
from exl_cli.models import folders, memory
from exl_cli.models.hub.store import read_marker
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling
from exl_cli.system import processes, readings
from exl_cli.system.nvml import open_driver
from exl_cli.system.version import installed_version

# A share of a limit that no noise in measuring the two explains.
_IMPOSSIBLE = 1.05


class Observer(Protocol):
    """Shows how a benchmark is going."""

    def note(self, message: str) -> None: ...

    # The repetitions done, the untimed ones too, and the time left once it can be estimated.
    def update(self, what: str, done: int, total: int, eta_seconds: float | None) -> None: ...


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
        measure.read_text(text)
    for model in models:
        info = loader.resolve(model, models_dir)
        plan.fitting(tests, loadings[0].max_seq_len or info.context_length, info.name)
    loadings = [loader.with_draft(loading, models_dir) for loading in loadings]
    return [Job(model, models_dir, loading, settings, sampling, text) for model in models for loading in loadings]


def run(
    jobs: Sequence[Job], load: Callable[..., Engine], observer: Observer, *, debug: bool = False
) -> tuple[Result, ExlError | None]:
    """Do all jobs, one after the other.

    Args:
        load: `loader.load`, which a separate process calls; another function is called here, without cold figures.
        debug: let the processes write to this one's stderr.

    Returns:
        What was measured, its `partial` saying why if something is missing; and the error that ended it early, None
        where it was interrupted.
    """
    result = Result(installed_version(), jobs[0].settings, jobs[0].sampling.to_dict(), _now())
    begin = time.monotonic()
    collector = Collector(result, observer, jobs)
    failure = None
    try:
        for job in jobs:
            if not collector.begin(job):
                continue
            if load is loader.load:
                _spawn(job, collector, debug)
            else:
                work(job, load, collector)
    except KeyboardInterrupt:
        result.partial = "interrupted"
    except ExlError as error:
        result.partial, failure = error.message, error
    result.seconds = time.monotonic() - begin
    for measured in result.runs:
        measured.tests = [entry for entry in measured.tests if entry.samples]
    result.runs = [measured for measured in result.runs if measured.cold or measured.tests]
    return result, failure


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _spawn(job: Job, collector: Collector, debug: bool) -> None:
    """Do a job in a process that Ctrl-C at the terminal does not reach but through us."""
    with tempfile.TemporaryFile() as order, tempfile.TemporaryFile() as noise:
        pickle.dump(dataclasses.replace(job, spawned=time.monotonic()), order)
        order.seek(0)
        process = subprocess.Popen(  # noqa: S603 - this interpreter, and this program's own code
            processes.command("exl_cli.bench.runner"),
            stdin=order,
            stdout=subprocess.PIPE,
            stderr=None if debug else noise,
            start_new_session=True,
        )
        calls = cast(BinaryIO, process.stdout)
        try:
            with contextlib.suppress(EOFError, pickle.UnpicklingError):  # ended, perhaps in the middle of a call
                while True:
                    call, arguments = pickle.load(calls)  # noqa: S301 - written by this program's own process
                    getattr(collector, call)(*arguments)
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
        return EngineError(f"the benchmark process of {name} was killed by {processes.signal_name(-code)}", hint)
    last = f": {lines[-1]}" if lines else ""
    return EngineError(f"the benchmark process of {name} failed{last}", f"run again with {debug} for details")


@dataclass
class Collector:
    """Makes a result of what the jobs measure, and estimates the time that is left."""

    result: Result
    observer: Observer
    jobs: Sequence[Job]

    def __post_init__(self) -> None:
        settings = self.jobs[0].settings
        self._repetitions, self._tests = settings.repetitions, len(plan.grid(settings))
        self._jobs_left = len(self.jobs)  # the one under way included
        self._job: Job | None = None
        self._done = self._done_before = 0  # all in all, and when the job began
        self._seconds: dict[Case, float] = {}  # of each test of the job, as it was run last
        self._notes: set[str] = set()

    def begin(self, job: Job) -> bool:
        """Go to the next job; False where it would repeat the last one: only the cache type differs, and the engine
        has no choice of it."""
        last, self._job = self._job, job
        self._jobs_left -= last is not None
        self._done_before, self._seconds = self._done, {}
        if last is None or last.model != job.model or "cache" in self.result.runs[-1].engine:
            return True
        engine, cache = self.result.runs[-1].engine["name"], self.result.runs[-1].cache
        left_out = f"skipping cache {job.loading.cache} for {self._label}"
        self._skip(f"{left_out}: the {engine} engine keeps its KV cache in {cache}")
        return False

    @property
    def _label(self) -> str:
        return (self._job and self._job.model) or folders.BUILTIN

    def note(self, text: str) -> None:
        """Show a line, once: each process sends it again."""
        if text not in self._notes:
            self._notes.add(text)
            self.observer.note(text)

    def stage(self, text: str) -> None:
        """Show the step that the job has come to."""
        total = self._done_before + self._jobs_left * self._tests * (1 + self._repetitions)
        self.observer.update(f"{self._label}: {text}", self._done, total, self._eta())

    def _eta(self) -> float | None:
        if len(self._seconds) < self._tests:
            return None
        left = {entry.test: self._repetitions - len(entry.samples) for entry in self.result.runs[-1].tests}
        if not any(left.values()):
            return None
        now = sum(seconds * left[test] for test, seconds in self._seconds.items())
        return now + (self._jobs_left - 1) * self._repetitions * sum(self._seconds.values())

    def loaded(self, run: Run, skipped: list[str], environment: dict[str, Any]) -> None:
        """Begin a run, which has no samples yet."""
        self.result.environment = self.result.environment or environment
        self.result.runs.append(run)
        self._tests = len(run.tests)
        self._done += run.cold is not None  # which is the untimed run of its test
        for reason in skipped:
            self._skip(reason)

    def ran(self, test: Case, seconds: float, timed: tuple[Sample, Memory] | None) -> None:
        """Count a test that was run, and keep its sample where it was timed."""
        self._done += 1
        self._seconds[test] = seconds
        if timed is None:
            return
        sample, memory = timed
        run = self.result.runs[-1]
        entry = next(entry for entry in run.tests if entry.test == test)
        entry.samples.append(sample)
        entry.time = entry.time or _now()
        run.memory = memory
        self.result.order.append(test.name)

    def finished(self, run: Run, warnings: list[str]) -> None:
        """End a run: this one has all other figures, but no samples, which came one by one."""
        before = self.result.runs.pop()
        for entry, measured in zip(run.tests, before.tests, strict=True):
            entry.samples, entry.time = measured.samples, measured.time
        self.result.runs.append(run)
        self.result.warnings += [f"{run.where}: {warning}" for warning in [*warnings, *_doubts(run)]]

    def fail(self, error: ExlError) -> None:
        raise error

    def _skip(self, reason: str) -> None:
        if reason not in self.result.skipped:
            self.result.skipped.append(reason)
            self.observer.note(reason)


def _doubts(run: Run) -> Iterator[str]:
    """Signs in the samples that the figures cannot be right."""
    for entry in run.tests:
        if reused := sum(sample.reused_tokens for sample in entry.samples):
            yield f"{entry.test.name} is too fast: {reused} prompt tokens were reused instead of computed"
        limit = limits.limit(run, entry)
        if limit is not None and limit.share > _IMPOSSIBLE:
            yield f"{entry.test.name} exceeds its limit, which was measured too low; ignore its share"
    if limits.disturbed(run):
        yield f"other programs used {run.others_cpu:.1f} CPU cores during the run"


@dataclass
class _Loading:
    """A `loader.Observer`. The first progress that it sees is where importing ends and reading begins."""

    out: Collector
    reading_since: float | None = None
    last: float = 0.0

    def note(self, message: str) -> None:
        self.out.note(message)

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.reading_since = self.reading_since or now
        if now - self.last > 0.2 or done == total:
            self.last = now
            _share(self.out, "loading", done, total)


def _share(out: Collector, stage: str, done: int, total: int) -> None:
    out.stage(f"{stage} {100 * done // total} %" if total else stage)


def work(job: Job, load: Callable[..., Engine], out: Collector) -> None:
    """Do a job in this process; `out` receives the measurements."""
    out.stage("starting")
    info = loader.resolve(job.model, job.models_dir)
    context = job.loading.max_seq_len or info.context_length
    tests, skipped = plan.fitting(plan.grid(job.settings), context, info.name)
    tokenizer = Tokenizer(info.path)
    watch, others = machine.Watch(open_driver()), machine.OthersClock()
    observer, begin = _Loading(out), time.monotonic()
    needed = max(test.context for test in tests)
    # Requests share the pages of the KV cache: room for those of a test, whatever one alone might take.
    together = max(test.n_parallel * memory.round_up(test.context) for test in tests)
    allocated = memory.round_up(loader.context_to_allocate(info, job.loading, needed))
    loading = dataclasses.replace(job.loading, sequences=-(-together // allocated))
    try:
        engine = EngineThread(load(info, tokenizer, loading, observer, needed=needed))
    except OutOfMemoryError as error:
        if loading.sequences == 1:
            raise
        raise OutOfMemoryError(error.message, f"use a smaller {param('batch')}") from error
    ready = time.monotonic()
    try:
        watch.attach([card.uuid for card in engine.memory()])
        tests, single = plan.batchable(tests, engine.max_batch, engine.name)
        bench = _Bench(job, info, tokenizer, engine, watch, tests, out)
        first, cold = None, None
        if job.spawned is not None:
            reading = observer.reading_since or begin
            first = next((test for test in tests if test.kind == "answer"), tests[0])
            sizes = first.prompt_ids, first.new_tokens
            cold = Cold(reading - job.spawned, ready - reading, *sizes, bench.sample(first))
        run = bench.describe(ready - begin, cold)
        out.loaded(run, [*skipped, *single], machine.describe(engine, watch))
        bench.repetitions(warm=first)
        bench.finish(run, others)
    finally:
        engine.close()
        watch.close()


@dataclass
class _Bench:
    """A loaded engine and the tests that it is given."""

    job: Job
    info: ModelInfo
    tokenizer: Tokenizer
    engine: EngineThread
    watch: machine.Watch
    tests: list[Case]
    out: Collector

    def __post_init__(self) -> None:
        size = self.tokenizer.vocab_size
        ids = set(range(min(size, int(self.info.text_config("vocab_size", size))))) - self.tokenizer.special_ids()
        self._prompts, self._given = plan.Prompts(sorted(ids), self.job.settings.seed), 0
        self._facts = dict(self.engine.facts)

    def describe(self, load_seconds: float, cold: Cold | None) -> Run:
        """All that is known before the first timed repetition."""
        info, engine, facts, marker = self.info, self.engine, self._facts, read_marker(self.info.path)
        dtype, unpacked = facts.get("dtype", ""), not engine.memory()
        entries = [Measured(test) for test in self.tests]
        for entry in entries:
            if entry.test.kind == "prompt":
                entry.flops = limits.prompt_flops(info, entry.test)
            elif entry.test.kind == "generation":
                cache = self.job.loading.cache
                entry.step_bytes = limits.step_bytes(info, entry.test, cache, dtype, unpacked=unpacked)
        return Run(
            model={**info.to_dict(), "commit": marker and marker.commit},
            engine={"name": engine.name, "context_length": engine.context_length, **facts},
            cache=facts.get("cache") or facts.get("dtype", self.job.loading.cache),
            load_seconds=load_seconds,
            cold=cold,
            memory=self._memory(),
            tests=entries,
        )

    def _request(self, test: Case) -> Request:
        self._given += 1
        seed = self.job.settings.seed + self._given
        return Request(self._prompts.draw(test.prompt_ids), self.job.sampling, test.new_tokens, seed)

    def sample(self, test: Case) -> Sample:
        """One repetition, with prompts that were not used before."""
        requests = [self._request(test) for _ in range(test.n_parallel)]
        sample = measure.measure(self.engine, test, requests, self.watch.joules)
        self.watch.look()
        return sample

    def _memory(self) -> Memory:
        """The peaks so far."""
        cards = self.engine.memory()
        allocator = sum(card.peak_bytes for card in cards) if cards else None
        by_gpu = {card.device: card.peak_bytes for card in cards}
        return Memory(readings.read_host().peak_bytes, allocator, self.watch.most_used, by_gpu)

    def repetitions(self, warm: Case | None) -> None:
        """Each test once untimed, but the one that has been run; then the repetitions."""
        for test in self.tests:
            if test != warm:
                self._run(test, "warming up", timed=False)
        for repetition, test in plan.schedule(self.tests, self.job.settings):
            self._run(test, f"{repetition + 1} of {self.job.settings.repetitions}", timed=True)

    def _run(self, test: Case, which: str, *, timed: bool) -> None:
        self.out.stage(f"{test.name}, {which}")
        start = time.monotonic()
        sample = self.sample(test)
        seconds = time.monotonic() - start
        self.out.ran(test, seconds, (sample, self._memory()) if timed else None)

    def finish(self, run: Run, others: machine.OthersClock) -> None:
        """What is measured after the timed repetitions, in order not to disturb them."""
        run.memory, run.others_cpu = self._memory(), others.cores()
        warnings = [
            f"{name} changed from {self._facts.get(name, 'nothing')} to {now} during the run; the figures cover both"
            for name, now in self.engine.facts.items()
            if self._facts.get(name) != now
        ]
        warnings += self.watch.warnings()
        if self.engine.memory():
            self.out.stage("tracing kernels")
            for entry in run.find("generation"):
                if entry.test.n_parallel == 1:
                    traced = measure.trace_kernels(self.engine, self._request(entry.test))
                    entry.kernel_ns, entry.kernels = traced or (None, None)
        if text := self.job.perplexity:
            self.out.stage("perplexity")
            progress = functools.partial(_share, self.out, "perplexity")
            run.perplexity = measure.perplexity(self.engine, self.tokenizer, text, progress)
        self.out.stage("measuring memory bandwidth")
        size = max((entry.step_bytes or 0 for entry in run.tests), default=0) or self.info.size_bytes
        try:
            run.probe = self._probe(size)
        except (RuntimeError, AttributeError) as error:
            warnings.append(f"could not measure the device's limits: {first_line(error)}")
        self.out.finished(run, warnings)

    def _probe(self, size: int) -> Probe:
        """What the device can do, with a buffer of so many bytes."""
        from exl_cli.engines import probe

        device = next((card.device for card in self.engine.memory()), "cpu")
        dtype = self.engine.facts.get("dtype", "float32")
        return Probe(*probe.bandwidth(device, size), probe.matrix_rate(device, dtype), dtype)


class _Wire:
    """A `Collector` in the process at the other end of a stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def __getattr__(self, call: str) -> Callable[..., None]:
        def send(*arguments: object) -> None:
            pickle.dump((call, arguments), self._stream)
            self._stream.flush()

        return send


def main() -> None:
    """The process that does a job."""
    stream = processes.own_stdout()
    out = cast(Collector, _Wire(stream))
    try:
        work(pickle.load(sys.stdin.buffer), loader.load, out)  # noqa: S301 - written by the process that started this one
    except ExlError as error:
        out.fail(error)
        sys.exit(ExitCode.INTERNAL)
    except BrokenPipeError:  # the process that started this one is gone
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(ExitCode.BROKEN_PIPE)


if __name__ == "__main__":
    main()
