"""One model with one type of KV cache, from import to the last test; as a rule in a process of its own.

A process of its own, because the first generation of a process is one of the things to measure, because peaks of memory
count from the start of a process, and because whatever one model leaves behind must not slow down the next.

`main` is that process: it reads a `Job` as JSON from stdin and writes events to stdout, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from exl_cli import loader
from exl_cli.bench import environment, gpus, limits, plan
from exl_cli.bench.job import Job
from exl_cli.bench.measure import Sample, measure
from exl_cli.bench.plan import Case, Settings
from exl_cli.bench.result import Memory, Probe
from exl_cli.engines.base import BatchingEngine, Engine, Request
from exl_cli.errors import ExitCode, ExlError
from exl_cli.models.hub.store import read_marker
from exl_cli.models.info import ModelInfo
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system import readings
from exl_cli.system.nvml import open_driver

Event = dict[str, Any]
Emit = Callable[[Event], None]

# Tokens whose kernels are traced, after the timed repetitions.
_TRACED = 16


@dataclass
class _Observer:
    """Tells the loading's progress on; the first call of `progress` is where importing ends and reading begins."""

    emit: Emit
    reading_since: float | None = None
    _last: float = field(default=0.0, repr=False)

    def note(self, message: str) -> None:
        self.emit({"event": "note", "text": message})

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.reading_since = self.reading_since or now
        if now - self._last > 0.2 or done == total:
            self._last = now
            self.emit({"event": "stage", "text": "loading", "done": done, "total": total})


class _Bench:
    """A loaded engine and what it is given."""

    def __init__(self, job: Job, info: ModelInfo, tokenizer: Tokenizer, engine: Engine, watch: gpus.Watch) -> None:
        self.job, self.engine, self.watch = job, engine, watch
        vocabulary = min(tokenizer.vocab_size, int(info.text_config("vocab_size", tokenizer.vocab_size)))
        special = tokenizer.special_ids()
        self._prompts = plan.Prompts([i for i in range(vocabulary) if i not in special], job.settings.seed)
        self._given = 0

    def run(self, test: Case) -> Sample:
        """One repetition, with prompts of its own."""
        sample = measure(self.engine, test, [self._request(test) for _ in range(test.n_parallel)], self.watch.joules)
        self.watch.look()
        return sample

    def trace(self, test: Case) -> tuple[float, float] | None:
        """Nanoseconds that the GPU computes in a step of a generation, and kernels that it is sent."""
        from exl_cli.engines.probe import KernelClock

        clock, count = KernelClock(), 0
        chunks = self.engine.stream(self._request(test))
        for chunk in chunks:
            if not count and chunk.token_ids:
                clock.start()
            count += len(chunk.token_ids)
            if count > _TRACED:
                break
        found = clock.stop()
        if closing := getattr(chunks, "close", None):
            closing()
        return None if found is None else (1e9 * found[0] / (count - 1), found[1] / (count - 1))

    def memory(self) -> Memory:
        """What is in use now, and the peaks of this process."""
        cards = self.engine.memory()
        allocator = sum(card.peak_bytes for card in cards) if cards else None
        return Memory(readings.read_host().peak_bytes, allocator, self.watch.used_bytes())

    def _request(self, test: Case) -> Request:
        self._given += 1
        seed = self.job.settings.seed + self._given
        return Request(self._prompts.draw(test.prompt_ids), self.job.sampling, test.new_tokens, seed)


def run(job: Job, load: Callable[..., Engine], emit: Emit) -> None:
    """Do a job; every finding is an event.

    Events, by their `event`: "note" (text), "stage" (text, done, total: untimed work), "loaded" (see below), "warmed"
    and "sample" (test, a name; repetition; sample; memory), "finished" (probe, traces, perplexity, memory, warnings,
    others_cpu).

    Raises:
        ExlError: whatever resolving, loading or running the model raises.
    """
    emit({"event": "stage", "text": "starting", "done": 0, "total": 0})
    info = loader.resolve(job.model, None if job.models_dir is None else Path(job.models_dir))
    context = job.loading.max_seq_len or info.context_length
    tests, skipped = plan.fitting(plan.grid(job.settings), context, info.name)
    tokenizer = Tokenizer(info.path)
    watch = gpus.Watch(open_driver())
    others = environment.OthersClock()
    observer = _Observer(emit)
    begin = time.monotonic()
    loading = dataclasses.replace(job.loading, sequences=max(test.n_parallel for test in tests))
    engine = load(info, tokenizer, loading, observer, needed=max(test.context for test in tests))
    ready = time.monotonic()
    facts = dict(engine.facts)
    try:
        watch.attach([card.uuid for card in engine.memory()])
        most = engine.max_batch if isinstance(engine, BatchingEngine) else 1
        tests, single = plan.batchable(tests, most, engine.name)
        bench = _Bench(job, info, tokenizer, engine, watch)
        cold = _cold(bench, tests, observer, begin, ready)
        marker = read_marker(info.path)
        described = [_describe(test, info, engine, job) for test in tests]
        emit(
            {
                "event": "loaded",
                "model": {**info.to_dict(), "commit": marker and marker.commit},
                "engine": {"name": engine.name, "context_length": engine.context_length, **facts},
                "load_seconds": ready - begin,
                "cold": cold,
                "tests": described,
                "skipped": [*skipped, *single],
                "environment": environment.describe(engine, watch),
                "memory": asdict(bench.memory()),
            }
        )
        _rounds(bench, tests, job.settings, cold is not None, emit)
        changed = [
            f"{name} was {facts.get(name, 'nothing')} at first, and then {now}: the figures are of both"
            for name, now in engine.facts.items()
            if facts.get(name) != now
        ]
        largest = max((entry["step_bytes"] or 0 for entry in described), default=0) or info.size_bytes
        found = _finish(bench, tests, largest, tokenizer, emit, others)
        emit({**found, "warnings": [*changed, *found["warnings"]]})
    finally:
        engine.close()
        watch.close()


