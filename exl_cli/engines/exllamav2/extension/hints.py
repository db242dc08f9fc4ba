"""What messages of failed imports and compilers mean, and the commands that mend it.

The commands fit this Python, this package manager, and take sudo where it is needed.
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

EXLLAMAV2_RELEASE = "0.3.2"
BUILD = "exl build"

# The package managers' names for the C++ compiler and the Python headers; {v} is "3.12".
_MANAGERS = (
    ("apt-get install -y", "g++", "python{v}-dev"),
    ("dnf install -y", "gcc-c++", "python{v}-devel"),
    ("zypper install -y", "gcc-c++", "python3-devel"),
    ("pacman -S --noconfirm", "gcc", "python"),
    ("apk add", "g++", "python3-dev"),
)
_FIRST_CUDA_FROM_PIP = 13


def pip(*arguments: str) -> str:
    """A command that installs Python packages into this environment."""
    python, rest = shlex.quote(sys.executable or "python3"), shlex.join(arguments)
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install --python {python} {rest}"
    return f"{python} -m pip install {rest}"


def compiler() -> str:
    """A command that installs a C++ compiler."""
    if _in_conda():
        return "conda install -y -c conda-forge gxx_linux-64"
    return _system(1) or "install g++ with your system's package manager"


def headers() -> str:
    """A command that installs this Python's headers."""
    if not Path(sys.base_prefix).is_relative_to("/usr") or Path(sys.base_prefix).is_relative_to("/usr/local"):
        return "use a Python that brings its headers: those of uv, pyenv and conda do"
    return _system(2) or f"install the headers of Python {_python()} with your system's package manager"


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


def torch_again(torch: Torch) -> str:
    """A command that installs this torch again: on Linux the default build has CUDA."""
    return pip("--force-reinstall", "torch==" + torch.version.partition("+")[0])


def joined(commands: Sequence[str]) -> str:
    """Several commands in one line, each once."""
    return " && ".join(dict.fromkeys(filter(None, commands)))


def _in_conda() -> bool:
    prefix = os.environ.get("CONDA_PREFIX")
    return bool(prefix) and Path(sys.prefix) == Path(str(prefix))


def _system(column: int) -> str:
    row = next((row for row in _MANAGERS if shutil.which(row[0].split()[0])), None)
    return f"{_sudo()}{row[0]} {row[column].format(v=_python())}" if row else ""


def _sudo() -> str:
    return "" if os.geteuid() == 0 or not shutil.which("sudo") else "sudo "


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


# --- messages ---------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """One failure.

    Attributes:
        what: the fault, lower case, without a final stop.
        fix: the command or step that mends it.
        rebuild: whether compiling the extension again mends it.
    """

    what: str
    fix: str
    rebuild: bool = False


_E = "exllamav2's compiled extension"
_OLDER_COMPILER = "install an older g++ and name it: CXX=g++-12 CC=gcc-12 exl build"

# A pattern; what it means, with {0} the match and {1} its first group; the fix.
_RULES: tuple[tuple[str, str, str | Callable[[Torch | None], str]], ...] = (
    (r"undefined symbol: *(\S+)", _E + " was built for another torch (here: {torch}): undefined symbol {1}", BUILD),
    (
        r"(lib(?:cudart|cublas|cublasLt|nvrtc|cudnn|cusparse|cusolver|curand))\.so\.(\d+)\S*: cannot open",
        _E + " was built for CUDA {2} and this torch brings {cuda}: {1}.so.{2} is not there",
        BUILD,
    ),
    (
        r"((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)['`\"]? not found",
        _E + " was built on a newer system: {1} is not here",
        BUILD,
    ),
    (r"compiled for Python (\d+\.\d+)", _E + " was built for Python {1}", BUILD),
    (
        r"file too short|invalid ELF header|does not define module export function|cannot dynamically load",
        _E + " is damaged: {0}",
        BUILD,
    ),
    (
        r"no kernel image is available|device kernel image is invalid|PTX was compiled with an unsupported",
        _E + " holds no code for this GPU",
        BUILD,
    ),
    (
        r"driver version is insufficient|driver on your system is too old",
        "the NVIDIA driver is too old for {cuda}",
        "install a newer NVIDIA driver, then restart",
    ),
    (r"(\S+\.so\S*): cannot open shared object", "the library {1} is missing", "install the package that holds it"),
    (r"CUDA_HOME environment variable is not set|nvcc not found", "nvcc is not found", toolkit),
    (r"[Nn]inja is required", "ninja is not found", lambda torch: pip("ninja")),
    (r"unsupported GNU version[^\n]*", "nvcc does not work with this g++ ({0})", _OLDER_COMPILER),
    (r"Unsupported gpu architecture '([^']+)'", "this nvcc does not know the GPU ({0})", toolkit),
    (r"(?:fatal error: )(\S+): No such file", "a header is missing ({0})", toolkit),
    (r"[Cc]annot find -l(\w+)", "the linker does not find a library ({0})", toolkit),
    (r"No space left on device", "the disk is full ({0})", "TMPDIR and TORCH_EXTENSIONS_DIR name other disks"),
    (
        r"Killed|signal 9|cc1plus[^\n]*out of memory",
        "a compiler was killed, perhaps for want of memory ({0})",
        "exl build --jobs 1",
    ),
)
# Names to install by, where they are not the names to import by.
_PACKAGES = {"PIL": "pillow", "pkg_resources": "setuptools"}


def explain(text: str, torch: Torch | None) -> Failure | None:
    """The meaning of an exception's, a linker's or a compiler's message; None where it is not known."""
    if match := re.search(r"No module named ['\"]([\w]+)", text):
        return Failure(f"the Python package {match[1]} is missing", pip(_PACKAGES.get(match[1], match[1])))
    cuda = f"CUDA {torch.cuda}" if torch and torch.cuda else "no CUDA"
    for pattern, what, fix in _RULES:
        if match := re.search(pattern, text):
            what = what.format(match[0].strip(), *match.groups(), torch=torch.version if torch else "none", cuda=cuda)
            return Failure(what, fix if isinstance(fix, str) else fix(torch), rebuild=fix == BUILD)
    return None


def first_error(output: str) -> str:
    """The first line that reads like an error, the last line where none does."""
    lines = _lines(output)
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), lines[-1])[:300]


def last_line(text: str) -> str:
    """The last line that is not empty: an exception's own, at the end of a traceback."""
    return _lines(text)[-1]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()] or [""]
