"""Check the machine: Python, memory, the CPU engine, disk, the Hub, the terminal."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from exl_cli.doctor.check_result import CheckResult, patience
from exl_cli.engines.exllamav2.extension import hints
from exl_cli.models import folders
from exl_cli.system.files import is_there
from exl_cli.system.machine import available_memory, usable_cores
from exl_cli.system.questions import Answer
from exl_cli.system.units import GIB, gib, size

_NEWEST_TRIED = (3, 13)
# A 4-bit 7B model takes 4 to 5 GB.
_ROOM_FOR_A_MODEL = 6 * 10**9


def python() -> CheckResult:
    version = platform.python_version()
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    message = f"{version}, {sys.executable} ({kind})"
    details = {"version": version, "executable": sys.executable, "prefix": sys.prefix}
    if sys.version_info[:2] > _NEWEST_TRIED:
        newest = "{}.{}".format(*_NEWEST_TRIED)
        message += f"; exl is tested up to {newest}"
        return CheckResult("Python", "warn", message, f"use Python {newest}", "", details)
    return CheckResult("Python", "ok", message, details=details)


def processor() -> CheckResult:
    """Cores and free host memory."""
    cores, free = usable_cores(), available_memory()
    message = f"{cores} core{'s' if cores > 1 else ''}"
    message += "" if free is None else f", {gib(free)} of memory free"
    short = free is not None and free < GIB
    fix = "close programs that use a lot of memory" if short else ""
    details = {"cores": cores, "memory_free_bytes": free}
    return CheckResult("Processor", "warn" if short else "ok", message, fix, "", details)


def cpu_engine(answer: Answer) -> CheckResult:
    """Whether the CPU engine can be imported."""
    if answer.value is None:
        fix = patience(answer, hints.pip("--upgrade", "transformers", "torch"))
        return CheckResult("CPU engine", "fail", f"importing it failed: {answer.said}", fix, "all")
    return CheckResult("CPU engine", "ok", f"transformers {answer.value['transformers']}", details=answer.value)


def models(folder: Path | None) -> CheckResult:
    """The models folder and its disk."""
    path = folders.models_dir(folder)
    names = folders.known_models(folder)[1:]
    standing = next(parent for parent in (path, *path.parents) if is_there(parent))
    free = shutil.disk_usage(standing).free
    count = f"{len(names)} model{'' if len(names) == 1 else 's'}" if is_there(path) else "not created yet"
    message = f"{path} ({count}), {size(free)} free"
    details = {"path": str(path), "models": names, "free_bytes": free}
    if not os.access(standing, os.W_OK | os.X_OK) or not standing.is_dir():
        fix = "export EXL_MODELS_DIR=FOLDER (a writable one)"
        return CheckResult("Models folder", "warn", f"{path} is not writable", fix, "", details)
    if free < _ROOM_FOR_A_MODEL:
        fix = "free some space (exl rm MODEL), or use another disk: export EXL_MODELS_DIR=FOLDER"
        return CheckResult("Models folder", "warn", f"{message}, too little for a 7B model", fix, "", details)
    return CheckResult("Models folder", "ok", message, details=details)


def hub(answer: Answer) -> CheckResult:
    """Whether the Hub is reachable, and who is logged in."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return CheckResult("Hub", "warn", "HF_HUB_OFFLINE is set: nothing can be downloaded", "unset HF_HUB_OFFLINE")
    where = os.environ.get("HF_ENDPOINT") or "the Hub"
    if answer.value is None:
        fix = "check the network, HTTPS_PROXY and HF_ENDPOINT; downloaded models work offline"
        return CheckResult("Hub", "warn", f"cannot reach {where} ({answer.said})", fix)
    facts, fix = answer.value, ""
    if facts["status"] >= 400:
        message, fix = f"responds with HTTP {facts['status']}", "check HF_ENDPOINT and proxies"
    elif "refused" in facts:
        message, fix = f"rejects the token: {facts['refused']}", "hf auth login"
    elif facts["token"]:
        message = f"reachable, logged in as {facts['user']}"
    else:
        message = "reachable, not logged in (gated models need hf auth login)"
    return CheckResult("Hub", "warn" if fix else "ok", f"{where} {message}", fix, "", facts)


@dataclass(frozen=True)
class Terminal:
    """Properties of the terminal, from rich.

    Attributes:
        encoding: stdout's encoding.
        is_terminal, width, colors: stderr's: whether it is a terminal, columns, and rich's name of the colour system.
    """

    encoding: str
    is_terminal: bool
    width: int
    colors: str | None


def terminal(here: Terminal) -> CheckResult:
    """The terminal's colours, width and encoding."""
    encoding = here.encoding.lower().replace("-", "")
    details = {"terminal": here.is_terminal, "encoding": encoding, "width": here.width}
    if not here.is_terminal:
        return CheckResult("Terminal", "skip", "not a terminal; output is plain text", details=details)
    colours = {None: "no colours", "standard": "16 colours", "256": "256 colours", "truecolor": "true colour"}
    name = os.environ.get("TERM", "unknown")
    message = f"{name}, {colours.get(here.colors, 'colours')}, {here.width} columns"
    if encoding != "utf8":
        message += f", {encoding}: characters outside it are lost"
        return CheckResult("Terminal", "warn", message, "export LANG=C.UTF-8", "", details)
    return CheckResult("Terminal", "ok", f"{message}, UTF-8", details=details)
