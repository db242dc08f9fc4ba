"""The program that compiles: it imports `exllamav2.ext`, which hands its sources to `torch.utils.cpp_extension.load`.

Run by `build` in a separate process and session, with what to do as JSON; it ends when its stdin does. On stdout,
among whatever else is printed there, ninja writes a line "@exl DONE/TOTAL COMMAND" for each file that is finished, and
the worker "@exl {…}" with one of:

- folder, archs, waiting (names of the files to make), slower (than the figures of `jobs`): ninja begins;
- built: the path of the library, which is whole and was not loaded;
- failed: an exception's text; fix: the next step, where it is known.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any

from exl_cli.engines.exllamav2.extension import environment
from exl_cli.engines.exllamav2.extension.compiled import (
    LIBRARY,
    MODULE,
    build_folder,
    capability_of,
    parse_archs,
    sm,
    uncovered,
)
from exl_cli.engines.exllamav2.extension.jobs import SMALLEST_SECONDS
from exl_cli.errors import EngineError, param

MARK = "@exl "
STATUS = f"{MARK}%f/%t "  # for NINJA_STATUS
# Begins torch's message, too, where ninja fails; what failed was printed before.
COMPILER_FAILED = "Error building extension"

# What every .cu file of the extension includes by way of torch's headers; `jobs` knows how long this takes.
_SMALLEST = """#include <cuda_runtime.h>
#include <cublas_v2.h>
#include <cusparse.h>
#include <cusolverDn.h>
__global__ void f(float* x) { *x = 1; }
"""


_spec_from_file = importlib.util.spec_from_file_location


class _BuiltError(BaseException):
    """Leaves `load` where it would import the library. No Exception: nothing on the way may swallow it."""


def main() -> None:
    """The process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _import_extension(**json.loads(sys.argv[1]))
    except EngineError as error:
        _emit(failed=error.message, fix=error.hint)
    except Exception as error:  # whatever torch, setuptools or exllamav2 raise
        _emit(failed=str(error) or type(error).__name__)
    # exllamav2 shows a build in a thread that would wait for more.
    os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM)  # ninja ends its compilers


def _emit(**event: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(event)}\n")
    sys.stdout.flush()


def _import_extension(*, asked: bool, again: bool) -> None:
    """Import `exllamav2.ext` with a `load` that compiles into a folder of exl's.

    Args:
        asked: whether the user gave the architectures; else they are exllamav2's choice, the GPUs that are here.
        again: compile everything, also what an interrupted build has finished.
    """
    import torch
    from torch.utils import cpp_extension

    gpus = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not gpus:
        arch = param("arch")
        raise EngineError(f"there is no GPU here to compile for: say which with {arch}, as {arch} 8.6")
    load = cpp_extension.load

    def load_here(name: str, sources: list[str], **options: Any) -> None:
        chosen = os.environ["TORCH_CUDA_ARCH_LIST"]
        archs = parse_archs(chosen)
        # A list left over from something else.
        if not asked and (missing := uncovered(archs, gpus)):
            what = f"TORCH_CUDA_ARCH_LIST={chosen} leaves out the GPU here ({sm(missing[0])})"
            raise EngineError(what, "unset TORCH_CUDA_ARCH_LIST")
        folder = _prepare(archs, again=again)
        slower = _check_nvcc(archs)
        made = _in_ninja_log(folder)
        objects = [Path(s).stem + (".cuda.o" if s.endswith(".cu") else ".o") for s in sources] + [LIBRARY]
        waiting = [name for name in objects if name not in made]
        _emit(folder=str(folder), archs=archs, waiting=waiting, slower=slower)
        with contextlib.suppress(_BuiltError):
            load(name=name, sources=sources, **{**options, "verbose": True})
        _emit(built=str(folder / LIBRARY))
        os._exit(0)

    cpp_extension.load = load_here  # type: ignore[assignment]
    importlib.util.spec_from_file_location = _stop_at_extension
    # As if no prebuilt extension were there, which would be taken instead.
    sys.modules[MODULE] = None  # type: ignore[assignment]
    # The package without its __init__, which imports everything that needs the extension.
    spec = importlib.util.find_spec(environment.EXLLAMAV2)
    package = types.ModuleType(environment.EXLLAMAV2)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or []) if spec else []
    sys.modules[environment.EXLLAMAV2] = package
    importlib.import_module(f"{environment.EXLLAMAV2}.ext")


def _stop_at_extension(name: str, *arguments: Any, **options: Any) -> Any:
    if name == MODULE:
        raise _BuiltError
    return _spec_from_file(name, *arguments, **options)


def _prepare(archs: tuple[str, ...], *, again: bool) -> Path:
    """torch's build folder, inside of exl's for these architectures."""
    torch = environment.torch_here()
    if torch is None:
        raise RuntimeError("torch is not installed")
    root = build_folder(torch, archs) / "build"
    if again:
        shutil.rmtree(root, ignore_errors=True)
    folder = root / MODULE
    folder.mkdir(parents=True, exist_ok=True)
    # torch waits while its lock is there. Under exl's own lock no one else builds here: it is a killed build's.
    (folder / "lock").unlink(missing_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    return folder


def _in_ninja_log(folder: Path) -> set[str]:
    """The files that an earlier build finished: start, end, time, name and hash are a line of ninja's log."""
    try:
        lines = (folder / ".ninja_log").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {fields[3] for line in lines if len(fields := line.split("\t")) > 4 and (folder / fields[3]).exists()}


def _check_nvcc(archs: tuple[str, ...]) -> float:
    """Compile a few lines: whether nvcc, its headers, this g++ and the GPU go together shows in a second or two.

    Returns how many times as long it took as on the machine of `jobs`' figures.
    """
    numbers = ["{}{}".format(*capability_of(arch)) for arch in archs]
    flags = ["-std=c++17", *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers)]
    if compiler := os.environ.get("CC"):
        flags += ["-ccbin", compiler]  # as torch does
    home = Path(os.environ["CUDA_HOME"])
    nvcc = shlex.split(os.environ.get("PYTORCH_NVCC", "")) or [str(home / "bin" / "nvcc")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cu"
        source.write_text(_SMALLEST, encoding="utf-8")
        flags += ["-isystem", str(home / "include"), "-c", str(source), "-o", str(source.with_suffix(".o"))]
        begun = time.monotonic()
        done = subprocess.run([*nvcc, *flags], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)  # noqa: S603
        if done.returncode:
            raise RuntimeError(f"{COMPILER_FAILED}: nvcc does not compile a few lines")
        return (time.monotonic() - begun) / SMALLEST_SECONDS


if __name__ == "__main__":
    main()
