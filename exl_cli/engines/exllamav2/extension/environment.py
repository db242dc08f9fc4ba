"""The installation that an extension has to fit, and the folders for it. torch is not imported."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from exl_cli.system.files import user_cache
from exl_cli.system.nvml import open_driver

EXLLAMAV2 = "exllamav2"


@dataclass(frozen=True)
class Torch:
    """The installed torch.

    Attributes:
        version: e.g. "2.11.0+cu130".
        cuda: the CUDA version it was built with, e.g. "13.0"; None for a build without.
        hip: likewise for ROCm.
        folder: the package's folder.
    """

    version: str
    cuda: str | None
    hip: str | None
    folder: Path

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor: torch's C++ interface holds within them, and only there."""
        return major_minor(self.version)

    @property
    def cuda_major(self) -> int:
        """0 for a build without CUDA."""
        return int(self.cuda.split(".")[0]) if self.cuda else 0


def major_minor(text: str) -> tuple[int, int]:
    """ "2.11.0+cu130" to (2, 11); anything but a number counts as 0."""
    parts = [int(part) if part.isdigit() else 0 for part in text.partition("+")[0].split(".")[:2]]
    return (parts[0], parts[1] if len(parts) > 1 else 0)


def torch_here() -> Torch | None:
    """The installed torch, read from its `version.py`; None where there is none, or half of one."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        facts = runpy.run_path(str(folder / "version.py"))
        return Torch(str(facts["__version__"]), facts.get("cuda"), facts.get("hip"), folder)
    except Exception:  # half an installation can hold anything
        return None


def python_tag() -> str:
    """This Python's binary interface and machine, e.g. "cpython-312-x86_64-linux-gnu"."""
    return str(sysconfig.get_config_var("SOABI") or "")


def installed_version(package: str, unknown: str = "unknown") -> str | None:
    """The version of an installed package; None where it is not installed."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return unknown


def exllamav2_version() -> str | None:
    """The installed exllamav2's version, with a prebuilt wheel's "+cu128.torch2.8.0"; None where there is none."""
    return installed_version(EXLLAMAV2)


def exllamav2_release() -> str:
    """The same without the wheel's tag: the version of the sources."""
    return (exllamav2_version() or "").partition("+")[0]


def capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of this machine's GPUs from the driver, hidden ones included; empty without one."""
    with open_driver() as driver:
        answers = [driver.ask("DeviceGetCudaComputeCapability", handle) for handle in driver.gpus()]
    return [(int(answer[0]), int(answer[1])) for answer in answers if answer]


def build_root() -> Path:
    """The folder of everything that exl compiles: under TORCH_EXTENSIONS_DIR where set, else in the user's cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(chosen) / "exl" if chosen else user_cache() / "extensions"


def build_prefix(torch: Torch) -> str:
    """Begins the name of each folder in `build_root` that fits this installation; the GPU architectures follow."""
    torch_release = ".".join(map(str, torch.release))
    return f"exllamav2-{exllamav2_release()}-torch{torch_release}-cu{torch.cuda}-{python_tag()}"


def torch_build_folder(torch: Torch) -> Path:
    """Where a plain import of exllamav2 compiles; see `torch.utils.cpp_extension._get_build_directory`."""
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen) / "exllamav2_ext"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - no error without HOME
    nodot, abiflags = (sysconfig.get_config_var(name) or "" for name in ("py_version_nodot", "abiflags"))
    cuda = (torch.cuda or "").replace(".", "")
    return Path(cache) / "torch_extensions" / f"py{nodot}{abiflags}_cu{cuda}" / "exllamav2_ext"
