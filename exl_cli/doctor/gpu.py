"""Checks of torch, the driver and the GPUs."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from exl_cli.doctor.child import Answer
from exl_cli.doctor.finding import Finding
from exl_cli.engines.exllamav2.extension import environment, failures, install_hints
from exl_cli.engines.exllamav2.extension.compiled import parse_archs, sm, uncovered
from exl_cli.system.nvml import open_driver
from exl_cli.system.units import gib

# NVIDIA's "CUDA Compatibility", the oldest driver on Linux for each major version.
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# What CUDA and the smallest model take.
_LEAST_FREE = 1_200 * 2**20
_CROWDED = 0.5
_NVIDIA, _DISPLAY = "0x10de", "0x03"


def torch(installed: environment.Torch | None, answer: Answer) -> Finding:
    """Torch itself."""
    if installed is None:
        return Finding("torch", "fail", "not installed", install_hints.pip("torch"), "all")
    if answer.value is None:
        known = failures.explain(answer.problem, installed)
        what = known.what if known and answer.kind == "error" else answer.problem
        fix = (
            known.fix
            if known and not known.rebuild
            else install_hints.pip("--force-reinstall", f"torch=={_public(installed)}")
        )
        return Finding("torch", "fail", f"{installed.version}, importing it: {what}", answer.fix(fix), "all")
    details = {key: answer.value[key] for key in ("version", "cuda", "archs")}
    if installed.cuda is None:
        if installed.hip:
            return Finding("torch", "warn", f"{installed.version}, for ROCm: exl does not use it", "", "gpu", details)
        if has_nvidia_card():
            fix = install_hints.torch_with_cuda(installed)
            return Finding("torch", "fail", f"{installed.version}, built without CUDA", fix, "gpu", details)
        return Finding("torch", "ok", f"{installed.version}, built without CUDA", "", "gpu", details)
    return Finding("torch", "ok", f"{installed.version}, CUDA {installed.cuda}", details=details)


def _public(installed: environment.Torch) -> str:
    return installed.version.partition("+")[0]


def driver(installed: environment.Torch | None) -> Finding:
    """The NVIDIA driver."""
    nvml = open_driver()
    if nvml is None:
        return _no_driver()
    try:
        version = str(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # a container may withhold it
        version = "unknown"
    finally:
        nvml.nvmlShutdown()
    major = int(match[1]) if (match := re.match(r"(\d+)", version)) else 0
    oldest = _OLDEST_DRIVER.get(installed.cuda_major, 0) if installed else 0
    if major and major < oldest and installed:
        found = f"{version}, too old for CUDA {installed.cuda}, which needs {oldest} or later"
        return Finding("Driver", "fail", found, _driver_fix(str(oldest)), "gpu", {"version": version})
    return Finding("Driver", "ok", version, details={"version": version})


def _no_driver() -> Finding:
    if not has_nvidia_card():
        return Finding("Driver", "skip", "no NVIDIA GPU here", blocks="gpu")
    if in_container():
        fix = "start the container with the GPU: docker run --gpus all … (needs nvidia-container-toolkit on the host)"
        return Finding("Driver", "fail", "an NVIDIA GPU is there, but this container does not get it", fix, "gpu")
    return Finding("Driver", "fail", "an NVIDIA GPU is there, but its driver is not loaded", _driver_fix(""), "gpu")


def _driver_fix(version: str) -> str:
    if in_container():
        return "install a newer driver on the host of this container"
    if shutil.which("ubuntu-drivers"):
        return "sudo ubuntu-drivers install && sudo reboot"
    return f"install NVIDIA's driver{' ' + version + ' or later' if version else ''}, then restart"


def has_nvidia_card() -> bool:
    """Whether a display controller of NVIDIA is on the PCI bus, or its driver is there: in WSL that is all there is."""
    if Path("/dev/nvidiactl").exists() or open_driver() is not None:
        return True
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            if (device / "vendor").read_text().strip() == _NVIDIA and (device / "class").read_text().startswith(
                _DISPLAY
            ):
                return True
        except OSError:
            continue
    return False


def in_container() -> bool:
    """Whether this runs in a container."""
    return any(Path(marker).exists() for marker in ("/.dockerenv", "/run/.containerenv")) or "container" in os.environ


def gpus(answer: Answer, installed: environment.Torch | None) -> list[Finding]:
    """Each GPU that torch sees."""
    if answer.value is None or installed is None or installed.cuda is None:
        return [Finding("GPU", "skip", "not looked at: torch cannot use one", blocks="gpu")]
    found = answer.value["gpus"]
    if not found:
        return [_none(str(answer.value["why_not"]), installed)]
    findings = [_gpu(gpu, answer.value["archs"], installed) for gpu in found]
    if any(not finding.blocks for finding in findings):
        # One that works is enough.
        return [
            Finding(f.check, "warn" if f.status == "fail" else f.status, f.found, f.fix, "", f.details)
            for f in findings
        ]
    return findings


def _none(why: str, installed: environment.Torch) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and has_nvidia_card():
        what = f"hidden: CUDA_VISIBLE_DEVICES={hidden}" if hidden else "hidden: CUDA_VISIBLE_DEVICES is empty"
        return Finding("GPU", "fail", what, "unset CUDA_VISIBLE_DEVICES", "gpu")
    if not has_nvidia_card():
        return Finding("GPU", "skip", "none: models run on the CPU", blocks="gpu")
    known = failures.explain(why, installed)
    return Finding(
        "GPU", "fail", known.what if known else why or "torch finds none", known.fix if known else "nvidia-smi", "gpu"
    )


def _gpu(gpu: dict[str, Any], archs: list[str], installed: environment.Torch) -> Finding:
    check = f"GPU {gpu['index']}"
    capability = (int(gpu["capability"][0]), int(gpu["capability"][1]))
    found = f"{gpu['name']}, {sm(capability)}"
    # torch lists "sm_90" for machine code and "compute_90" for PTX, which later GPUs can use.
    codes = parse_archs(" ".join(arch + "+PTX" if arch.startswith("compute_") else arch for arch in archs))
    if codes and uncovered(codes, [capability]):
        what = f"{found}: torch {installed.version} holds code for {', '.join(archs)} only"
        older = capability < min((int(a.split(".")[0]), int(a.split(".")[1][0])) for a in codes)
        fix = "an older CUDA build of torch knows it, cu126 for instance: see pytorch.org, Get Started" if older else ""
        return Finding(check, "fail", what, fix or install_hints.pip("--upgrade", "torch"), "gpu", gpu)
    if gpu["free"] is None:
        return Finding(check, "ok", f"{found}, {gib(gpu['total'])}", details=gpu)
    found += f", {gib(gpu['free'])} of {gib(gpu['total'])} free"
    others = _others(gpu["processes"])
    if gpu["free"] < _LEAST_FREE:
        return Finding(check, "fail", f"{found}: full{others}", _free_it(gpu["processes"]), "gpu", gpu)
    if gpu["free"] < _CROWDED * gpu["total"]:
        return Finding(check, "warn", found + others, _free_it(gpu["processes"]), "", gpu)
    return Finding(check, "ok", found + others, details=gpu)


def _others(processes: list[dict[str, Any]]) -> str:
    """Who else uses it, the largest first."""
    named = [
        f"{process['name'] or 'a process'} ({process['pid']}"
        + (f", {gib(process['bytes'])})" if process["bytes"] else ")")
        for process in sorted(processes, key=lambda process: -(process["bytes"] or 0))
    ]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"; also used by {', '.join(named[:3])}{more}" if named else ""


def _free_it(processes: list[dict[str, Any]]) -> str:
    other = "or choose another GPU: CUDA_VISIBLE_DEVICES=NUMBER"
    mine = [process for process in processes if process["here"]]
    if not mine:
        return f"nvidia-smi shows who uses it; {other}"
    largest = max(mine, key=lambda process: process["bytes"] or 0)
    return f"end what uses it (kill {largest['pid']}), {other}"
