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


class Emulated:
    """A function of a `.cu` file.

    Args:
        folder: where compiled libraries are kept.
        file, name, defines: as of `compiler.Kernel`.
        argument: C's name of the type of its argument.
    """

    def __init__(self, folder: Path, file: str, name: str, argument: str, defines: Mapping[str, int]) -> None:
        shim = Path(__file__).with_name("emulate.h")
        lines = [f"#define {key} {value}" for key, value in defines.items()]
        lines += [f'#include "{shim}"', compiler.source(file)]
        lines += [
            f'extern "C" void run(const {argument}* a, unsigned x, unsigned y, unsigned threads)',
            f"{{ launch<{argument}>({name}, *a, Dim{{x, y, 1}}, threads); }}",
        ]
        text = "\n".join(lines)
        stem = hashlib.sha256((text + shim.read_text()).encode()).hexdigest()[:16]
        library = folder / f"{stem}.so"
        if not library.exists():
            cpp = folder / f"{stem}.cpp"
            cpp.write_text(text)
            command = [COMPILER or "g++", "-std=c++20", "-O1", "-mf16c", "-w", "-shared", "-fPIC", str(cpp), "-o"]
            done = subprocess.run([*command, str(library)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:4000]
        self._run = ctypes.CDLL(str(library)).run

    def __call__(self, argument: ctypes.Structure, grid: tuple[int, int], threads: int) -> None:
        """Run all blocks, one after the other."""
        self._run(ctypes.byref(argument), grid[0], grid[1], threads)
