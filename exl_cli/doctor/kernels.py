"""Checks of what computes attention, and of what decodes."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from exl_cli.doctor.child import Answer
from exl_cli.doctor.finding import Finding
from exl_cli.engines.exllamav2.extension import install_hints

_NAMES = {"flash-attn": "flash-attn", "torch-varlen": "torch's paged attention", "triton": "exl's Triton kernels"}
_MEANING = {
    "torch": "plain torch: right, but slow on long contexts, and a step cannot be one CUDA graph",
}


def installed(distribution: str) -> str | None:
    """A package's version."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def attention(answer: Answer | None) -> Finding:
    """What will be used, and what that means."""
    if answer is None:
        return Finding("Attention", "ok", "torch, causal (on the CPU)")
    if answer.value is None:
        if answer.kind == "error":
            return Finding("Attention", "fail", answer.said, "", "gpu")
        fix = install_hints.pip("flash-attn", verb="uninstall") if has_flash_attn() else "exl --debug run shows where"
        return Finding("Attention", "fail", f"choosing it {answer.problem}", fix, "gpu")
    decode, prefill = answer.value["decode"], answer.value["prefill"]
    why_not = [f"{name}: {reason}" for name, reason in answer.value["why_not"].items()]
    if decode in _MEANING:
        reasons = f" ({'; '.join(why_not)})" if why_not else ""
        return Finding("Attention", "warn", _MEANING[decode] + reasons, "", "", answer.value)
    found = f"{_NAMES.get(decode, decode)}, paged"
    if prefill != decode:
        found += f"; prompts by {_NAMES.get(prefill, prefill)}"
    return Finding("Attention", "ok", found, details=answer.value)


def decoding(answer: Answer | None) -> Finding:
    """exl's own kernels for EXL2 and GPTQ matrices; without them exllamav2's do the work."""
    if answer is None:
        return Finding("Kernels", "skip", "not tried: there is no GPU")
    if answer.value is None:
        said = answer.said if answer.kind == "error" else answer.problem
        # A crash or a hang would come on the way to a model, too; this leaves them out.
        fix = answer.fix("EXL_KERNELS=exllamav2 in the environment")
        return Finding("Kernels", "fail", f"compiling exl's own: {said}", fix, "gpu")
    if reason := answer.value["why_not"]:
        return Finding("Kernels", "warn", f"exllamav2's own, at most half as fast: {reason}")
    return Finding("Kernels", "ok", "exl's own, compiled for this GPU by the NVRTC of torch")


def has_flash_attn() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def flash_attn(answer: Answer | None) -> Finding:
    """flash-attn, which exl does well without."""
    if not has_flash_attn():
        return Finding("flash-attn", "skip", "not installed; exl does without")
    here = installed("flash-attn") or "of unknown version"
    if answer is None:
        return Finding("flash-attn", "skip", f"{here}, not tried: there is no GPU")
    remove = install_hints.pip("flash-attn", verb="uninstall")
    if answer.value is None:
        fails = "importing it " + (f"fails: {answer.said}" if answer.kind == "error" else answer.problem)
        # An exception is caught on the way to a model; a crash or a hang is not.
        crash = answer.kind != "error"
        return Finding("flash-attn", "fail" if crash else "warn", f"{here}: {fails}", remove, "gpu" if crash else "")
    if problem := answer.value["problem"]:
        return Finding("flash-attn", "warn", f"{here} {problem}: exl goes on without it", remove)
    return Finding("flash-attn", "ok", f"{here} loads")


def triton(answer: Answer | None, chosen: Answer | None) -> Finding:
    """Triton, in which exl's attention kernels are written."""
    if importlib.util.find_spec("triton") is None:
        return Finding("Triton", "skip", "not installed")
    here = installed("triton") or "of unknown version"
    if answer is None:
        return Finding("Triton", "skip", f"{here}, not tried: there is no GPU")
    if answer.value is None:
        fix = install_hints.pip("--force-reinstall", "triton")
        return Finding("Triton", "warn", f"{here} cannot be imported: {answer.said}", fix)
    reason = (chosen.value or {}).get("why_not", {}).get("triton", "") if chosen else ""
    if reason:
        return Finding("Triton", "warn", f"{here}: exl's kernels do not run: {reason}", install_hints.compiler())
    return Finding("Triton", "ok", here)
