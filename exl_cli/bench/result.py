"""What a benchmark found: its records, their statistics, and the JSON that they are kept in.

The JSON is one object; `schema.json` describes it and `schema` in it is the version. Its `tests` carry llama-bench's
field names where they mean the same (tools/llama-bench/README.md of llama.cpp), in llama-bench's units: nanoseconds,
bytes, tokens per second, and deviations of a sample (n - 1). What is computed from samples is written for whoever reads
the file, and computed again when `exl` does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from exl_cli.bench.measure import Sample
from exl_cli.bench.plan import Case, Settings

SCHEMA = 1


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; 0.0 of nothing."""
    return statistics.fmean(values) if values else 0.0


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample (n - 1), 0.0 of fewer than two, as llama-bench has it."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percentile(values: Sequence[float], percent: int) -> float:
    """With linear interpolation between the nearest two; 0.0 of nothing."""
    if len(values) < 2:
        return float(values[0]) if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Cold:
    """The first generation of a fresh process.

    Attributes:
        import_seconds: from the start of the process until the first weight was read.
        load_seconds: from there until the model could answer.
        n_prompt, n_gen: tokens of the request.
        sample: how it went.
    """

    import_seconds: float
    load_seconds: float
    n_prompt: int
    n_gen: int
    sample: Sample

    @property
    def first_token_seconds(self) -> float:
        """From the call to the first token."""
        return self.sample.ttft_ns / 1e9

    @property
    def start_to_token_seconds(self) -> float:
        """From the start of the process to the first token."""
        return self.import_seconds + self.load_seconds + self.first_token_seconds

    @property
    def generation_rate(self) -> float:
        """Tokens per second after the first."""
        return rate_of(self.sample)


def rate_of(sample: Sample) -> float:
    """Tokens per second after the first token of a sample; 0.0 where there is none."""
    total = sum(sample.itl_ns)
    return 1e9 * len(sample.itl_ns) / total if total else 0.0


@dataclass(frozen=True)
class Memory:
    """The most memory in use, in bytes; None where it cannot be read.

    Attributes:
        host: resident memory of the process.
        allocator: reserved on the GPUs by this process's torch.
        device: in use on these GPUs, by everything, at the end of a repetition.
    """

    host: int
    allocator: int | None = None
    device: int | None = None

    def union(self, other: Memory) -> Memory:
        """The larger of each."""

        def larger(a: int | None, b: int | None) -> int | None:
            return max((value for value in (a, b) if value is not None), default=None)

        return Memory(
            max(self.host, other.host), larger(self.allocator, other.allocator), larger(self.device, other.device)
        )


@dataclass(frozen=True)
class Probe:
    """What the device can do, measured in the same run.

    Attributes:
        bytes_per_second: reading memory.
        buffer_bytes: size of what was read.
        flops: multiplications and additions per second of a large matrix product.
        dtype: of that product.
    """

    bytes_per_second: float
    buffer_bytes: int
    flops: float
    dtype: str


@dataclass(frozen=True)
class Perplexity:
    """How well the model predicts a text; see `perplexity`.

    Attributes:
        file, sha256: the text.
        tokens: predicted ones.
        window, stride: tokens of context at most, and how far it moves at a time.
        step: tokens of a forward pass; 0 for a window at once.
        mean_nll, stderr: negative log-likelihood of a token in nats, and its standard error.
    """

    file: str
    sha256: str
    tokens: int
    window: int
    stride: int
    step: int
    mean_nll: float
    stderr: float

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(self.mean_nll)

    @property
    def error(self) -> float:
        """Its standard error, to first order."""
        return self.value * self.stderr


@dataclass
class Measured:
    """A test and its samples.

    Attributes:
        test: what was run.
        samples: one for each repetition, in the order of time.
        time: when the first was taken, in RFC 3339.
        step_bytes: what a step of generation has to read at least; None where unknown.
        flops: what the prompt's evaluation has to compute; None where unknown.
        kernel_ns, kernels: time in which the GPU computes in a step, and how many kernels it is sent; None where
            they cannot be traced.
    """

    test: Case
    samples: list[Sample] = field(default_factory=list)
    time: str = ""
    step_bytes: int | None = None
    flops: int | None = None
    kernel_ns: float | None = None
    kernels: float | None = None

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each sample."""
        return [1e9 * self.test.tokens / sample.ns for sample in self.samples]

    @property
    def avg_ts(self) -> float:
        """Mean of the rates."""
        return mean(self.rates)

    @property
    def stddev_ts(self) -> float:
        """Deviation of the rates."""
        return deviation(self.rates)

    @property
    def avg_ns(self) -> float:
        """Mean time."""
        return mean([sample.ns for sample in self.samples])

    @property
    def step_ns(self) -> float:
        """Mean time of a step: a forward pass of all parallel requests."""
        return self.avg_ns / self.test.n_gen if self.test.n_gen else 0.0

    @property
    def latencies(self) -> list[int]:
        """Nanoseconds between tokens, of all samples."""
        return [step for sample in self.samples for step in sample.itl_ns]

    @property
    def first_token_ns(self) -> list[int]:
        """Time to first token of each sample."""
        return [sample.ttft_ns for sample in self.samples]

    @property
    def acceptance(self) -> float | None:
        """Which share of the tokens that speculation proposed was right; None where it proposed none."""
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
    """A model with a type of KV cache.

    Attributes:
        model: facts of the model, as `report.model` gives them, and its `commit`.
        engine: the engine's name, context_length and facts.
        cache: type of the KV cache.
        load_seconds: of the process that was measured.
        others_cpu: how many cores other programs kept busy on average; None where it cannot be read.
    """

    model: dict[str, Any]
    engine: dict[str, Any]
    cache: str
    load_seconds: float
    tests: list[Measured]
    memory: Memory
    cold: Cold | None = None
    probe: Probe | None = None
    perplexity: Perplexity | None = None
    others_cpu: float | None = None

    @property
    def label(self) -> str:
        """The model's short name and format, e.g. "fable-7m EXL2 5.0 bpw"."""
        return f"{self.short_name} {self.model['format_name']}"

    @property
    def short_name(self) -> str:
        """The last part of the model's name."""
        return str(self.model["name"]).rstrip("/").rpartition("/")[2] or str(self.model["name"])

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU does the work."""
        return self.memory.allocator is not None

    @cached_property
    def backend(self) -> str:
        """As llama-bench's column has it."""
        return "CUDA" if self.on_gpu else "CPU"

    def find(self, kind: str) -> list[Measured]:
        """The tests of a kind that have samples."""
        return [entry for entry in self.tests if entry.test.kind == kind and entry.samples]


@dataclass
class Result:
    """A benchmark.

    Attributes:
        partial: why it is not complete; empty where it is.
        started: in RFC 3339.
        seconds: how long it took.
        settings: what was asked for.
        sampling: the sampler's settings.
        environment: the machine and the versions.
        runs: in the order in which they were made.
        order: names of the tests in the order in which they were timed.
        warnings: what a reader must know before trusting a figure.
        skipped: what was left out, and why.
    """

    exl_version: str
    settings: Settings
    sampling: dict[str, Any]
    started: str
    seconds: float = 0.0
    partial: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def measured(self) -> list[tuple[Run, Measured]]:
        """Every test that has samples, with its run."""
        return [(run, entry) for run in self.runs for entry in run.tests if entry.samples]
