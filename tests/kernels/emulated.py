"""Kernels compiled for the CPU by g++, together with `emulate.h`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from exl_cli.engines.exllamav2.kernels import compiler

COMPILER = shutil.which("g++")


_SHIM = Path(__file__).with_name("emulate.h").read_text()
_FLAGS = ("-std=c++20", "-O0", "-mf16c", "-w", "-fPIC")
_KEPT_SECONDS = 14 * 24 * 3600


def keep(folder: Path) -> Path:
    """Make a folder the one for compiled libraries, without those that were compiled weeks ago."""
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - file.stat().st_mtime > _KEPT_SECONDS:
                file.unlink()
    return folder


@functools.cache
def _compiler() -> str:
    """What compiles, with its version."""
    version = subprocess.run([COMPILER or "g++", "--version"], capture_output=True, text=True, check=True).stdout
    return " ".join([version, *_FLAGS])


def _compile(source: str, target: Path, suffix: str, *arguments: str) -> None:
    """Other processes find the result whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        file, made = Path(folder, f"source{suffix}"), Path(folder, "made")
        file.write_text(source)
        command = [COMPILER or "g++", *_FLAGS, *arguments, str(file), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        made.replace(target)


def _named(text: str) -> str:
    return hashlib.sha256((text + _compiler()).encode()).hexdigest()[:16]


def _shim(folder: Path) -> Path:
    """The shim, compiled once: it takes most of the time of a kernel."""
    shim = folder / f"{_named(_SHIM)}.h"
    compiled = shim.with_suffix(".h.gch")
    if not compiled.exists():
        own = folder / f"{os.getpid()}.h"
        own.write_text(_SHIM)
        own.replace(shim)
        _compile(_SHIM, compiled, ".h", "-x", "c++-header")
    return shim


class _Dim(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint) for name in "xyz")


class Emulated:
    """A function of a `.cu` file.

    Args:
        folder: where compiled libraries are kept.
        file, name, defines: as of `compiler.Kernel`.
        argument: C's name of the type of its argument.
    """

    def __init__(self, folder: Path, file: str, name: str, argument: str, defines: Mapping[str, int]) -> None:
        lines = [f'#include "{_shim(folder).name}"', *(f"#define {key} {value}" for key, value in defines.items())]
        lines.append(compiler.source(file))
        lines += [
            f'extern "C" void run(const {argument}* a, Dim grid, unsigned threads, unsigned seed)',
            f"{{ launch<{argument}>({name}, *a, grid, threads, seed); }}",
        ]
        text = "\n".join(lines)
        library = folder / f"{_named(text)}.so"
        if not library.exists():
            _compile(text, library, ".cpp", "-shared", f"-I{folder}")
        self._run = ctypes.CDLL(str(library)).run

    def __call__(self, argument: ctypes.Structure, grid: tuple[int, ...], threads: int, seed: int = 0) -> None:
        """Run all blocks, one after the other unless they wait for later ones; with a seed other than 0, out of order.

        Asynchronous copies take place when they are waited for, or with an odd seed when they are asked for.
        """
        self._run(ctypes.byref(argument), _Dim(*(*grid, 1, 1)[:3]), threads, seed)
