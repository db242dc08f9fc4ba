"""Find the tools to compile with: nvcc of torch's CUDA version, a C++ compiler, ninja, Python's headers.

We search more places than torch does: ninja also beside this Python, since an unactivated virtual environment is not on
PATH, and nvcc also in NVIDIA's Python packages. `variables` is the environment that lets torch find them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from exl_cli.engines.exllamav2.extension import hints
from exl_cli.engines.exllamav2.extension.compiled import Torch, capability_of

_SECONDS = 20.0
# Every .cu file of the extension includes these through torch's headers.
_HEADERS = ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h")
_FEW_LINES = "".join(f"#include <{name}>\n" for name in _HEADERS) + "__global__ void f(float* x) { *x = 1; }\n"


class Tool(NamedTuple):
    """A tool: path and version if it was found, else its problem and the command that fixes it."""

    name: str
    path: Path | None = None
    version: str = ""
    problem: str = ""
    fix: str = ""


class Toolchain(NamedTuple):
    """All tools, in the order in which to fix them."""

    nvcc: Tool
    compiler: Tool
    ninja: Tool
    headers: Tool

    @property
    def problems(self) -> list[Tool]:
        return [tool for tool in self if tool.problem]

    @property
    def fix(self) -> str:
        return hints.joined([tool.fix for tool in self.problems])


def find(torch: Torch) -> Toolchain:
    """Find all tools for this torch."""
    return Toolchain(nvcc(torch), compiler(), ninja(), headers())


def nvcc(torch: Torch) -> Tool:
    """nvcc of torch's CUDA major version; if none fits, the problem of the first one found."""
    fix = hints.toolkit(torch)
    first = Tool("nvcc", problem="not found", fix=fix)
    for path in dict.fromkeys(home / "bin" / "nvcc" for home in _homes(torch)):
        if not os.access(path, os.X_OK):
            continue
        version = _search(r"release (\d+\.\d+)", [str(path), "--version"])
        if not version:
            problem = "does not run"
        elif int(version.split(".")[0]) != torch.cuda_major:
            problem = f"is for CUDA {version}, but torch {torch.version} needs CUDA {torch.cuda_major}"
        elif missing := _missing_header(path.parent.parent):
            problem = f"lacks {missing}"
        else:
            return Tool("nvcc", path, version)
        first = first if first.path else Tool("nvcc", path, version, problem, fix)
    return first


def compiler() -> Tool:
    """The C++ compiler that torch will use: CXX, else c++."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    name = "g++" if command[0] == "c++" else Path(command[0]).name
    # gcc 7 and later prints its full version for the first flag; older gcc and clang know the second.
    flags = [*command[1:], "-dumpfullversion", "-dumpversion"]
    return _program(name, shutil.which(command[0]), flags, hints.compiler())


def ninja() -> Tool:
    """ninja, on PATH or among the scripts of this Python or user."""
    folders = [None, sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    folders.append(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")))
    paths = (shutil.which("ninja", path=folder) for folder in folders)
    return _program("ninja", next(filter(None, paths), None), ["--version"], hints.pip("ninja"))


def headers() -> Tool:
    """Python.h of this Python."""
    path = Path(sysconfig.get_path("include", scheme="posix_prefix")) / "Python.h"
    if path.is_file():
        return Tool("Python headers", path)
    return Tool("Python headers", problem=f"not found in {path.parent}", fix=hints.headers())


def variables(tools: Toolchain, libraries: Path) -> dict[str, str]:
    """The environment in which torch finds the tools, given that none has a problem.

    `libraries` is a folder to create for linker names that the toolkit lacks.
    """
    environment = dict(os.environ)
    folders = [str(tool.path.parent) for tool in (tools.ninja, tools.nvcc) if tool.path]
    environment["PATH"] = os.pathsep.join([*folders, environment.get("PATH", os.defpath)])
    if tools.nvcc.path:
        home = tools.nvcc.path.parent.parent
        environment["CUDA_HOME"] = str(home)
        if _runtime(home, "libcudart.so") is None and (numbered := _runtime(home, "libcudart.so.*")):
            # NVIDIA's Python packages contain libcudart.so.13 without the libcudart.so link.
            libraries.mkdir(parents=True, exist_ok=True)
            link = libraries / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(numbered)
            paths = filter(None, [str(libraries), environment.get("LIBRARY_PATH")])
            environment["LIBRARY_PATH"] = os.pathsep.join(paths)
    return environment


def try_nvcc(archs: Iterable[str], variables: Mapping[str, str], log: IO[str]) -> float:
    """Compile a tiny kernel, to see within seconds whether nvcc, its headers, g++ and the architectures work together.

    Returns the seconds it took; CalledProcessError if it failed, with details in the log.
    """
    numbers = ["{}{}".format(*capability_of(arch)) for arch in archs]
    flags = ["-std=c++17", *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers)]
    if compiler := os.environ.get("CC"):
        flags += ["-ccbin", compiler]  # as torch does
    home = Path(variables["CUDA_HOME"])
    command = shlex.split(os.environ.get("PYTORCH_NVCC", "")) or [str(home / "bin" / "nvcc")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cu"
        source.write_text(_FEW_LINES, encoding="utf-8")
        flags += ["-isystem", str(home / "include"), "-c", str(source), "-o", str(source.with_suffix(".o"))]
        begun = time.monotonic()
        subprocess.run([*command, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, check=True)  # noqa: S603
        return time.monotonic() - begun


def _homes(torch: Torch) -> Iterator[Path]:
    """Possible CUDA toolkit folders, in torch's order of preference first."""
    yield from (Path(chosen) for name in ("CUDA_HOME", "CUDA_PATH") if (chosen := os.environ.get(name)))
    if on_path := shutil.which("nvcc"):
        # torch uses the folder above the nvcc on PATH, but that may be a link or a wrapper script.
        yield Path(on_path).parent.parent
        if told := _search(r"(?m)^#\$ _HERE_=(.+)$", [on_path, "--dryrun", "-x", "cu", os.devnull]):
            yield Path(told.strip()).parent
    if prefix := os.environ.get("CONDA_PREFIX"):
        yield Path(prefix)
    # NVIDIA's packages lie beside torch, wherever that is installed.
    yield torch.folder.parent / "nvidia" / f"cu{torch.cuda_major}"
    for root in (Path("/usr/local"), Path("/opt")):
        yield from (root / "cuda", *sorted(root.glob(f"cuda-{torch.cuda_major}*"), reverse=True))


def _missing_header(home: Path) -> str:
    """The first header that torch needs and this toolkit lacks; some packages contain only the compiler."""
    folders = [home / "include", *home.glob("targets/*/include"), Path("/usr/include")]
    return next((name for name in _HEADERS if not any((folder / name).is_file() for folder in folders)), "")


def _runtime(home: Path, pattern: str) -> Path | None:
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    return next((path for folder in folders for path in sorted(folder.glob(pattern))), None)


def _program(name: str, path: str | None, flags: list[str], fix: str) -> Tool:
    """A tool that prints its version for these flags."""
    if path is None:
        return Tool(name, problem="not found", fix=fix)
    version = _search(r"(\d+(?:\.\d+)*)", [path, *flags])
    return Tool(name, Path(path), version) if version else Tool(name, Path(path), problem="does not run", fix=fix)


def _search(pattern: str, command: list[str]) -> str:
    """The first group of a pattern in a program's output; empty if the program fails or times out."""
    try:
        done = subprocess.run(  # noqa: S603 - a compiler found where compilers are
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(pattern, (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace"))
    return match[1] if match else ""
