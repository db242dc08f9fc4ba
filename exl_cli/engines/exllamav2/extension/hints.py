"""Explain failed imports and compilations, with commands that fix them.

The commands match this Python, environment and package manager, and use sudo if needed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from exl_cli.engines.exllamav2.extension.compiled import Torch

EXLLAMAV2_RELEASE, BUILD = "0.3.2", "exl build"

# The package managers' names for the C++ compiler and the Python headers; {v} is "3.12".
_MANAGERS = (
    ("apt-get install -y", "g++", "python{v}-dev"),
    ("dnf install -y", "gcc-c++", "python{v}-devel"),
    ("zypper install -y", "gcc-c++", "python3-devel"),
    ("pacman -S --noconfirm", "gcc", "python"),
    ("apk add", "g++", "python3-dev"),
)
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def pip(*arguments: str) -> str:
    """A command that installs Python packages into this environment."""
    python, rest = shlex.quote(sys.executable or "python3"), shlex.join(arguments)
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install --python {python} {rest}"
    return f"{python} -m pip install {rest}"


def compiler() -> str:
    """A command that installs a C++ compiler."""
    return "conda install -y -c conda-forge gxx_linux-64" if _in_conda() else _from_system(1, "g++")


def headers() -> str:
    """A command that installs this Python's headers."""
    if not Path(sys.base_prefix).is_relative_to("/usr") or Path(sys.base_prefix).is_relative_to("/usr/local"):
        return "use a Python that comes with its headers, such as one from uv, pyenv or conda"
    return _from_system(2, f"the headers of Python {_PYTHON}")


def toolkit(torch: Torch | None) -> str:
    """A command that installs nvcc of torch's CUDA version, into this environment where possible."""
    if torch is None:
        return "install NVIDIA's CUDA Toolkit"
    cuda = torch.cuda or "13.0"
    if torch.cuda_major >= 13:
        # From CUDA 13 on, NVIDIA's Python packages contain nvcc, and torch's dependencies contain the other headers.
        return pip(f"cuda-toolkit[nvcc,nvvm,crt,cccl]=={cuda}.*")
    if _in_conda():
        return f"conda install -y -c nvidia cuda-toolkit={cuda}"
    if shutil.which("apt-get"):
        return f"{_sudo()}apt-get install -y cuda-toolkit-{cuda.replace('.', '-')} (from NVIDIA's package repository)"
    return f"install NVIDIA's CUDA Toolkit {cuda}"


def torch_again(torch: Torch) -> str:
    """A command that reinstalls this torch version; on Linux the default build has CUDA."""
    return pip("--force-reinstall", "torch==" + torch.version.partition("+")[0])


def joined(commands: Sequence[str]) -> str:
    """Join distinct commands with &&."""
    return " && ".join(dict.fromkeys(filter(None, commands)))


def step(fix: str) -> str:
    """A fix as the next step in an error message, where a command needs a verb."""
    return fix if not fix or fix.startswith(("install ", "use ", "free ")) else f"run {fix}"


def _in_conda() -> bool:
    prefix = os.environ.get("CONDA_PREFIX")
    return bool(prefix) and Path(sys.prefix) == Path(str(prefix))


def _from_system(column: int, what: str) -> str:
    for row in _MANAGERS:
        if shutil.which(row[0].split()[0]):
            return f"{_sudo()}{row[0]} {row[column].format(v=_PYTHON)}"
    return f"install {what} with your system's package manager"


def _sudo() -> str:
    return "" if os.geteuid() == 0 or not shutil.which("sudo") else "sudo "


# --- messages ---------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """The error (lower case, no period), its fix, and whether the fix is to recompile the extension."""

    what: str
    fix: str
    rebuild: bool = False


# Patterns of messages and their meaning; {0} is the match, {1} its first group. Fixed by recompiling:
_MISFITS = {
    r"undefined symbol: *(\S+)": "was built for another torch version (installed: {torch}): undefined symbol {1}",
    r"(lib(?:cudart|cublas|cublasLt|nvrtc|cudnn|cusparse|cusolver|curand))\.so\.(\d+)\S*: cannot open": (
        "was built for CUDA {2}, but torch comes with {cuda}: {1}.so.{2} not found"
    ),
    r"((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)['`\"]? not found": "was built on a newer system: {1} not found",
    r"compiled for Python (\d+\.\d+)": "was built for Python {1}",
    r"file too short|invalid ELF header|does not define module export function|cannot dynamically load": (
        "is damaged: {0}"
    ),
    r"no kernel image is available|device kernel image is invalid|PTX was compiled with an unsupported": (
        "has no code for this GPU"
    ),
}
# Fixed otherwise:
_OTHERS: dict[str, tuple[str, str | Callable[[Torch | None], str]]] = {
    r"driver version is insufficient|driver on your system is too old": (
        "the NVIDIA driver is too old for {cuda}",
        "install a newer NVIDIA driver, then restart",
    ),
    r"(\S+\.so\S*): cannot open shared object": ("the library {1} is missing", "install the package that contains it"),
    r"CUDA_HOME environment variable is not set|nvcc not found": ("nvcc not found", toolkit),
    r"[Nn]inja is required": ("ninja not found", lambda torch: pip("ninja")),
    r"unsupported GNU version[^\n]*": (
        "nvcc does not support this g++ ({0})",
        "install an older g++, then run CXX=g++-12 CC=gcc-12 exl build",
    ),
    r"Unsupported gpu architecture '([^']+)'": ("this nvcc does not support the GPU ({0})", toolkit),
    r"(?:fatal error: )(\S+): No such file": ("a header is missing ({0})", toolkit),
    r"[Cc]annot find -l(\w+)": ("the linker cannot find a library ({0})", toolkit),
    r"No space left on device": (
        "the disk is full ({0})",
        "free some space, or set TMPDIR and TORCH_EXTENSIONS_DIR to other disks",
    ),
    r"Killed|signal 9|cc1plus[^\n]*out of memory": (
        "a compiler was killed, possibly out of memory ({0})",
        "exl build --jobs 1",
    ),
}
# Import names that differ from the package's name.
_PACKAGES = {"PIL": "pillow", "pkg_resources": "setuptools"}


def explain(text: str, torch: Torch | None) -> Failure | None:
    """Explain a message of an exception, linker or compiler; None if it is unknown."""
    if match := re.search(r"No module named ['\"]([\w]+)", text):
        return Failure(f"the Python package {match[1]} is missing", pip(_PACKAGES.get(match[1], match[1])))
    cuda = f"CUDA {torch.cuda}" if torch and torch.cuda else "no CUDA"

    def said(what: str, match: re.Match[str]) -> str:
        return what.format(match[0].strip(), *match.groups(), torch=torch.version if torch else "none", cuda=cuda)

    for pattern, what in _MISFITS.items():
        if match := re.search(pattern, text):
            return Failure(f"exllamav2's compiled extension {said(what, match)}", BUILD, rebuild=True)
    for pattern, (what, fix) in _OTHERS.items():
        if match := re.search(pattern, text):
            return Failure(said(what, match), fix if isinstance(fix, str) else fix(torch))
    return None


def first_error(output: str) -> str:
    """The first line that looks like an error, else the last line."""
    lines = _lines(output)
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), lines[-1])[:300]


def last_line(text: str) -> str:
    """The last non-empty line; in a traceback, the exception."""
    return _lines(text)[-1]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()] or [""]
