"""A small stand-in for torch with CUDA, exllamav2 and NVIDIA's compiler: the packages and programs of `data/fakecuda`.

It behaves as they do where `exl build` and the import of exllamav2 meet them: torch's `load` takes its lock, writes a
`build.ninja` and calls ninja; exllamav2's `ext` looks for an importable extension first and hands its sources to that;
nvcc tells its version and compiles. The sources are small C++ files that the real g++ compiles and links, run by the
real ninja.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import preloaded

HAS_COMPILERS = shutil.which("c++") is not None

_FILES = Path(__file__).parent / "data" / "fakecuda"
_COMPUTES = 'return PyObject_CallMethod(x, "softcap_", "d", scale);'


def module_source(declarations: str = "", body: str = _COMPUTES, init: str = "") -> str:
    """A C++ file that is the extension."""
    source = (_FILES / "module.cpp").read_text()
    return source.replace("@declarations@", declarations).replace("@body@", body).replace("@init@", init)


def compile_module(source: str, target: Path) -> Path:
    """Compile one file into an extension, with no build program around it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_suffix(".cpp")
    file.write_text(source)
    subprocess.run(["c++", "-shared", "-fPIC", str(file), "-o", str(target)], check=True)
    file.unlink()
    return target


@dataclass
class Machine:
    """The stand-in, in a folder of its own, and the environment in which programs take it for the real thing."""

    root: Path
    cuda: str = "13.0"
    nvcc: str | None = "13.0"
    torch: str = "2.11.0"
    gpus: str = ""
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._name_paths()
        shutil.copytree(_FILES / "site", self.site)
        version = f"{self.torch}+cu{self.cuda.replace('.', '')}"
        self.write("torch/version.py", f"__version__ = '{version}'\ncuda = {self.cuda!r}\n")
        self.write("exllamav2/exllamav2_ext/bindings.cpp", module_source("int one();", init="one();"))
        if self.nvcc:
            nvcc = self.root / "toolkit" / "bin" / "nvcc"
            shutil.copytree(_FILES / "toolkit", self.root / "toolkit")
            nvcc.write_text(nvcc.read_text().replace("@version@", self.nvcc))

    def _name_paths(self) -> None:
        self.site = self.root / "site"
        self.extensions = self.root / "extensions"
        self.torchs = self.extensions / "exllamav2_ext"
        self.ours = self.extensions / "exl"
        self.log = self.root / "cache" / "exl" / "logs" / "build.log"

    def copied(self, root: Path) -> Machine:
        """Another like it, with what was compiled here."""
        shutil.copytree(self.root, root)
        other = copy.copy(self)
        other.root = root
        other._name_paths()
        return other

    def folder(self, archs: str = "sm90") -> Path:
        """Where exl puts the extension for these architectures."""
        tag = f"torch{self.torch.rpartition('.')[0]}-cu{self.cuda}-{sysconfig.get_config_var('SOABI')}"
        return self.ours / f"exllamav2-0.3.2-{tag}-{archs}"

    @property
    def built(self) -> Path:
        """The extension for compute capability 9.0."""
        return self.folder() / "exllamav2_ext.so"

    @property
    def lock(self) -> Path:
        """torch's lock on exl's build."""
        return self.folder() / "build" / "exllamav2_ext" / "lock"

    def write(self, name: str, text: str) -> None:
        """Put a file among the packages."""
        path = self.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    @property
    def ninja_folder(self) -> str:
        """Where ninja is, which exl finds by itself and torch does not."""
        found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        return str(Path(found).parent) if found else ""

    @property
    def environment(self) -> dict[str, str]:
        """For processes that shall see it."""
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH"), *_source()]))
        return {
            **{key: value for key, value in os.environ.items() if key not in _FOREIGN},
            # The stand-in's files change within a second, which a compiled module's time stamp would not show.
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": path,
            "TORCH_EXTENSIONS_DIR": str(self.extensions),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "XDG_DATA_HOME": str(self.root / "data"),
            "CUDA_HOME": str(self.root / "toolkit"),
            "FAKE_GPUS": self.gpus,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            **self.variables,
        }

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`exl` with these arguments."""
        return preloaded.exl(*arguments, environment={**self.environment, **variables})

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Python with these arguments."""
        environment: Mapping[str, str] = {**self.environment, **variables}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )


_FOREIGN = {"CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "CXX", "CC", "CUDA_VISIBLE_DEVICES"}


def _source() -> list[str]:
    return [str(Path(__file__).parent.parent)]
