"""Check torch, the NVIDIA driver, the GPUs, and the kernels that run on them."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from exl_cli.doctor.check_result import CheckResult, patience
from exl_cli.engines.exllamav2.extension import hints
from exl_cli.engines.exllamav2.extension.compiled import Torch, capability_of, parse_archs, sm, uncovered
from exl_cli.errors import param
from exl_cli.system.nvml import open_driver
from exl_cli.system.questions import Answer
from exl_cli.system.units import MIB, gib
from exl_cli.system.version import package_version

# Minimum Linux driver per CUDA major version (NVIDIA, "CUDA Compatibility").
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# Enough for a CUDA context and the smallest model.
_LEAST_FREE = 1_200 * MIB
_CROWDED = 0.5
_NVIDIA, _DISPLAY = "0x10de", "0x03"


def torch(installed: Torch | None, answer: Answer) -> CheckResult:
    """The installed torch."""
    if installed is None:
        return CheckResult("torch", "fail", "not installed", hints.pip("torch"), "all")
    if answer.value is None:
        known = hints.explain(answer.problem, installed)
        what = known.what if known and answer.kind == "error" else answer.problem
        fix = patience(answer, known.fix if known and not known.rebuild else hints.torch_again(installed))
        return CheckResult("torch", "fail", f"{installed.version}, but importing it failed: {what}", fix, "all")
    details = {key: answer.value[key] for key in ("version", "cuda", "archs")}
    if installed.cuda:
        return CheckResult("torch", "ok", f"{installed.version}, CUDA {installed.cuda}", details=details)
    if installed.hip:
        return CheckResult(
            "torch", "warn", f"{installed.version}, built for ROCm, which exl does not support", "", "gpu", details
        )
    message = f"{installed.version}, a CPU-only build"
    if has_nvidia_card():
        return CheckResult("torch", "fail", message, hints.torch_again(installed), "gpu", details)
    return CheckResult("torch", "ok", message, "", "gpu", details)


def driver(installed: Torch | None) -> CheckResult:
    """The NVIDIA driver."""
    with open_driver() as opened:
        if not opened:
            return _no_driver()
        version = str(opened.ask("SystemGetDriverVersion") or "unknown")
    oldest = _OLDEST_DRIVER.get(installed.cuda_major, 0) if installed else 0
    if installed and (match := re.match(r"(\d+)", version)) and int(match[1]) < oldest:
        message = f"{version}, too old: CUDA {installed.cuda} needs {oldest} or later"
        return CheckResult("Driver", "fail", message, _driver_fix(str(oldest)), "gpu", {"version": version})
    return CheckResult("Driver", "ok", version, details={"version": version})


def _no_driver() -> CheckResult:
    if not has_nvidia_card():
        return CheckResult("Driver", "skip", "no NVIDIA GPU found", blocks="gpu")
    problem, fix = "its driver is not loaded", _driver_fix("")
    if in_container():
        problem = "this container cannot access it"
        fix = "start the container with the GPU: docker run --gpus all … (the host needs nvidia-container-toolkit)"
    return CheckResult("Driver", "fail", f"there is an NVIDIA GPU, but {problem}", fix, "gpu")


def _driver_fix(version: str) -> str:
    if in_container():
        return "install a newer driver on the container's host"
    if shutil.which("ubuntu-drivers"):
        return "sudo ubuntu-drivers install && sudo reboot"
    return f"install NVIDIA's driver{' ' + version + ' or later' if version else ''}, then restart"


def has_nvidia_card() -> bool:
    """Whether there is an NVIDIA display controller on the PCI bus, or a driver (WSL has only the latter)."""
    with open_driver() as opened:
        if opened or Path("/dev/nvidiactl").exists():
            return True
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if vendor.strip() == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


def in_container() -> bool:
    return any(Path(marker).exists() for marker in ("/.dockerenv", "/run/.containerenv")) or "container" in os.environ


# --- the GPUs ---------------------------------------------------------------------------------------------------------


def gpus(answer: Answer, installed: Torch | None) -> list[CheckResult]:
    """The GPUs that torch sees."""
    if answer.value is None or installed is None or installed.cuda is None:
        return [CheckResult("GPU", "skip", "skipped: torch cannot use GPUs", blocks="gpu")]
    if not answer.value["gpus"]:
        return [_no_gpu(str(answer.value["why_not"]), installed)]
    results = [_gpu(gpu, answer.value["archs"], installed) for gpu in answer.value["gpus"]]
    if all(result.blocks for result in results):
        return results
    # One working GPU is enough.
    return [replace(r, blocks="", status="warn" if r.status == "fail" else r.status) for r in results]


def links(answer: Answer) -> list[CheckResult]:
    """Whether the GPUs can read each other's memory, for models split over several; nothing for a single GPU."""
    pairs = (answer.value or {}).get("links") or []
    if not pairs:
        return []
    kinds: dict[str, list[str]] = {}
    for pair in pairs:
        link = (pair["link"] or "peer access") if pair["peer"] else "no peer access, copies go through host memory"
        kinds.setdefault(link, []).append("-".join(map(str, pair["gpus"])))
    message = "; ".join(f"{link} ({', '.join(names)})" if len(kinds) > 1 else link for link, names in kinds.items())
    return [CheckResult("GPU links", "ok", message, details={"links": pairs})]


