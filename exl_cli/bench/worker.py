"""Measure one model with one type of KV cache, from import to the last test; as a rule in a separate process.

Separate, because the first generation of a process is one of the things to measure, because peaks of memory count from
the start of a process, and because what one model leaves behind must not slow down the next.

The process reads a pickled `Job` from stdin and writes events to stdout, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench import limits, machine, plan
from exl_cli.bench.measure import measure, trace_kernels
from exl_cli.bench.plan import Case, Job
from exl_cli.bench.result import Cold, Measured, Memory, Probe, Run, Sample
from exl_cli.engines.base import Engine, Request
from exl_cli.errors import ExitCode, ExlError
from exl_cli.models.hub.store import read_marker
from exl_cli.models.info import ModelInfo
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system import readings
from exl_cli.system.nvml import open_driver

# Called with an event's name and, by name, its fields: JSON's types and the records of `result`.
Emit = Callable[..., None]


@dataclass
class _Observer:
    """Passes the loading's progress on; its first call of `progress` is where importing ends and reading begins."""

    emit: Emit
    reading_since: float | None = None
    last: float = 0.0

    def note(self, message: str) -> None:
        self.emit("note", text=message)

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.reading_since = self.reading_since or now
        if now - self.last > 0.2 or done == total:
            self.last = now
            self.emit("stage", text=_share("loading", done, total))


def _share(text: str, done: int, total: int) -> str:
    return f"{text} {100 * done // total} %" if total else text


