"""Kernels compiled for the CPU by g++, together with `emulate.h`."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from exl_cli.engines.exllamav2.kernels import compiler

COMPILER = shutil.which("g++")


_SHIM = Path(__file__).with_name("emulate.h")


def _compile(*arguments: str) -> None:
    command = [COMPILER or "g++", "-std=c++20", "-O0", "-mf16c", "-w", "-fPIC", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]


def _shim(folder: Path) -> Path:
    """The shim, compiled once: it takes most of the time of a kernel."""
    shim, compiled = folder / _SHIM.name, folder / f"{_SHIM.name}.gch"
    if not compiled.exists():
        shim.write_text(_SHIM.read_text())
        _compile("-x", "c++-header", str(shim), "-o", str(compiled))
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
        lines = [f'#include "{_shim(folder)}"', *(f"#define {key} {value}" for key, value in defines.items())]
        lines.append(compiler.source(file))
        lines += [
            f'extern "C" void run(const {argument}* a, Dim grid, unsigned threads, unsigned seed)',
            f"{{ launch<{argument}>({name}, *a, grid, threads, seed); }}",
        ]
        text = "\n".join(lines)
        stem = hashlib.sha256((text + _SHIM.read_text()).encode()).hexdigest()[:16]
        library = folder / f"{stem}.so"
        if not library.exists():
            cpp = folder / f"{stem}.cpp"
            cpp.write_text(text)
            _compile("-shared", str(cpp), "-o", str(library))
        self._run = ctypes.CDLL(str(library)).run

    def __call__(self, argument: ctypes.Structure, grid: tuple[int, ...], threads: int, seed: int = 0) -> None:
        """Run all blocks, one after the other unless they wait for later ones; with a seed other than 0, out of order.

        Asynchronous copies take place when they are waited for, or with an odd seed when they are asked for.
        """
        self._run(ctypes.byref(argument), _Dim(*(*grid, 1, 1)[:3]), threads, seed)
