"""What a benchmark measured: its records and their statistics. `outputs` has their JSON.

Times are in nanoseconds where llama-bench has them so, elsewhere in seconds; deviations are of a sample (n - 1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from exl_cli.bench.plan import Case, Settings


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; 0.0 of nothing."""
    return statistics.fmean(values) if values else 0.0


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample, 0.0 of fewer than two values, as llama-bench has it."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percentile(values: Sequence[float], percent: int) -> float:
    """With linear interpolation between the nearest two; 0.0 of nothing."""
    if len(values) < 2:
        return float(values[0]) if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Sample:
    """One repetition of a test."""

    ns: int  # the timed part, in which `Case.tokens` tokens were computed
    ttft_ns: int  # from the call to the first new token, the slowest of several requests
    itl_ns: tuple[int, ...]  # from each new token to the next, request after request; empty for a prompt
    reused_tokens: int  # prompt tokens that the engine did not compute but had in its cache
    joules: float | None  # energy that the GPUs took meanwhile; None where they do not say
    cpu_share: float  # processor time of this process over wall time: 2.0 is two busy cores
    drafted_tokens: int = 0  # see `engines.base.Summary`
    accepted_tokens: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second after the first; 0.0 where there is no other."""
        return 1e9 * len(self.itl_ns) / sum(self.itl_ns) if any(self.itl_ns) else 0.0


@dataclass(frozen=True)
class Cold:
    """The first generation of a fresh process."""

    import_seconds: float  # from the start of the process until the first weight was read
    load_seconds: float  # from there until the model could answer
    n_prompt: int  # tokens of the prompt
    n_gen: int  # new tokens
    sample: Sample

    @property
    def first_token_seconds(self) -> float:
        return self.sample.ttft_ns / 1e9

    @property
    def start_to_token_seconds(self) -> float:
        """From the start of the process to the first token."""
        return self.import_seconds + self.load_seconds + self.first_token_seconds

    @property
    def generation_rate(self) -> float:
        return self.sample.rate


@dataclass(frozen=True)
class Memory:
    """The most memory in use so far, in bytes; None where it cannot be read."""

    host: int  # resident memory of the process
    allocator: int | None  # reserved on the GPUs by this process's torch
    device: int | None  # in use on these GPUs by everything, at the end of a repetition
    by_gpu: dict[str, int] = field(default_factory=dict)  # `allocator` of each GPU, by torch's name of the device


@dataclass(frozen=True)
class Probe:
    """What the device can do, measured in the same run."""

    bytes_per_second: float  # reading memory
    buffer_bytes: int  # size of what was read
    flops: float  # multiplications and additions per second of a large matrix product
    dtype: str  # of that product


@dataclass(frozen=True)
class Perplexity:
    """How well the model predicts a text; see `measure.perplexity`."""

    file: str
    sha256: str
    tokens: int  # predicted
    window: int  # tokens of context at most
    stride: int  # tokens that the window moves at a time
    step: int  # tokens of a forward pass; 0 for a window at once
    mean_nll: float  # negative log-likelihood of a token, in nats
    stderr: float  # of mean_nll

    @property
    def value(self) -> float:
        return math.exp(self.mean_nll)

    @property
    def error(self) -> float:
        """Its standard error, to first order."""
        return self.value * self.stderr


@dataclass
class Measured:
    """A test and its samples."""

    test: Case
    samples: list[Sample] = field(default_factory=list)  # one for each repetition, in the order of time
    time: str = ""  # when the first was taken, in RFC 3339
    step_bytes: int | None = None  # what a step of generation reads at least
    flops: int | None = None  # what the prompt's evaluation computes
    kernel_ns: float | None = None  # in which the GPU computes, of a step; None where it cannot be traced
    kernels: float | None = None  # sent to the GPU in a step

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each sample."""
        return [1e9 * self.test.tokens / sample.ns for sample in self.samples]

    @property
    def avg_ts(self) -> float:
        return mean(self.rates)

    @property
    def stddev_ts(self) -> float:
        return deviation(self.rates)

    @property
    def avg_ns(self) -> float:
        return mean([sample.ns for sample in self.samples])

    @property
    def step_ns(self) -> float:
        """Mean time of a step: a forward pass of all parallel requests."""
        return self.avg_ns / self.test.n_gen if self.test.n_gen else 0.0

    @property
    def itl_ns(self) -> list[int]:
        """Nanoseconds between tokens, of all samples; none for a prompt."""
        return [step for sample in self.samples for step in sample.itl_ns]

    @property
    def latency(self) -> dict[str, int | None]:
        """Median, 5th and 95th percentile of the time between tokens; None of a prompt."""
        steps, percents = self.itl_ns, {"median": 50, "p5": 5, "p95": 95}
        return {name: round(percentile(steps, percent)) if steps else None for name, percent in percents.items()}

    @property
    def ttft_ns(self) -> list[int]:
        return [sample.ttft_ns for sample in self.samples]

    @property
    def acceptance(self) -> float | None:
        """Share of the draft tokens that were accepted; None without any."""
        drafted = sum(sample.drafted_tokens for sample in self.samples)
        return sum(sample.accepted_tokens for sample in self.samples) / drafted if drafted else None

    @property
    def joules_per_token(self) -> float | None:
        """Energy per token; None where unknown, and where the counter's steps are too coarse for so short a time."""
        joules = [sample.joules for sample in self.samples if sample.joules is not None]
        if len(joules) != len(self.samples) or sum(sample.ns for sample in self.samples) < 1e9:
            return None
        return sum(joules) / (len(joules) * self.test.tokens)


@dataclass
class Run:
    """A model with a type of KV cache."""

    model: dict[str, Any]  # `ModelInfo.to_dict`, and its `commit`
    engine: dict[str, Any]  # name, context_length and the engine's facts
    cache: str
    load_seconds: float
    cold: Cold | None
    memory: Memory
    tests: list[Measured]
    probe: Probe | None = None
    perplexity: Perplexity | None = None
    others_cpu: float | None = None  # cores that other programs kept busy on average; None where it cannot be read

    @property
    def label(self) -> str:
        """The model's short name and format, e.g. "fable-7m EXL2 5.0 bpw"."""
        return f"{self.short_name} {self.model['format_name']}"

    @property
    def short_name(self) -> str:
        """The last part of the model's name."""
        return str(self.model["name"]).rstrip("/").rpartition("/")[2] or str(self.model["name"])

    @property
    def where(self) -> str:
        return f"{self.label}, cache {self.cache}"

    @property
    def on_gpu(self) -> bool:
        return self.memory.allocator is not None

    def find(self, kind: str) -> list[Measured]:
        return [entry for entry in self.tests if entry.test.kind == kind]


@dataclass
class Result:
    """A benchmark. Every test in it has samples, once the benchmark has ended."""

    exl_version: str
    settings: Settings
    sampling: dict[str, Any]
    started: str  # in RFC 3339
    seconds: float = 0.0
    partial: str = ""  # why it is not complete; empty where it is
    environment: dict[str, Any] = field(default_factory=dict)  # the machine and the versions
    runs: list[Run] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # names of the tests in the order in which they were timed
    warnings: list[str] = field(default_factory=list)  # what a reader must know before trusting a figure
    skipped: list[str] = field(default_factory=list)  # what was left out, and why

    def measured(self) -> list[tuple[Run, Measured]]:
        return [(run, entry) for run in self.runs for entry in run.tests]
