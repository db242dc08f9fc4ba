"""Checks of what is around exl: Python, memory, disk, the models folder, the Hub, the terminal."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from exl_cli.doctor.child import Answer
from exl_cli.doctor.finding import Finding
from exl_cli.engines.exllamav2.extension import install_hints
from exl_cli.models import folders
from exl_cli.system.machine import available_memory, usable_cores
from exl_cli.system.units import GIB, gib, size

_NEWEST_TRIED = (3, 13)
# A 7B model at 4 bits takes 4 to 5 GB.
_ROOM_FOR_A_MODEL = 6 * 10**9


def python() -> Finding:
    """This Python."""
    version = platform.python_version()
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    found = f"{version}, {sys.executable} ({kind})"
    details = {"version": version, "executable": sys.executable, "prefix": sys.prefix}
    if sys.version_info[:2] > _NEWEST_TRIED:
        newest = f"{_NEWEST_TRIED[0]}.{_NEWEST_TRIED[1]}"
        return Finding("Python", "warn", f"{found}; exl is tried up to {newest}", f"use Python {newest}", "", details)
    return Finding("Python", "ok", found, details=details)


def processor() -> Finding:
    """Cores and memory, of which the CPU engine and compilers live."""
    cores, free = usable_cores(), available_memory()
    details = {"cores": cores, "memory_free_bytes": free}
    found = f"{cores} core{'s' if cores > 1 else ''}"
    if free is None:
        return Finding("Processor", "ok", found, details=details)
    found += f", {gib(free)} of memory free"
    if free < GIB:
        return Finding("Processor", "warn", found, "end programs that take memory", "", details)
    return Finding("Processor", "ok", found, details=details)


def models(folder: Path | None) -> Finding:
    """The models folder and the disk it is on."""
    path = folders.models_dir(folder)
    names = folders.known_models(folder)[1:]
    standing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(standing).free
    count = f"{len(names)} model{'' if len(names) == 1 else 's'}" if path.exists() else "not made yet"
    found = f"{path} ({count}), {size(free)} free"
    details = {"path": str(path), "models": names, "free_bytes": free}
    if not os.access(standing, os.W_OK | os.X_OK) or not standing.is_dir():
        fix = "choose one that can be written: export EXL_MODELS_DIR=FOLDER"
        return Finding("Models folder", "warn", f"{path} cannot be written", fix, "", details)
    if free < _ROOM_FOR_A_MODEL:
        fix = "free some space (exl rm MODEL), or move it: export EXL_MODELS_DIR=FOLDER"
        return Finding("Models folder", "warn", f"{found}: too little for a 7B model", fix, "", details)
    return Finding("Models folder", "ok", found, details=details)


def hub(answer: Answer) -> Finding:
    """Whether the Hub can be reached, and as whom."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("Hub", "warn", "HF_HUB_OFFLINE is set: nothing can be downloaded", "unset HF_HUB_OFFLINE")
    where = os.environ.get("HF_ENDPOINT") or "the Hub"
    if answer.value is None:
        fix = "check the network, HTTPS_PROXY and HF_ENDPOINT; models that are here run without it"
        return Finding("Hub", "warn", f"{where} cannot be reached ({answer.said})", fix)
    value = answer.value
    if value["status"] >= 400:
        return Finding(
            "Hub", "warn", f"{where} answers with {value['status']}", "check HF_ENDPOINT and proxies", "", value
        )
    if "refused" in value:
        return Finding(
            "Hub", "warn", f"{where} does not accept the token: {value['refused']}", "hf auth login", "", value
        )
    login = f"logged in as {value['user']}" if value["token"] else "not logged in (hf auth login, for gated models)"
    return Finding("Hub", "ok", f"{where} answers, {login}", details=value)


@dataclass(frozen=True)
class Terminal:
    """A terminal's properties, as rich reads them.

    Attributes:
        encoding: of stdout.
        is_terminal, width, colors: of stderr: whether it is one at all, its columns, rich's name for its colours.
    """

    encoding: str
    is_terminal: bool
    width: int
    colors: str | None


def terminal(here: Terminal) -> Finding:
    """What the terminal can show."""
    encoding = here.encoding.lower().replace("-", "")
    details = {"terminal": here.is_terminal, "encoding": encoding, "width": here.width}
    if not here.is_terminal:
        return Finding("Terminal", "skip", "none here: output is plain", details=details)
    colours = {None: "no colours", "standard": "16 colours", "256": "256 colours", "truecolor": "all colours"}
    name = os.environ.get("TERM", "unknown")
    found = f"{name}, {colours.get(here.colors, 'colours')}, {here.width} columns"
    if encoding != "utf8":
        return Finding(
            "Terminal", "warn", f"{found}, {encoding}: other letters are lost", "export LANG=C.UTF-8", "", details
        )
    return Finding("Terminal", "ok", f"{found}, UTF-8", details=details)


def cpu_engine(answer: Answer) -> Finding:
    """Whether the engine that every machine has can be imported."""
    if answer.value is None:
        mended = install_hints.pip("--upgrade", "transformers", "torch")
        return Finding("CPU engine", "fail", f"importing it: {answer.said}", answer.fix(mended), "all")
    return Finding("CPU engine", "ok", f"transformers {answer.value['transformers']}", details=answer.value)
