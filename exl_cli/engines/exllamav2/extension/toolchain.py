"""The tools to compile with: nvcc of torch's CUDA version, a C++ compiler, ninja and Python's headers.

They are looked for further than torch does: ninja also beside this Python, which is not on PATH where a virtual
environment was not activated, and nvcc also where NVIDIA's Python packages put it. `variables` tells torch.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

from exl_cli.engines.exllamav2.extension import install_hints
from exl_cli.engines.exllamav2.extension.environment import Torch

_SECONDS = 20.0
_HEADERS = ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h")


@dataclass(frozen=True)
class Tool:
    """One of the tools.

    Attributes:
        name: as people call it.
        path: None where it is not there.
        version: empty where it has none.
        problem: the fault, in a few words; empty where there is none.
        fix: the command that mends it.
    """

    name: str
    path: Path | None = None
    version: str = ""
    problem: str = ""
    fix: str = ""


class Toolchain(NamedTuple):
    """All of them, in the order in which to mend them."""

    nvcc: Tool
    compiler: Tool
    ninja: Tool
    headers: Tool

    @property
    def problems(self) -> list[Tool]:
        """Those that something is wrong with."""
        return [tool for tool in self if tool.problem]

    @property
    def fix(self) -> str:
        """The commands that mend them."""
        return install_hints.joined([tool.fix for tool in self.problems])


def find(torch: Torch) -> Toolchain:
    """The tools for this torch."""
    return Toolchain(nvcc(torch), compiler(), ninja(), headers())


def variables(tools: Toolchain, libraries: Path) -> dict[str, str]:
    """The environment in which torch finds the tools.

    Args:
        tools: without problems.
        libraries: a folder to make for names that the linker looks for and the toolkit lacks.
    """
    environment = dict(os.environ)
    folders = [str(tool.path.parent) for tool in (tools.ninja, tools.nvcc) if tool.path]
    environment["PATH"] = os.pathsep.join([*folders, environment.get("PATH", os.defpath)])
    if tools.nvcc.path:
        home = tools.nvcc.path.parent.parent
        environment["CUDA_HOME"] = str(home)
        if _runtime(home, "libcudart.so") is None and (numbered := _runtime(home, "libcudart.so.*")):
            # NVIDIA's Python packages hold libcudart.so.13 alone.
            libraries.mkdir(parents=True, exist_ok=True)
            link = libraries / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(numbered)
            paths = filter(None, [str(libraries), environment.get("LIBRARY_PATH")])
            environment["LIBRARY_PATH"] = os.pathsep.join(paths)
    return environment


def nvcc(torch: Torch) -> Tool:
    """CUDA's compiler, of torch's major version; if there are only others, the problem of the first."""
    fix = install_hints.toolkit(torch)
    first = Tool("nvcc", problem="is not found", fix=fix)
    for path in _nvccs(torch):
        version = _version([str(path), "--version"], r"release (\d+\.\d+)")
        if not version:
            problem = "does not run"
        elif int(version.split(".")[0]) != torch.cuda_major:
            problem = f"is of CUDA {version}, and torch {torch.version} needs CUDA {torch.cuda_major}"
        elif missing := _missing_header(path.parent.parent):
            problem = f"comes without {missing}"
        else:
            return Tool("nvcc", path, version)
        first = first if first.path else Tool("nvcc", path, version, problem, fix)
    return first


def compiler() -> Tool:
    """The C++ compiler that torch will call: CXX, else c++."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    path = shutil.which(command[0])
    name = "g++" if command[0] == "c++" else Path(command[0]).name
    if path is None:
        return Tool(name, problem="is not found", fix=install_hints.compiler())
    # gcc of 7 and later tells its whole version by the first flag, earlier ones and clang by the second.
    return _running(name, [*command, "-dumpfullversion", "-dumpversion"], Path(path), install_hints.compiler())


def ninja() -> Tool:
    """The build program: on PATH, or beside this Python."""
    fix = install_hints.pip("ninja")
    for folder in (None, sysconfig.get_path("scripts"), str(Path(sys.executable).parent)):
        if path := shutil.which("ninja", path=folder):
            return _running("ninja", [path, "--version"], Path(path), fix)
    try:
        listed = [Path(str(entry.locate())) for entry in files("ninja") or [] if entry.name == "ninja"]
    except PackageNotFoundError:
        listed = []
    for entry in listed:
        if entry.is_file() and os.access(entry, os.X_OK):
            return _running("ninja", [str(entry), "--version"], entry, fix)
    return Tool("ninja", problem="is not found", fix=fix)


def _running(name: str, command: list[str], path: Path, fix: str) -> Tool:
    version = _version(command, r"(\d+(?:\.\d+)*)")
    return Tool(name, path, version) if version else Tool(name, path, problem="does not run", fix=fix)


def headers() -> Tool:
    """Python.h of this Python."""
    path = Path(sysconfig.get_path("include", scheme="posix_prefix")) / "Python.h"
    if path.is_file():
        return Tool("Python headers", path)
    return Tool("Python headers", problem=f"are not in {path.parent}", fix=install_hints.headers())


def _nvccs(torch: Torch) -> Iterator[Path]:
    """Every nvcc at the usual places, torch's own first choice first."""
    for path in dict.fromkeys(home / "bin" / "nvcc" for home in _homes(torch)):
        if path.is_file() and os.access(path, os.X_OK):
            yield path


def _homes(torch: Torch) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if chosen := os.environ.get(variable):
            yield Path(chosen)
    if on_path := shutil.which("nvcc"):
        # torch takes the folder above an nvcc on PATH. That may be a link or a script that starts the real one.
        yield Path(on_path).parent.parent
        dry_run = _output([on_path, "--dryrun", "-x", "cu", os.devnull])
        if told := re.search(r"^#\$ _HERE_=(.+)$", dry_run, re.MULTILINE):
            yield Path(told[1].strip()).parent
    if prefix := os.environ.get("CONDA_PREFIX"):
        yield Path(prefix)
    # NVIDIA's packages lie beside torch, wherever that is installed.
    yield torch.folder.parent / "nvidia" / f"cu{torch.cuda_major}"
    for root in (Path("/usr/local"), Path("/opt")):
        yield root / "cuda"
        yield from sorted(root.glob(f"cuda-{torch.cuda_major}*"), reverse=True)


def _missing_header(home: Path) -> str:
    """A header that torch's own include and this toolkit lacks: some packages hold the compiler alone."""
    folders = [home / "include", *home.glob("targets/*/include"), Path("/usr/include")]
    return next((name for name in _HEADERS if not any((folder / name).is_file() for folder in folders)), "")


def _runtime(home: Path, pattern: str) -> Path | None:
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    return next((path for folder in folders for path in sorted(folder.glob(pattern))), None)


def _version(command: list[str], pattern: str) -> str:
    match = re.search(pattern, _output(command))
    return match[1] if match else ""


def _output(command: list[str]) -> str:
    """Both streams of a program; empty where it cannot be run, fails or does not end."""
    try:
        done = subprocess.run(  # noqa: S603 - a compiler found where compilers are
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace") if done.returncode == 0 else ""
