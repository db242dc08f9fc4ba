"""Checks of one model: can it be run here, does it fit, does it speak sense, and do both engines agree on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from exl_cli import loader
from exl_cli.doctor.child import Answer
from exl_cli.doctor.finding import Finding
from exl_cli.engines.exllamav2 import support
from exl_cli.errors import ExlError
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


def check(
    name: str, models_dir: Path | None, free: Sequence[int], *, gpu: bool, ask: Ask, seconds: float
) -> Iterator[Finding]:
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
        yield Finding("Model", "fail", error.message, error.hint, "all")
        return
    details = {"path": str(info.path), "format": info.format_name, "parameters": info.parameters}
    what = f"{info.name}, {info.format_name}, {parameters(info.parameters)} parameters, context {info.context_length:,}"
    yield Finding("Model", "ok", what, details=details)
    where: dict[str, Any] = {"model": name, "models_dir": str(models_dir) if models_dir else None}
    on_gpu: dict[str, Any] | None = None
    if gpu:
        obstacle = _fits(info, free)
        yield obstacle
        if not obstacle.blocks:
            answer = ask("generate", seconds, {**where, "engine": "exllamav2", "new_tokens": NEW_TOKENS})
            finding = _sense("On the GPU", answer, "gpu")
            yield finding
            on_gpu = answer.value if finding.status == "ok" else None
    if why := _too_large_for_cpu(info):
        yield Finding("On the CPU", "skip", why)
    elif on_gpu is not None:
        arguments = {**where, "prompt": on_gpu["prompt"], "tokens": on_gpu["tokens"]}
        yield _agreement(ask("compare", seconds, arguments), on_gpu)
    else:
        yield _sense(
            "On the CPU", ask("generate", seconds, {**where, "engine": "cpu", "new_tokens": NEW_TOKENS}), "all"
        )


def _fits(info: ModelInfo, free: Sequence[int]) -> Finding:
    if reason := support.why_not(info):
        return Finding("Fits", "warn", f"{reason}: it runs on the CPU", "", "gpu")
    context = loader.context_to_allocate(info, LoadOptions())
    needed = memory.estimate(info, context, "fp16")
    if needed is None:
        return Finding("Fits", "warn", "config.json does not give the dimensions that an estimate needs")
    try:
        # What is free now will have to hold CUDA itself as well, which the check takes as counted.
        memory.check(info, context, "fp16", [max(0, count - needed.cuda) for count in free])
    except ExlError as error:
        return Finding("Fits", "fail", error.message, error.hint, "gpu")
    found = f"about {gib(needed.total)} of {gib(sum(free))} free, context {context:,}, fp16 cache"
    return Finding("Fits", "ok", found, details={"bytes": needed.total, "context": context})


def _too_large_for_cpu(info: ModelInfo) -> str:
    if info.parameters > _LARGEST_ON_CPU:
        return f"not tried: {parameters(info.parameters)} parameters take minutes there"
    room = available_memory()
    if room is not None and info.parameters * _BYTES_ON_CPU > room:
        return f"not tried: it takes {gib(info.parameters * _BYTES_ON_CPU)} of memory, {gib(room)} are free"
    return ""


def _sense(check: str, answer: Answer, blocks: Any) -> Finding:
    """Whether what an engine generated, and how it read, make sense."""
    if answer.value is None:
        said, _, hint = (
            answer.said.partition("; ") if answer.problem.startswith("exl_cli.errors.") else (answer.said, "", "")
        )
        return Finding(check, "fail", said, answer.fix(hint or "exl --debug run MODEL -p x shows where"), blocks)
    value = answer.value
    tokens, found = value["tokens"], value["perplexity"]
    details = {key: value[key] for key in ("perplexity", "tokens", "text", "tokens_per_second", "load_seconds")}
    if found is None:
        return Finding(check, "fail", "computes NaN", _DAMAGED, blocks, details)
    if found > _NONSENSE * value["vocabulary"]:
        what = f"nonsense: it hesitates between {found:,.0f} of {value['vocabulary']:,} tokens in plain English"
        return Finding(check, "fail", what, _DAMAGED, blocks, details)
    if len(tokens) >= NEW_TOKENS and len(set(tokens)) == 1:
        return Finding(
            check, "fail", f"nonsense: it repeats one token ({value['text'][:20]!r}…)", _DAMAGED, blocks, details
        )
    what = (
        f"{len(tokens)} tokens at {value['tokens_per_second']:,.0f} tokens/s, perplexity {found:,.1f} in plain English"
    )
    return Finding(check, "ok", what, details=details)


_DAMAGED = "the model may be damaged: exl download MODEL --verify, or take another quantization"


def _agreement(answer: Answer, on_gpu: dict[str, Any]) -> Finding:
    """Whether the CPU engine would have chosen what exllamav2 chose."""
    if answer.value is None:
        return Finding("On the CPU", "warn", f"not compared: {answer.said}")
    below = list(answer.value["shortfalls"])
    found = answer.value["perplexity"]
    details = {"shortfalls": below, "perplexity": found}
    if found is None:
        return Finding("Engines agree", "warn", "the CPU engine computes NaN, the GPU does not", "", "", details)
    parted = [index for index, gap in enumerate(below) if gap > 0]
    both = f"perplexity {on_gpu['perplexity']:,.1f} on the GPU, {found:,.1f} on the CPU"
    if below and max(below) > _TIE:
        at = next(index for index, gap in enumerate(below) if gap > _TIE)
        what = f"no: token {at + 1} is {below[at]:.1f} below the CPU engine's choice; {both}"
        return Finding(
            "Engines agree", "fail", what, "please report this, with exl doctor MODEL --json", "gpu", details
        )
    if not parted:
        return Finding("Engines agree", "ok", f"on all {len(below)} tokens; {both}", details=details)
    what = (
        f"on {len(below) - len(parted)} of {len(below)} tokens, the others near ties ({max(below):.2f} below); {both}"
    )
    return Finding("Engines agree", "ok", what, details=details)