def _cold(
    bench: _Bench, tests: Sequence[Case], observer: _Observer, begin: float, ready: float
) -> dict[str, Any] | None:
    """The first generation of this process, where nothing else has warmed it up."""
    if bench.job.spawned is None:
        return None
    test = plan.answer(tests)
    reading = observer.reading_since or begin
    return {
        "import_seconds": reading - bench.job.spawned,
        "load_seconds": ready - reading,
        "n_prompt": test.prompt_ids,
        "n_gen": test.new_tokens,
        "sample": asdict(bench.run(test)),
    }


def _describe(test: Case, info: ModelInfo, engine: Engine, job: Job) -> dict[str, Any]:
    """A test and the work that it takes."""
    on_gpu = bool(engine.memory())
    dtype = engine.facts.get("dtype", "")
    return {
        **asdict(test),
        "step_bytes": limits.step_bytes(info, test, job.loading.cache, dtype, unpacked=not on_gpu)
        if test.kind == "generation"
        else None,
        "flops": limits.prompt_flops(info, test) if test.kind == "prompt" else None,
    }


def _rounds(bench: _Bench, tests: Sequence[Case], settings: Settings, is_warm: bool, emit: Emit) -> None:
    for test in tests:
        if is_warm and test == plan.answer(tests):
            continue
        start = time.monotonic()
        emit({"event": "begin", "test": test.name, "repetition": 0})
        bench.run(test)
        emit({"event": "warmed", "test": test.name, "seconds": time.monotonic() - start})
    for repetition, index in plan.schedule(tests, settings):
        test = tests[index]
        start = time.monotonic()
        emit({"event": "begin", "test": test.name, "repetition": repetition + 1})
        sample = bench.run(test)
        emit(
            {
                "event": "sample",
                "test": test.name,
                "sample": asdict(sample),
                "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "seconds": time.monotonic() - start,
                "memory": asdict(bench.memory()),
            }
        )


def _finish(
    bench: _Bench,
    tests: Sequence[Case],
    buffer: int,
    tokenizer: Tokenizer,
    emit: Emit,
    others: environment.OthersClock,
) -> Event:
    """What is measured after the timed repetitions, so as not to disturb them."""
    found: Event = {
        "event": "finished",
        "memory": asdict(bench.memory()),
        "others_cpu": others.cores(),
        "warnings": bench.watch.warnings(),
        "traces": {},
        "perplexity": None,
    }

    def stage(text: str, done: int = 0, total: int = 0) -> None:
        emit({"event": "stage", "text": text, "done": done, "total": total})

    if bench.engine.memory():
        stage("tracing kernels")
        singles = [test for test in tests if test.kind == "generation" and test.n_parallel == 1]
        found["traces"] = {test.name: bench.trace(test) for test in singles}
    if bench.job.perplexity is not None:
        from exl_cli.bench.perplexity import perplexity

        stage("perplexity")
        text = Path(bench.job.perplexity)
        value = perplexity(bench.engine, tokenizer, text, lambda done, total: stage("perplexity", done, total))
        found["perplexity"] = asdict(value)
    stage("measuring memory bandwidth")
    found["probe"], problem = _probe(bench.engine, buffer)
    if problem:
        found["warnings"].append(problem)
    return found


def _probe(engine: Engine, size: int) -> tuple[dict[str, Any] | None, str]:
    """What the device can do, or why that could not be measured."""
    from exl_cli.engines import probe

    device = next((card.device for card in engine.memory()), "cpu")
    dtype = engine.facts.get("dtype", "float32")
    try:
        rate, buffer = probe.bandwidth(device, size)
        return asdict(Probe(rate, buffer, probe.matrix_rate(device, dtype), dtype)), ""
    except (RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"the device's own limits could not be measured: {reason}"


def main() -> None:
    """The process: a job on stdin, events on stdout, whatever libraries print on stderr."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: Event) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        run(Job.from_json(sys.stdin.read()), loader.load, emit)
    except ExlError as error:
        emit({"event": "error", "message": error.message, "hint": error.hint, "exit_code": int(error.exit_code)})
        sys.exit(ExitCode.INTERNAL)
    except BrokenPipeError:  # whoever asked is gone
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), events.fileno())
        sys.exit(ExitCode.BROKEN_PIPE)
