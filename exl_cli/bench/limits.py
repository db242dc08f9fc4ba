"""How close a test comes to what the hardware allows, and what holds it back.

The floor of a generation step is the time to read what it cannot do without: every weight but the embedding table, and
the keys and values of all tokens before. The floor of a prompt is the time of its matrix products. Both are lower
bounds: a real step also reads activations, writes keys and values, samples and returns to Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exl_cli.bench.plan import Case
from exl_cli.bench.result import Measured, Run
from exl_cli.models import memory
from exl_cli.models.info import ModelInfo

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# From which share of a limit on something counts as bound by it.
_NEAR, _IDLE = 0.6, 0.75

# Processor time over time passed under which a process that always has work is kept waiting for a core.
_ONE_CORE = 0.9

# Other programs' use of the processor that shows in the figures, in cores.
_DISTURBING = 0.25


def step_bytes(info: ModelInfo, test: Case, cache: str, dtype: str, *, unpacked: bool) -> int | None:
    """Bytes that one step of a generation reads at least, in the middle of the timed part.

    None where the model's shape does not say. `unpacked` means that the engine holds quantized weights, and its cache,
    as floats of `dtype`, the type that it computes in.
    """
    shape = memory.shape_of(info)
    item = _ITEM_BYTES.get(dtype)
    if shape is None or item is None:
        return None
    if unpacked:
        if "vision_config" in info.config:
            return None
        weights = item * (info.parameters - _untied(info, shape))
    else:
        needed = memory.estimate(info, memory.PAGE)
        if needed is None:
            return None
        weights = needed.weights
    idle = _idle_share(info)
    if idle is None:
        return None
    length = test.prompt_ids + (test.n_gen + 1) / 2
    window = info.text_config("sliding_window")
    if isinstance(window, int) and 0 < window < length and info.text_config("use_sliding_window", True):
        length = window
    bits = 8 * item if unpacked else memory.CACHE_BITS[cache]
    cached = test.n_parallel * shape.layers * 2 * shape.keys * length * bits / 8
    return round(weights * (1 - idle) + cached)


def prompt_flops(info: ModelInfo, test: Case) -> int | None:
    """Multiplications and additions that evaluating a prompt takes, its logits left out; None where unknown."""
    shape = memory.shape_of(info)
    idle = _idle_share(info)
    if shape is None or idle is None or "vision_config" in info.config:
        return None
    matrix = shape.vocabulary * shape.hidden
    weights = (info.parameters - matrix - _untied(info, shape)) * (1 - idle)
    # A position attends to half of the prompt on average: a product for the scores, one for the values.
    attention = 4 * shape.layers * shape.queries * test.n_prompt / 2
    return round(test.n_prompt * (2 * weights + attention))


def _untied(info: ModelInfo, shape: memory.Shape) -> int:
    """Parameters of an embedding table that is not the head as well."""
    return 0 if info.text_config("tie_word_embeddings") else shape.vocabulary * shape.hidden


def _idle_share(info: ModelInfo) -> float | None:
    """Which part of the weights belongs to experts that a token is not sent to; None where config.json does not say."""
    experts = sum(tensor.nbytes for tensor in info.tensors.values() if ".experts." in tensor.name)
    if not experts:
        return 0.0
    count = next((n for key in ("num_local_experts", "num_experts") if (n := info.text_config(key))), None)
    active = info.text_config("num_experts_per_tok")
    if not isinstance(count, int) or not isinstance(active, int):
        return None
    return experts * (1 - active / count) / sum(tensor.nbytes for tensor in info.tensors.values())


@dataclass(frozen=True)
class Limit:
    """A test beside its limit."""

    what: Literal["memory bandwidth", "matrix product"]
    ns: float  # the least time, of a step of generation or of the whole prompt
    share: float  # of the time that it took


def limit(run: Run, entry: Measured) -> Limit | None:
    """How close a test came; None where something was not measured."""
    if run.probe is None or not entry.samples:
        return None
    # With speculation a pass gives several tokens, and how many steps there were is not known.
    if entry.test.kind == "generation" and entry.step_bytes and entry.acceptance is None:
        floor = 1e9 * entry.step_bytes / run.probe.bytes_per_second
        return Limit("memory bandwidth", floor, floor / entry.step_ns)
    if entry.test.kind == "prompt" and entry.flops:
        floor = 1e9 * entry.flops / run.probe.flops
        return Limit("matrix product", floor, floor / entry.avg_ns)
    return None


def verdicts(run: Run) -> list[tuple[str, str]]:
    """The names of a run's tests of which it is known what holds them back, with that."""
    return [(entry.test.name, text) for entry in run.tests if (text := verdict(run, entry))]


def verdict(run: Run, entry: Measured) -> str:
    """What holds a generation back, in one line, with the figures that say so; empty where there are none."""
    bound = limit(run, entry)
    if bound is None or entry.test.kind != "generation":
        return ""
    size, share = _bytes(entry.step_bytes or 0), f"{bound.share:.0%} of a step's {_ms(entry.step_ns)}"
    reads = f"reading its {size} at the measured bandwidth would take {_ms(bound.ns)}, {share}"
    if bound.share >= _NEAR:
        return f"memory-bound: {reads}"
    if entry.test.n_parallel > 1:
        return ""  # neither traced nor in need of it: such a step is meant to compute more than it reads
    return _gpu_verdict(entry, reads) if run.on_gpu else _cpu_verdict(run, entry, reads)


def _gpu_verdict(entry: Measured, reads: str) -> str:
    if entry.kernel_ns is None:
        return f"not memory-bound: {reads}; the GPU could not be traced"
    busy = entry.kernel_ns / entry.step_ns
    if waits_for_cpu(entry):
        sent = f", in {entry.kernels:,.0f} kernels," if entry.kernels else ""
        return (
            f"launch-bound: the GPU computes for {_ms(entry.kernel_ns)} of a step's {_ms(entry.step_ns)} ({busy:.0%})"
            f"{sent} and waits for the CPU the rest of the time"
        )
    return f"kernel-bound: the GPU is busy {min(busy, 1):.0%} of the time; {reads}"


def waits_for_cpu(entry: Measured) -> bool:
    """Whether the GPU was idle for much of a step: the processor sets the pace then."""
    return entry.kernel_ns is not None and entry.kernel_ns / entry.step_ns < _IDLE


def _cpu_verdict(run: Run, entry: Measured, reads: str) -> str:
    threads = int(run.engine.get("threads", 1))
    share = sum(sample.cpu_share for sample in entry.samples) / len(entry.samples)
    others = f", while other programs used {run.others_cpu:.1f}" if disturbed(run) else ""
    if share < _ONE_CORE:
        return f"CPU-starved: {share:.1f} cores of CPU time{others}; {reads}"
    return f"CPU-bound: {share:.1f} of {threads} {'thread' if threads == 1 else 'threads'} busy{others}; {reads}"


def disturbed(run: Run) -> bool:
    """Whether other programs took so much of the processor that it shows in the figures."""
    return run.others_cpu is not None and run.others_cpu > _DISTURBING


def _ms(nanoseconds: float) -> str:
    value = nanoseconds / 1e6
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
