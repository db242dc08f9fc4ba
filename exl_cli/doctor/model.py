"""Check one model: does it run here, does it fit, is its output plausible, and do both engines agree."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from exl_cli import loader
from exl_cli.doctor.check_result import CheckResult, patience
from exl_cli.doctor.probes import NEW_TOKENS
from exl_cli.engines.exllamav2 import support
from exl_cli.errors import ExlError, param
from exl_cli.models import architecture, memory, placement
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.system.machine import available_memory
from exl_cli.system.questions import Answer
from exl_cli.system.units import GIB, gib, parameters

Ask = Callable[[str, dict[str, Any]], Answer]

# A gap between logits that rounding cannot explain: float16 logits of working models differ by less.
_TIE = 0.5
# Relative L2 error of logits. Correct engines were within 0.004 on 80 kinds of models, wrong ones off by 0.07 and more.
_APART = 0.02
# Perplexity over vocabulary size. Even a small working model has a perplexity of some dozens on simple English; noise
# reaches the vocabulary size.
_NONSENSE = 0.05
_LARGEST_ON_CPU = 2_000_000_000
_BYTES_ON_CPU = 5
_DAMAGED = f"the model may be damaged; check it with exl download MODEL {param('verify')}, or use another quantization"
_REPORT = f"please report this, with the output of exl doctor MODEL {param('json')}"

# Length of the text on which logits are compared, in its second half. For a model with a sliding window, use twice the
# window to test beyond it, unless that is too much work (weights times tokens) or memory (logits) for a CPU.
_TEXT_TOKENS = 256
_MOST_PRODUCTS, _MOST_LOGITS = 4e12, GIB


def check(name: str, models_dir: Path | None, free: Sequence[int], *, gpu: bool, ask: Ask) -> Iterator[CheckResult]:
    """Check a model.

    Args:
        name, models_dir: see `loader.resolve`.
        free: free bytes on each GPU.
        gpu: whether models can run on the GPU at all.
        ask: calls a probe by name with keyword arguments.
    """
    try:
        info = loader.resolve(name, models_dir)
    except ExlError as error:
        yield CheckResult("Model", "fail", error.message, error.hint, "all")
        return
    details = {"path": str(info.path), "format": info.format_name, "parameters": info.parameters}
    size = f"{parameters(info.parameters)} parameters, context {info.context_length:,}"
    yield CheckResult("Model", "ok", f"{info.name}, {info.format_name}, {size}", details=details)
    tokens, extent = _text(info)

    def run(probe: str, **arguments: Any) -> Answer:
        models = str(models_dir) if models_dir else None
        return ask(probe, {"model": name, "models_dir": models, "tokens": tokens, **arguments})

    too_large, on_gpu = _too_large_for_cpu(info), None
    with tempfile.TemporaryDirectory(prefix="exl-") as folder:
        logits = str(Path(folder) / "logits.pt")
        if gpu:
            fits = _fits(info, free)
            yield fits
            if not fits.blocks:
                answer = run("generate", engine="exllamav2", logits=None if too_large else logits)
                result = _sense("On the GPU", answer, "gpu")
                yield result
                on_gpu = answer.value if result.status == "ok" else None
        if on_gpu and not too_large:
            answer = run("compare", prompt=on_gpu["prompt"], new=on_gpu["tokens"], logits=logits)
            yield _agreement(answer, on_gpu["perplexity"], extent)
            return
    if too_large:
        yield CheckResult("On the CPU", "skip", too_large)
        if on_gpu:
            yield _alone(on_gpu, "GPU")
        return
    answer = run("generate", engine="cpu")
    result = _sense("On the CPU", answer, "all")
    yield result
    if answer.value and result.status == "ok":
        yield _alone(answer.value, "CPU")


def _text(info: ModelInfo) -> tuple[int, str]:
    """Number of tokens to compare logits over, and a remark on the sliding window."""
    plain = max(2, min(_TEXT_TOKENS, info.context_length - NEW_TOKENS))
    try:
        computed = architecture.read(info)
    except ExlError:  # not supported on the GPU: nothing to compare
        return plain, ""
    if not (window := max(computed.windows, default=0)):
        return plain, f"over {plain} tokens"
    tokens = max(plain, 2 * window)
    too_much = tokens * info.parameters > _MOST_PRODUCTS or 4 * tokens * computed.vocabulary > _MOST_LOGITS
    if too_much or tokens + NEW_TOKENS > info.context_length:
        return plain, f"over {plain} tokens, within the sliding window of {window:,}"
    return tokens, f"over {tokens:,} tokens, beyond the sliding window of {window:,}"


def _fits(info: ModelInfo, free: Sequence[int]) -> CheckResult:
    if reason := support.why_not(info):
        return CheckResult("Fits", "warn", f"{reason}; it runs on the CPU", "", "gpu")
    context = loader.context_to_allocate(info, LoadOptions())
    needed = memory.estimate(info, context, "fp16")
    if needed is None:
        return CheckResult("Fits", "warn", "cannot estimate: config.json lacks the model's dimensions")
    try:
        # placement.place expects free memory after the CUDA context, which does not exist yet.
        room = [max(0, count - needed.cuda) for count in free]
        shares = placement.place(info, context, "fp16", room) or []
    except ExlError as error:
        return CheckResult("Fits", "fail", error.message, error.hint, "gpu")
    message = f"about {gib(needed.total)} of {gib(sum(free))} free, context {context:,}, fp16 cache"
    if len(shares) > 1:
        message += f"; {placement.described(shares, room)}"
    return CheckResult("Fits", "ok", message, details={"bytes": needed.total, "context": context})


def _too_large_for_cpu(info: ModelInfo) -> str:
    if info.parameters > _LARGEST_ON_CPU:
        return f"skipped: with {parameters(info.parameters)} parameters it would take minutes"
    room, needed = available_memory(), info.parameters * _BYTES_ON_CPU
    if room is not None and needed > room:
        return f"skipped: it needs {gib(needed)} of memory, but only {gib(room)} is free"
    return ""


def _sense(check: str, answer: Answer, blocks: Any) -> CheckResult:
    """Judge an engine's output by perplexity and repetition."""
    if answer.value is None:
        exl_error = answer.problem.startswith("exl_cli.errors.")
        said, _, hint = answer.said.partition("; ") if exl_error else (answer.said, "", "")
        fix = patience(answer, hint or f"exl {param('debug')} run MODEL -p x")
        return CheckResult(check, "fail", said, fix, blocks)
    facts = answer.value
    tokens, perplexity = facts["tokens"], facts["perplexity"]
    details = {key: facts[key] for key in ("perplexity", "tokens", "text", "tokens_per_second", "load_seconds")}
    problem = ""
    if perplexity is None:
        problem = "produces NaN"
    elif perplexity > _NONSENSE * facts["vocabulary"]:
        between = f"{perplexity:,.0f} with a vocabulary of {facts['vocabulary']:,}"
        problem = f"garbage: perplexity {between} on plain English"
    elif len(tokens) >= NEW_TOKENS and len(set(tokens)) == 1:
        problem = f"garbage: repeats one token ({facts['text'][:20]!r}…)"
    if problem:
        return CheckResult(check, "fail", problem, _DAMAGED, blocks, details)
    rate = f"{len(tokens)} tokens at {facts['tokens_per_second']:,.0f} tokens/s"
    return CheckResult(check, "ok", f"{rate}, perplexity {perplexity:,.1f} on plain English", details=details)


