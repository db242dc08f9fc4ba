"""Messages of failed imports and compilers, in one line with the next step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from exl_cli.engines.exllamav2.extension import install_hints
from exl_cli.engines.exllamav2.extension.environment import Torch

BUILD = "exl build"
_ONE_JOB = "exl build --jobs 1"
_OLDER_COMPILER = "install an older g++ and name it: CXX=g++-12 CC=gcc-12 exl build"
_OTHER_DISKS = "TMPDIR and TORCH_EXTENSIONS_DIR name other disks"
_ITS_PACKAGE = "install the package that holds it"
_NEWER_DRIVER = "install a newer NVIDIA driver, then restart"


@dataclass(frozen=True)
class Failure:
    """One failure.

    Attributes:
        what: the fault, lower case, without a final stop.
        fix: the command or step that mends it.
        rebuild: whether compiling the extension again mends it.
    """

    what: str
    fix: str
    rebuild: bool = False


# A pattern; what it means, with {0} the match, {1} its first group, {e} the extension; the fix. The extension is to be
# compiled again where that is the fix.
_Rule = tuple[str, str, "str | Callable[[Torch | None], str]"]

_CUDA_LIBRARIES = "cudart|cublas|cublasLt|nvrtc|cudnn|cusparse|cusolver|curand"
_RULES: tuple[_Rule, ...] = (
    (r"undefined symbol: *(\S+)", "{e} was built for another torch (here: {torch}): undefined symbol {1}", BUILD),
    (
        rf"(lib(?:{_CUDA_LIBRARIES}))\.so\.(\d+)\S*: cannot open",
        "{e} was built for CUDA {2} and this torch brings {cuda}: {1}.so.{2} is not there",
        BUILD,
    ),
    (
        r"((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)['`\"]? not found",
        "{e} was built on a newer system: {1} is not here",
        BUILD,
    ),
    (r"compiled for Python (\d+\.\d+)", "{e} was built for Python {1}", BUILD),
    (
        r"file too short|invalid ELF header|does not define module export function|cannot dynamically load",
        "{e} is damaged: {0}",
        BUILD,
    ),
    (
        r"no kernel image is available|device kernel image is invalid|PTX was compiled with an unsupported",
        "{e} holds no code for this GPU",
        BUILD,
    ),
    (
        r"driver version is insufficient|driver on your system is too old",
        "the NVIDIA driver is too old for {cuda}",
        _NEWER_DRIVER,
    ),
    (
        r"(\S+\.so\S*): cannot open shared object file",
        "the library {1} is missing",
        _ITS_PACKAGE,
    ),
    (r"CUDA_HOME environment variable is not set|nvcc not found", "nvcc is not found", install_hints.toolkit),
    (r"unsupported GNU version[^\n]*", "nvcc does not work with this g++: {0}", _OLDER_COMPILER),
    (r"[Nn]inja is required", "ninja is not found", lambda torch: install_hints.pip("ninja")),
)
_COMPILER_RULES: tuple[_Rule, ...] = (
    (r"unsupported GNU version[^\n]*", "nvcc does not work with this g++ ({0})", _OLDER_COMPILER),
    (r"Unsupported gpu architecture '([^']+)'", "this nvcc does not know the GPU ({0})", install_hints.toolkit),
    (r"(?:fatal error: )(\S+): No such file", "a header is missing ({0})", install_hints.toolkit),
    (r"[Cc]annot find -l(\w+)", "the linker does not find a library ({0})", install_hints.toolkit),
    (r"No space left on device", "the disk is full ({0})", _OTHER_DISKS),
    (r"Killed|signal 9|out of memory", "a compiler was killed, perhaps for want of memory ({0})", _ONE_JOB),
)
# Names to install by, where they are not the names to import by.
_PACKAGES = {"PIL": "pillow", "pkg_resources": "setuptools"}


def explain(text: str, torch: Torch | None) -> Failure | None:
    """The meaning of an exception's or a linker's message; None where it is not known."""
    if match := re.search(r"No module named ['\"]([\w]+)", text):
        fix = install_hints.pip(_PACKAGES.get(match[1], match[1]))
        return Failure(f"the Python package {match[1]} is missing", fix)
    return _explain(text, torch, _RULES)


def explain_compiler(output: str, torch: Torch) -> Failure:
    """What went wrong, from the end of a compiler's output; its first error where that is not known."""
    known = _explain(output, torch, _COMPILER_RULES)
    return known or Failure(first_error(output) or "the compiler failed", "see the log")


def _explain(text: str, torch: Torch | None, rules: tuple[_Rule, ...]) -> Failure | None:
    for pattern, what, fix in rules:
        if match := re.search(pattern, text):
            names = {
                "e": "exllamav2's compiled extension",
                "torch": torch.version if torch else "none",
                "cuda": f"CUDA {torch.cuda}" if torch and torch.cuda else "no CUDA",
            }
            what = what.format(match[0].strip(), *match.groups(), **names)
            return Failure(what, fix if isinstance(fix, str) else fix(torch), rebuild=fix == BUILD)
    return None


def first_error(output: str) -> str:
    """The first line that reads like an error, the last one where none does."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    error = next((line for line in lines if re.search(r"\berror\b|\bfatal\b", line, re.IGNORECASE)), "")
    return (error or (lines[-1] if lines else ""))[:300]


def last_line(text: str) -> str:
    """The last line that is not empty: an exception's own, at the end of a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
