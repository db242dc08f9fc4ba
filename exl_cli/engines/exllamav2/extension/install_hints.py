"""Commands that install a missing tool: with this Python, this package manager, sudo where it is needed."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from exl_cli.engines.exllamav2.extension.environment import Torch

# The package managers' names for the C++ compiler and the Python headers; {v} is "3.12".
_MANAGERS = (
    ("apt-get install -y", "g++", "python{v}-dev"),
    ("dnf install -y", "gcc-c++", "python{v}-devel"),
    ("yum install -y", "gcc-c++", "python{v}-devel"),
    ("zypper install -y", "gcc-c++", "python3-devel"),
    ("pacman -S --noconfirm", "gcc", "python"),
    ("apk add", "g++", "python3-dev"),
)
_FIRST_CUDA_FROM_PIP = 13


def pip(*arguments: str, verb: str = "install") -> str:
    """A command that installs Python packages into this environment."""
    python = shlex.quote(sys.executable or "python3")
    rest = " ".join(shlex.quote(argument) for argument in arguments)
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip {verb} --python {python} {rest}"
    yes = " -y" if verb == "uninstall" else ""
    return f"{python} -m pip {verb}{yes} {rest}"


def compiler() -> str:
    """A command that installs a C++ compiler."""
    if _in_conda():
        return "conda install -y -c conda-forge gxx_linux-64"
    return _system(1) or "install g++ with your system's package manager"


def headers() -> str:
    """A command that installs this Python's headers."""
    if not Path(sys.base_prefix).is_relative_to("/usr") or Path(sys.base_prefix).is_relative_to("/usr/local"):
        return "use a Python that brings its headers: those of uv, pyenv and conda do"
    return _system(2) or f"install the headers of Python {_python_version()} with your system's package manager"


def toolkit(torch: Torch | None) -> str:
    """A command that installs nvcc of torch's CUDA version, into this environment where possible."""
    if torch is None:
        return "install NVIDIA's CUDA Toolkit"
    cuda = torch.cuda or "13.0"
    if torch.cuda_major >= _FIRST_CUDA_FROM_PIP:
        # From CUDA 13 on NVIDIA's Python packages hold all of nvcc, and torch's own bring the other headers.
        return pip(f"cuda-toolkit[nvcc,nvvm,crt,cccl]=={cuda}.*")
    if _in_conda():
        return f"conda install -y -c nvidia cuda-toolkit={cuda}"
    if shutil.which("apt-get"):
        return f"{_sudo()}apt-get install -y cuda-toolkit-{cuda.replace('.', '-')} (from NVIDIA's package repository)"
    return f"install NVIDIA's CUDA Toolkit {cuda}"


def torch_with_cuda(torch: Torch) -> str:
    """A command that replaces a torch without CUDA: the default build of Linux has it."""
    return pip("--force-reinstall", "torch==" + torch.version.partition("+")[0])


def pure_exllamav2() -> str:
    """A command that replaces a prebuilt wheel of exllamav2 with its sources."""
    return pip("--force-reinstall", "--no-deps", "exllamav2==0.3.2")


def joined(commands: Sequence[str]) -> str:
    """Several commands in one line, each once."""
    return " && ".join(dict.fromkeys(command for command in commands if command))


def _in_conda() -> bool:
    prefix = os.environ.get("CONDA_PREFIX")
    return bool(prefix) and Path(sys.prefix) == Path(str(prefix))


def _system(column: int) -> str:
    row = next((row for row in _MANAGERS if shutil.which(row[0].split()[0])), None)
    return f"{_sudo()}{row[0]} {row[column].format(v=_python_version())}" if row else ""


def _sudo() -> str:
    return "" if os.geteuid() == 0 or not shutil.which("sudo") else "sudo "


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