def _parted(below: Sequence[float], where: str) -> tuple[str, bool]:
    """Describe how many tokens agree with the reference's choice, and whether all others are near ties.

    Args:
        below: see `scoring.shortfalls`.
        where: the reference, as "on the CPU".
    """
    if below and max(below) > _TIE:
        at = next(index for index, gap in enumerate(below) if gap > _TIE)
        return f"{where}, the logit of token {at + 1} is {below[at]:.1f} below the highest", False
    parted = sum(gap > 0 for gap in below)
    if not parted:
        return f"on all {len(below)} tokens", True
    return (
        f"on {len(below) - parted} of {len(below)} tokens, the rest are near ties (at most {max(below):.2f} apart)",
        True,
    )


def _alone(facts: dict[str, Any], where: str) -> CheckResult:
    """With one engine, compare its decoding with a single pass over prompt and response."""
    said, same = _parted(facts["shortfalls"], "in prefill")
    details = {"shortfalls": facts["shortfalls"]}
    message = f"skipped: only the {where} can run it; its prefill and decoding "
    if same:
        return CheckResult("Engines agree", "skip", f"{message}agree {said}", details=details)
    return CheckResult("Engines agree", "warn", f"{message}disagree: {said}", _REPORT, "", details)


def _agreement(answer: Answer, perplexity: float, extent: str) -> CheckResult:
    """Compare exllamav2's tokens and logits with the CPU engine's."""
    if answer.value is None:
        return CheckResult("On the CPU", "warn", f"comparison failed: {answer.said}")
    check, facts = "Engines agree", answer.value
    details = {key: facts[key] for key in ("shortfalls", "perplexity", "distances")}
    if facts["perplexity"] is None:
        return CheckResult(check, "warn", "the CPU engine produces NaN, the GPU does not", "", "", details)
    said, same = _parted(facts["shortfalls"], "on the CPU")
    way, worst = max(facts["distances"].items(), key=lambda item: _l2(item[1]))
    logits = f"logits differ by {_l2(worst):.2g} (relative L2, KL {worst['kl'] or 0.0:.2g}) {extent}"
    both = f"perplexity {perplexity:,.1f} on the GPU, {facts['perplexity']:,.1f} on the CPU"
    if not same:
        return CheckResult(check, "fail", f"no: {said}; {logits}; {both}", _REPORT, "gpu", details)
    if _l2(worst) > _APART:
        where = "in the prompt" if way == "prompt" else "while decoding"
        return CheckResult(check, "warn", f"{said}, but {logits}, {where}; {both}", _REPORT, "", details)
    return CheckResult(check, "ok", f"{said}; {logits}; {both}", details=details)


def _l2(distance: dict[str, float | None]) -> float:
    return float("inf") if distance["relative_l2"] is None else distance["relative_l2"]