def run(job: Job, load: Callable[..., Engine], emit: Emit) -> None:
    """Do a job; all that it yields are events.

    - note: text
    - stage: text: what it does now
    - loaded: run, skipped, environment
    - warmed: test (a name), seconds
    - sample: test, seconds, sample, time, memory
    - finished: memory, others_cpu, warnings, traces, perplexity, probe

    Raises:
        ExlError: whatever resolving, loading or running the model raises.
    """
    emit("stage", text="starting")
    info = loader.resolve(job.model, None if job.models_dir is None else Path(job.models_dir))
    context = job.loading.max_seq_len or info.context_length
    tests, skipped = plan.fitting(plan.grid(job.settings), context, info.name)
    tokenizer = Tokenizer(info.path)
    watch, others = machine.Watch(open_driver()), machine.OthersClock()
    observer = _Observer(emit)
    begin = time.monotonic()
    loading = dataclasses.replace(job.loading, sequences=max(test.n_parallel for test in tests))
    engine = EngineThread(load(info, tokenizer, loading, observer, needed=max(test.context for test in tests)))
    ready = time.monotonic()
    reading = observer.reading_since or begin
    facts = dict(engine.facts)
    try:
        watch.attach([card.uuid for card in engine.memory()])
        tests, single = plan.batchable(tests, engine.max_batch, engine.name)
        bench = _Bench(job, info, tokenizer, engine, watch, tests, emit)
        cold = None
        if job.spawned is not None:
            first = plan.answer(tests)
            seconds = reading - job.spawned, ready - reading
            cold = Cold(*seconds, first.prompt_ids, first.new_tokens, bench.sample(first))
        marker = read_marker(info.path)
        measured = Run(
            model={**info.to_dict(), "commit": marker and marker.commit},
            engine={"name": engine.name, "context_length": engine.context_length, **facts},
            cache=facts.get("cache") or facts.get("dtype", job.loading.cache),
            load_seconds=ready - begin,
            cold=cold,
            memory=bench.memory(),
            tests=[bench.describe(test) for test in tests],
        )
        environment = machine.describe(engine, watch)
        buffer = max((entry.step_bytes or 0 for entry in measured.tests), default=0) or info.size_bytes
        emit("loaded", run=measured, skipped=[*skipped, *single], environment=environment)
        bench.rounds(warm=None if cold is None else plan.answer(tests))
        changed = [
            f"{name} was {facts.get(name, 'nothing')} at first, and then {now}: the figures are of both"
            for name, now in engine.facts.items()
            if facts.get(name) != now
        ]
        bench.finish(buffer, others, changed)
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
    emit: Emit

    def __post_init__(self) -> None:
        size = self.tokenizer.vocab_size
        ids = set(range(min(size, int(self.info.text_config("vocab_size", size))))) - self.tokenizer.special_ids()
        self._prompts, self._given = plan.Prompts(sorted(ids), self.job.settings.seed), 0

    def _request(self, test: Case) -> Request:
        self._given += 1
        seed = self.job.settings.seed + self._given
        return Request(self._prompts.draw(test.prompt_ids), self.job.sampling, test.new_tokens, seed)

    def sample(self, test: Case) -> Sample:
        """One repetition, with prompts that were not used before."""
        sample = measure(self.engine, test, [self._request(test) for _ in range(test.n_parallel)], self.watch.joules)
        self.watch.look()
        return sample

    def memory(self) -> Memory:
        """The peaks of this process, and what is in use on the GPUs now."""
        cards = self.engine.memory()
        allocator = sum(card.peak_bytes for card in cards) if cards else None
        return Memory(readings.read_host().peak_bytes, allocator, self.watch.used_bytes())

    def describe(self, test: Case) -> Measured:
        """A test and the work that it takes."""
        if test.kind == "prompt":
            return Measured(test, flops=limits.prompt_flops(self.info, test))
        if test.kind == "answer":
            return Measured(test)
        dtype, unpacked = self.engine.facts.get("dtype", ""), not self.engine.memory()
        least = limits.step_bytes(self.info, test, self.job.loading.cache, dtype, unpacked=unpacked)
        return Measured(test, step_bytes=least)

    def rounds(self, warm: Case | None) -> None:
        """Each test once untimed, but the one that has been run; then the repetitions."""
        for test in self.tests:
            if test != warm:
                self._stage(f"{test.name}, warming up")
                start = time.monotonic()
                self.sample(test)
                self.emit("warmed", test=test.name, seconds=time.monotonic() - start)
        for repetition, index in plan.schedule(self.tests, self.job.settings):
            test = self.tests[index]
            self._stage(f"{test.name}, {repetition + 1} of {self.job.settings.repetitions}")
            start = time.monotonic()
            sample, seconds = self.sample(test), time.monotonic() - start
            now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
            self.emit("sample", test=test.name, seconds=seconds, sample=sample, time=now, memory=self.memory())

    def finish(self, buffer: int, others: machine.OthersClock, warnings: list[str]) -> None:
        """What is measured after the timed repetitions, in order not to disturb them."""
        memory, others_cpu, warnings = self.memory(), others.cores(), [*warnings, *self.watch.warnings()]
        traces, perplexity = {}, None
        if self.engine.memory():
            self._stage("tracing kernels")
            singles = [test for test in self.tests if test.kind == "generation" and test.n_parallel == 1]
            traces = {test.name: trace_kernels(self.engine, self._request(test)) for test in singles}
        if self.job.perplexity is not None:
            from exl_cli.bench.perplexity import perplexity as evaluate

            self._stage("perplexity")
            text = Path(self.job.perplexity)
            perplexity = evaluate(self.engine, self.tokenizer, text, lambda *at: self._stage(_share("perplexity", *at)))
        self._stage("measuring memory bandwidth")
        probe, problem = self._probe(buffer)
        if problem:
            warnings.append(f"the device's own limits could not be measured: {problem}")
        last = {"memory": memory, "others_cpu": others_cpu, "warnings": warnings}
        self.emit("finished", traces=traces, perplexity=perplexity, probe=probe, **last)

    def _stage(self, text: str) -> None:
        self.emit("stage", text=text)

    def _probe(self, size: int) -> tuple[Probe | None, str]:
        """What the device can do, or why that could not be measured."""
        from exl_cli.engines import probe

        device = next((card.device for card in self.engine.memory()), "cpu")
        dtype = self.engine.facts.get("dtype", "float32")
        try:
            return Probe(*probe.bandwidth(device, size), probe.matrix_rate(device, dtype), dtype), ""
        except (RuntimeError, AttributeError) as error:
            return None, (str(error).splitlines() or [type(error).__name__])[0]


def main() -> None:
    """The process: a job on stdin, events on stdout, whatever libraries print on stderr."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: str, **fields: object) -> None:
        events.write(json.dumps({"event": event, **fields}, default=dataclasses.asdict) + "\n")
        events.flush()

    try:
        run(pickle.load(sys.stdin.buffer), loader.load, emit)  # noqa: S301 - written by the process that started this one
    except ExlError as error:
        emit("error", message=error.message, hint=error.hint, exit_code=int(error.exit_code))
        sys.exit(ExitCode.INTERNAL)
    except BrokenPipeError:  # the process that started this one is gone
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), events.fileno())
        sys.exit(ExitCode.BROKEN_PIPE)


if __name__ == "__main__":
    main()
