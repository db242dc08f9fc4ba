"""What a failed import or compiler says, in one line with the next step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from exl_cli.engines.exllamav2.extension import install_hints
from exl_cli.engines.exllamav2.extension.environment import Torch

BUILD = "exl build"
_ONE_JOB = "exl build --jobs 1"
_OLDER_COMPILER = "install an older g++ and name it: CXX=g++-12 CC=gcc-12 exl build"


@dataclass(frozen=True)
class Failure:
    """One failure.

    Attributes:
        what: what is wrong, lower case, without a final stop.
        fix: the command or step that mends it.
        rebuild: whether compiling the extension anew mends it.
    """

    what: str
    fix: str
    rebuild: bool = False


_EXTENSION = "exllamav2's compiled extension"
# Names to install by, where they are not the names to import by.
_PACKAGES = {"PIL": "pillow", "pkg_resources": "setuptools"}

_Rule = tuple[str, Callable[["re.Match[str]", "Torch | None"], Failure]]


def _of_another_torch(match: re.Match[str], torch: Torch | None) -> Failure:
    here = f" (here: {torch.version})" if torch else ""
    return Failure(f"{_EXTENSION} was built for another torch{here}: undefined symbol {match[1]}", BUILD, rebuild=True)


def _of_another_cuda(match: re.Match[str], torch: Torch | None) -> Failure:
    here = f"this torch brings CUDA {torch.cuda}" if torch and torch.cuda else "this torch brings no CUDA"
    what = f"{_EXTENSION} was built for CUDA {match[2]} and {here}: {match[1]}.so.{match[2]} is not there"
    return Failure(what, BUILD, rebuild=True)


def _missing_library(match: re.Match[str], torch: Torch | None) -> Failure:
    return Failure(f"the library {match[1]} is missing", "install the package that holds it")


def _newer_system(match: re.Match[str], torch: Torch | None) -> Failure:
    what = f"{_EXTENSION} was built on a newer system: {match[1]} is not here"
    return Failure(what, BUILD, rebuild=True)


def _another_python(match: re.Match[str], torch: Torch | None) -> Failure:
    return Failure(f"{_EXTENSION} was built for Python {match[1]}", BUILD, rebuild=True)


def _damaged(match: re.Match[str], torch: Torch | None) -> Failure:
    return Failure(f"{_EXTENSION} is damaged: {match[0]}", BUILD, rebuild=True)


def _another_gpu(match: re.Match[str], torch: Torch | None) -> Failure:
    return Failure(f"{_EXTENSION} holds no code for this GPU", BUILD, rebuild=True)


def _old_driver(match: re.Match[str], torch: Torch | None) -> Failure:
    cuda = f" for CUDA {torch.cuda}" if torch and torch.cuda else ""
    return Failure(f"the NVIDIA driver is too old{cuda}", "install a newer NVIDIA driver, then restart")


def _no_package(match: re.Match[str], torch: Torch | None) -> Failure:
    name = match[1].partition(".")[0]
    # All that torch brings is set up beside it; setuptools is what its compiling takes.
    return Failure(f"the Python package {name} is missing", install_hints.pip(_PACKAGES.get(name, name)))


def _no_toolkit(match: re.Match[str], torch: Torch | None) -> Failure:
    fix = install_hints.toolkit(torch) if torch else "install NVIDIA's CUDA Toolkit"
    return Failure("nvcc is not found", fix)


def _old_compiler(match: re.Match[str], torch: Torch | None) -> Failure:
    return Failure(f"nvcc does not work with this g++: {match[1].strip()}", _OLDER_COMPILER)


_CUDA_LIBRARIES = "cudart|cublas|cublasLt|nvrtc|cudnn|cusparse|cusolver|curand"
_RULES: tuple[_Rule, ...] = (
    (r"undefined symbol: *(\S+)", _of_another_torch),
    (rf"(lib(?:{_CUDA_LIBRARIES}))\.so\.(\d+)\S*: cannot open", _of_another_cuda),
    (r"((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)['`\"]? not found", _newer_system),
    (r"compiled for Python (\d+\.\d+)", _another_python),
    (r"(?:file too short|invalid ELF header|does not define module export function|cannot dynamically load)", _damaged),
    (r"no kernel image is available|device kernel image is invalid|PTX was compiled with an unsupported", _another_gpu),
    (r"driver version is insufficient|driver on your system is too old", _old_driver),
    (r"(\S+\.so\S*): cannot open shared object file", _missing_library),
    (r"No module named ['\"]([\w.]+)['\"]", _no_package),
    (r"CUDA_HOME environment variable is not set|nvcc not found", _no_toolkit),
    (r"(unsupported GNU version[^\n]*)", _old_compiler),
    (r"[Nn]inja is required", lambda match, torch: Failure("ninja is not found", install_hints.pip("ninja"))),
)


def explain(text: str, torch: Torch | None) -> Failure | None:
    """What a message means; None where it is not known.

    Args:
        text: what an exception or a compiler said.
        torch: the torch that is here.
    """
    for pattern, tell in _RULES:
        if match := re.search(pattern, text):
            return tell(match, torch)
    return None


_CompilerRule = tuple[str, str, Callable[[Torch], str]]
_COMPILER_RULES: tuple[_CompilerRule, ...] = (
    (r"unsupported GNU version[^\n]*", "nvcc does not work with this g++", lambda torch: _OLDER_COMPILER),
    (r"Unsupported gpu architecture '([^']+)'", "this nvcc does not know the GPU", install_hints.toolkit),
    (r"(?:fatal error: )(\S+): No such file", "a header is missing", install_hints.toolkit),
    (r"[Cc]annot find -l(\w+)", "the linker does not find a library", install_hints.toolkit),
    (r"No space left on device", "the disk is full", lambda torch: "TMPDIR and TORCH_EXTENSIONS_DIR name other disks"),
    (r"Killed|signal 9|out of memory", "a compiler was killed, perhaps for want of memory", lambda torch: _ONE_JOB),
)


def explain_compiler(output: str, torch: Torch) -> Failure:
    """What went wrong, from the end of a compiler's output; its first error where that is not known."""
    for pattern, what, fix in _COMPILER_RULES:
        if match := re.search(pattern, output):
            return Failure(f"{what} ({match[0].strip()})", fix(torch))
    return Failure(first_error(output) or "the compiler failed", "see the log")


def first_error(output: str) -> str:
    """The first line that reads like an error, the last one where none does."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = next((line for line in lines if re.search(r"\berror\b|\bfatal\b", line, re.IGNORECASE)), "")
    return (found or (lines[-1] if lines else ""))[:300]


def last_line(text: str) -> str:
    """The last line that is not empty: an exception's own, at the end of a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
