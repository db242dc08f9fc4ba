"""Checks of one model: can it be run here, does it fit, does it speak sense, and do both engines agree on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from exl_cli import loader
from exl_cli.doctor.check_result import CheckResult
from exl_cli.doctor.probes import Answer
from exl_cli.engines.exllamav2 import support
from exl_cli.errors import ExlError, param
from exl_cli.models import memory
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.system.machine import available_memory
from exl_cli.system.units import gib, parameters

Ask = Callable[[str, float, dict[str, Any]], Answer]

NEW_TOKENS = 32
# Above this a sum in another order cannot be why two engines part: float16 logits of sound models differ by less.
_TIE = 0.5
# A sound model, however small, hesitates between some dozens of tokens in children's English; noise, among all.
_NONSENSE = 0.05
_LARGEST_ON_CPU = 2_000_000_000
_BYTES_ON_CPU = 5
_DAMAGED = f"the model may be damaged: exl download MODEL {param('verify')}, or take another quantization"


def check(
    name: str, models_dir: Path | None, free: Sequence[int], *, gpu: bool, ask: Ask, seconds: float
) -> Iterator[CheckResult]:
    """Everything about a model.

    Args:
        name: as `loader.resolve` takes it.
        models_dir: likewise.
        free: bytes free on each GPU.
        gpu: whether models can be run there at all.
        ask: asks a probe: its name, the time limit in seconds and its arguments.
        seconds: the time limit of one load and generation.
    """
    try:
        info = loader.resolve(name, models_dir)
    except ExlError as error:
        yield CheckResult("Model", "fail", error.message, error.hint, "all")
        return
    details = {"path": str(info.path), "format": info.format_name, "parameters": info.parameters}
    size = f"{parameters(info.parameters)} parameters, context {info.context_length:,}"
    yield CheckResult("Model", "ok", f"{info.name}, {info.format_name}, {size}", details=details)

    def run(probe: str, **arguments: Any) -> Answer:
        return ask(probe, seconds, {"model": name, "models_dir": str(models_dir) if models_dir else None, **arguments})

    on_gpu: dict[str, Any] | None = None
    if gpu:
        fits = _fits(info, free)
        yield fits
        if not fits.blocks:
            answer = run("generate", engine="exllamav2", new_tokens=NEW_TOKENS)
            result = _sense("On the GPU", answer, "gpu")
            yield result
            on_gpu = answer.value if result.status == "ok" else None
    if why := _too_large_for_cpu(info):
        yield CheckResult("On the CPU", "skip", why)
    elif on_gpu is not None:
        yield _agreement(run("compare", prompt=on_gpu["prompt"], tokens=on_gpu["tokens"]), on_gpu)
    else:
        yield _sense("On the CPU", run("generate", engine="cpu", new_tokens=NEW_TOKENS), "all")


def _fits(info: ModelInfo, free: Sequence[int]) -> CheckResult:
    if reason := support.why_not(info):
        return CheckResult("Fits", "warn", f"{reason}: it runs on the CPU", "", "gpu")
    context = loader.context_to_allocate(info, LoadOptions())
    needed = memory.estimate(info, context, "fp16")
    if needed is None:
        return CheckResult("Fits", "warn", "config.json does not give the dimensions that an estimate needs")
    try:
        # CUDA itself will have to fit into what is free now; the check takes it as counted.
        memory.check(info, context, "fp16", [max(0, count - needed.cuda) for count in free])
    except ExlError as error:
        return CheckResult("Fits", "fail", error.message, error.hint, "gpu")
    message = f"about {gib(needed.total)} of {gib(sum(free))} free, context {context:,}, fp16 cache"
    return CheckResult("Fits", "ok", message, details={"bytes": needed.total, "context": context})


def _too_large_for_cpu(info: ModelInfo) -> str:
    if info.parameters > _LARGEST_ON_CPU:
        return f"not tried: {parameters(info.parameters)} parameters take minutes there"
    room, needed = available_memory(), info.parameters * _BYTES_ON_CPU
    if room is not None and needed > room:
        return f"not tried: it takes {gib(needed)} of memory, {gib(room)} are free"
    return ""


def _sense(check: str, answer: Answer, blocks: Any) -> CheckResult:
    """Whether what an engine generated, and how it read, make sense."""
    if answer.value is None:
        exl_error = answer.problem.startswith("exl_cli.errors.")
        said, _, hint = answer.said.partition("; ") if exl_error else (answer.said, "", "")
        fix = answer.fix(hint or f"exl {param('debug')} run MODEL -p x shows where")
        return CheckResult(check, "fail", said, fix, blocks)
    facts = answer.value
    tokens, perplexity = facts["tokens"], facts["perplexity"]
    details = {key: facts[key] for key in ("perplexity", "tokens", "text", "tokens_per_second", "load_seconds")}
    problem = ""
    if perplexity is None:
        problem = "computes NaN"
    elif perplexity > _NONSENSE * facts["vocabulary"]:
        between = f"{perplexity:,.0f} of {facts['vocabulary']:,} tokens"
        problem = f"nonsense: it hesitates between {between} in plain English"
    elif len(tokens) >= NEW_TOKENS and len(set(tokens)) == 1:
        problem = f"nonsense: it repeats one token ({facts['text'][:20]!r}…)"
    if problem:
        return CheckResult(check, "fail", problem, _DAMAGED, blocks, details)
    rate = f"{len(tokens)} tokens at {facts['tokens_per_second']:,.0f} tokens/s"
    return CheckResult(check, "ok", f"{rate}, perplexity {perplexity:,.1f} in plain English", details=details)


def _agreement(answer: Answer, on_gpu: dict[str, Any]) -> CheckResult:
    """Whether the CPU engine would have chosen the tokens that exllamav2 chose."""
    if answer.value is None:
        return CheckResult("On the CPU", "warn", f"not compared: {answer.said}")
    check = "Engines agree"
    below, perplexity = list(answer.value["shortfalls"]), answer.value["perplexity"]
    details = {"shortfalls": below, "perplexity": perplexity}
    if perplexity is None:
        return CheckResult(check, "warn", "the CPU engine computes NaN, the GPU does not", "", "", details)
    both = f"perplexity {on_gpu['perplexity']:,.1f} on the GPU, {perplexity:,.1f} on the CPU"
    if below and max(below) > _TIE:
        at = next(index for index, gap in enumerate(below) if gap > _TIE)
        message = f"no: token {at + 1} is {below[at]:.1f} below the CPU engine's choice; {both}"
        fix = f"please report this, with exl doctor MODEL {param('json')}"
        return CheckResult(check, "fail", message, fix, "gpu", details)
    parted = sum(gap > 0 for gap in below)
    if not parted:
        return CheckResult(check, "ok", f"on all {len(below)} tokens; {both}", details=details)
    ties = f"the others near ties ({max(below):.2f} below)"
    return CheckResult(check, "ok", f"on {len(below) - parted} of {len(below)} tokens, {ties}; {both}", details=details)