def _no_gpu(why: str, installed: Torch) -> CheckResult:
    if not has_nvidia_card():
        return CheckResult("GPU", "skip", "no NVIDIA GPU found; models run on the CPU", blocks="gpu")
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        message = f"hidden: CUDA_VISIBLE_DEVICES{'=' + hidden if hidden else ' is empty'}"
        return CheckResult("GPU", "fail", message, "unset CUDA_VISIBLE_DEVICES", "gpu")
    known = hints.explain(why, installed)
    message, fix = (known.what, known.fix) if known else (why or "torch finds no GPU", "nvidia-smi")
    return CheckResult("GPU", "fail", message, fix, "gpu")


def _gpu(gpu: dict[str, Any], archs: list[str], installed: Torch) -> CheckResult:
    check = f"GPU {gpu['index']}"
    capability = (int(gpu["capability"][0]), int(gpu["capability"][1]))
    message = f"{gpu['name']}, {sm(capability)}"
    # torch lists "sm_90" for binary code and "compute_90" for PTX, which also runs on later GPUs.
    codes = parse_archs(" ".join(arch + "+PTX" if arch.startswith("compute_") else arch for arch in archs))
    if codes and uncovered(codes, [capability]):
        message += f": torch {installed.version} only supports {', '.join(archs)}"
        older = capability < min(map(capability_of, codes))
        fix = "install an older CUDA build of torch, such as cu126: see Get Started on pytorch.org" if older else ""
        return CheckResult(check, "fail", message, fix or hints.pip("--upgrade", "torch"), "gpu", gpu)
    free, total, processes = gpu["free"], gpu["total"], gpu["processes"]
    if free is None:
        return CheckResult(check, "ok", f"{message}, {gib(total)}", details=gpu)
    message += f", {gib(free)} of {gib(total)} free"
    if free < _LEAST_FREE:
        return CheckResult(check, "fail", f"{message}: full{_others(processes)}", _free_it(processes), "gpu", gpu)
    crowded = free < _CROWDED * total
    fix = _free_it(processes) if crowded else ""
    return CheckResult(check, "warn" if crowded else "ok", message + _others(processes), fix, "", gpu)


def _others(processes: list[dict[str, Any]]) -> str:
    """The processes that use a GPU, the largest first."""
    named = []
    for process in sorted(processes, key=lambda process: -(process["bytes"] or 0)):
        size = f", {gib(process['bytes'])}" if process["bytes"] else ""
        named.append(f"{process['name'] or 'a process'} ({process['pid']}{size})")
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"; also used by {', '.join(named[:3])}{more}" if named else ""


def _free_it(processes: list[dict[str, Any]]) -> str:
    other = "or choose another GPU with CUDA_VISIBLE_DEVICES=NUMBER"
    mine = [process for process in processes if process["here"]]
    if not mine:
        return f"see what uses it with nvidia-smi, {other}"
    largest = max(mine, key=lambda process: process["bytes"] or 0)
    return f"end the process that uses it (kill {largest['pid']}), {other}"


# --- the kernels ------------------------------------------------------------------------------------------------------


def attention(answer: Answer | None) -> CheckResult:
    """The attention backend."""
    if answer is None:
        return CheckResult("Attention", "ok", "torch, causal (on the CPU)")
    if answer.value is None and answer.kind == "error":
        return CheckResult("Attention", "fail", answer.said, "", "gpu")
    if answer.value is None:
        fix = f"exl {param('debug')} run"
        return CheckResult("Attention", "fail", f"its smoke test {answer.problem}", fix, "gpu")
    if answer.value["decode"] == "torch":
        message = "plain torch: correct, but slow on long contexts, and decoding cannot use CUDA graphs"
        reason = "".join(f" ({name}: {reason})" for name, reason in answer.value["why_not"].items())
        return CheckResult("Attention", "warn", message + reason, "", "", answer.value)
    return CheckResult("Attention", "ok", "exl's Triton kernels, paged", details=answer.value)


def decoding(answer: Answer | None) -> CheckResult:
    """exl's kernels for quantized matrices; exllamav2's are the fallback."""
    if answer is None:
        return CheckResult("Kernels", "skip", "skipped: no GPU")
    if answer.value is None:
        # The same crash or hang would occur while loading a model; the variable disables the kernels.
        fix = patience(answer, "export EXL_KERNELS=exllamav2")
        return CheckResult("Kernels", "fail", f"compiling exl's kernels failed: {answer.said}", fix, "gpu")
    if reason := answer.value["why_not"]:
        return CheckResult("Kernels", "warn", f"exllamav2's, at most half as fast as exl's: {reason}")
    return CheckResult("Kernels", "ok", "exl's, compiled for this GPU with torch's NVRTC")


def triton(attention: Answer | None) -> CheckResult:
    """Triton, judged by whether exl's attention kernels, which use it, run."""
    here = package_version("triton")
    if here is None:
        return CheckResult("Triton", "skip", "not installed")
    if attention is None:
        return CheckResult("Triton", "skip", f"{here}; skipped: no GPU")
    if reason := (attention.value or {}).get("why_not", {}).get("triton", ""):
        return CheckResult("Triton", "warn", f"{here}, but exl's kernels do not run: {reason}", hints.compiler())
    return CheckResult("Triton", "ok", here)


def flash_attn() -> CheckResult:
    """flash-attn, which exl does not use."""
    return CheckResult("flash-attn", "skip", f"{package_version('flash-attn') or 'not installed'}; exl does not use it")
