"""What compiling takes: nvcc of torch's CUDA version, a C++ compiler, ninja and Python's headers.

They are looked for further than torch does: ninja also beside this Python, which is not on PATH where a virtual
environment was not activated, and nvcc also where NVIDIA's Python packages put it. `environment` then says it in the
variables that torch reads.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from exl_cli.engines.exllamav2.extension import install_hints
from exl_cli.engines.exllamav2.extension.environment import Torch

_SECONDS = 20.0
_HEADERS = ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h")


@dataclass(frozen=True)
class Tool:
    """One thing that compiling takes.

    Attributes:
        name: what people call it.
        path: where it is; None where it is not.
        version: its version, where it has one.
        problem: what is wrong, in a few words; empty where nothing is.
        fix: the command that mends it.
    """

    name: str
    path: Path | None = None
    version: str = ""
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Toolchain:
    """All of it."""

    nvcc: Tool
    compiler: Tool
    ninja: Tool
    headers: Tool

    @property
    def tools(self) -> tuple[Tool, ...]:
        """In the order in which to mend them."""
        return (self.nvcc, self.compiler, self.ninja, self.headers)

    @property
    def problems(self) -> list[Tool]:
        """Those that something is wrong with."""
        return [tool for tool in self.tools if tool.problem]

    @property
    def cuda_home(self) -> Path | None:
        """The toolkit's folder."""
        return self.nvcc.path.parent.parent if self.nvcc.path else None


def find(torch: Torch) -> Toolchain:
    """Look for everything that compiling for this torch takes."""
    return Toolchain(nvcc(torch), compiler(), ninja(), headers())


def environment(tools: Toolchain, libraries: Path) -> dict[str, str]:
    """Variables under which torch finds the tools.

    Args:
        tools: a toolchain without problems.
        libraries: a folder of the build's own, where the linker is to find what the toolkit has under another name.
    """
    found = dict(os.environ)
    folders = [str(tool.path.parent) for tool in (tools.ninja, tools.nvcc) if tool.path]
    found["PATH"] = os.pathsep.join([*folders, found.get("PATH", os.defpath)])
    home = tools.cuda_home
    if home is not None:
        found["CUDA_HOME"] = str(home)
        if _runtime(home, "libcudart.so") is None and (numbered := _runtime(home, "libcudart.so.*")):
            # NVIDIA's Python packages leave out the name that the linker looks for.
            libraries.mkdir(parents=True, exist_ok=True)
            link = libraries / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(numbered)
            found["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries), found.get("LIBRARY_PATH")]))
    return found


def nvcc(torch: Torch) -> Tool:
    """CUDA's compiler, of torch's major version; one of another is told as a problem."""
    others: list[Tool] = []
    for path in _nvccs(torch):
        version = _version([str(path), "--version"], r"release (\d+\.\d+)")
        if not version:
            others.append(Tool("nvcc", path, problem="does not run", fix=install_hints.toolkit(torch)))
        elif int(version.split(".")[0]) != torch.cuda_major:
            problem = f"is of CUDA {version}, and torch {torch.version} needs CUDA {torch.cuda_major}"
            others.append(Tool("nvcc", path, version, problem, install_hints.toolkit(torch)))
        elif missing := _missing_header(path.parent.parent):
            others.append(Tool("nvcc", path, version, f"comes without {missing}", install_hints.toolkit(torch)))
        else:
            return Tool("nvcc", path, version)
    if others:
        return others[0]
    return Tool("nvcc", problem="is not found", fix=install_hints.toolkit(torch))


def compiler() -> Tool:
    """The C++ compiler that torch will call: CXX, else c++."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    path = shutil.which(command[0])
    name = "g++" if command[0] == "c++" else Path(command[0]).name
    if path is None:
        return Tool(name, problem="is not found", fix=install_hints.compiler())
    # gcc of 7 and later tells its whole version by the first flag, earlier ones and clang by the second.
    version = _version([*command, "-dumpfullversion", "-dumpversion"], r"(\d+(?:\.\d+)*)")
    if not version:
        return Tool(name, Path(path), problem="does not run", fix=install_hints.compiler())
    return Tool(name, Path(path), version)


def ninja() -> Tool:
    """The build program: on PATH, or beside this Python."""
    fix = install_hints.pip("ninja")
    for folder in (None, sysconfig.get_path("scripts"), str(Path(sys.executable).parent)):
        if path := shutil.which("ninja", path=folder):
            return _ninja(Path(path), fix)
    try:
        listed = files("ninja") or []
    except PackageNotFoundError:
        listed = []
    for entry in listed:
        path_ = Path(str(entry.locate()))
        if entry.name == "ninja" and os.access(path_, os.X_OK) and path_.is_file():
            return _ninja(path_, fix)
    return Tool("ninja", problem="is not found", fix=fix)


def _ninja(path: Path, fix: str) -> Tool:
    version = _version([str(path), "--version"], r"(\d+(?:\.\d+)*)")
    return Tool("ninja", path, version, "" if version else "does not run", "" if version else fix)


def headers() -> Tool:
    """Python.h of this Python."""
    path = Path(sysconfig.get_path("include", scheme="posix_prefix")) / "Python.h"
    if path.is_file():
        return Tool("Python headers", path)
    return Tool("Python headers", problem=f"are not in {path.parent}", fix=install_hints.headers())


def _nvccs(torch: Torch) -> Iterator[Path]:
    """Every nvcc at the usual places whose toolkit has its headers beside it, the one torch would take first."""
    seen = set()
    for home in _homes(torch):
        path = home / "bin" / "nvcc"
        if path.is_file() and os.access(path, os.X_OK) and path not in seen:
            seen.add(path)
            yield path


def _homes(torch: Torch) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if chosen := os.environ.get(variable):
            yield Path(chosen)
    if on_path := shutil.which("nvcc"):
        # torch takes the folder above an nvcc on PATH; the same one makes the same build file.
        yield Path(on_path).parent.parent
        yield _behind(Path(on_path))
    if prefix := os.environ.get("CONDA_PREFIX"):
        yield Path(prefix)
    # NVIDIA's packages lie beside torch, wherever that is installed.
    yield torch.folder.parent / "nvidia" / f"cu{torch.cuda_major}"
    for root in (Path("/usr/local"), Path("/opt")):
        yield root / "cuda"
        yield from sorted(root.glob(f"cuda-{torch.cuda_major}*"), reverse=True)


def _behind(nvcc: Path) -> Path:
    """The toolkit that an nvcc belongs to. It may be a link or a script that starts the real one, so it is asked."""
    told = re.search(r"^#\$ _HERE_=(.+)$", _output([str(nvcc), "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    home = Path(told[1].strip()).parent if told else nvcc.parent.parent
    return home if (home / "bin" / "nvcc").is_file() else nvcc.parent.parent


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


def _output(command: list[str], env: Mapping[str, str] | None = None) -> str:
    """What a program prints, on both streams; empty where it cannot be run or does not end."""
    try:
        done = subprocess.run(  # noqa: S603 - a compiler found where compilers are
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False, env=env
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace") if done.returncode == 0 else ""
