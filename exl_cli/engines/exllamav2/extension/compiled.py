"""Find compiled extensions and check them against the installed torch, exllamav2 and GPUs, without importing torch.

Extensions can be on sys.path as module `exllamav2_ext` (from a prebuilt wheel of exllamav2, from a wheel of `exl build
--out`, or a bare library), in exl's cache (`build_root`), and in torch's build folder, where exllamav2's own import
compiles. `exllamav2_ext.json` beside a library records what it was built for, and its size, to detect a mismatch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

from exl_cli.system.files import user_cache, write_atomically
from exl_cli.system.nvml import open_driver
from exl_cli.system.version import package_version

EXLLAMAV2, MODULE = "exllamav2", "exllamav2_ext"
FACTS, LIBRARY = f"{MODULE}.json", f"{MODULE}.so"

Capability = tuple[int, int]


class Torch(NamedTuple):
    """The installed torch: version ("2.11.0+cu130"), CUDA and ROCm versions ("13.0" or None), and folder."""

    version: str
    cuda: str | None
    hip: str | None
    folder: Path

    @property
    def cuda_major(self) -> int:
        """CUDA's major version; 0 without CUDA."""
        return int(self.cuda.split(".")[0]) if self.cuda else 0


def torch_here() -> Torch | None:
    """The installed torch, from its `version.py`; None if it is missing or broken."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        facts = runpy.run_path(str(folder / "version.py"))
        return Torch(str(facts["__version__"]), facts.get("cuda"), facts.get("hip"), folder)
    except Exception:  # a broken installation can raise anything
        return None


def python_tag() -> str:
    """This Python's ABI and platform, such as "cpython-312-x86_64-linux-gnu"."""
    return str(sysconfig.get_config_var("SOABI") or "")


def exllamav2_version() -> str | None:
    """The installed exllamav2's version, "0.3.2+cu128.torch2.8.0" for a prebuilt wheel; None if it is missing."""
    return package_version(EXLLAMAV2) or "unknown" if importlib.util.find_spec(EXLLAMAV2) else None


def _release() -> str:
    """exllamav2's version without the wheel's tag."""
    return (exllamav2_version() or "").partition("+")[0]


def capabilities(*, ask_torch: bool = False) -> list[Capability]:
    """Compute capabilities of this machine's GPUs from NVML, including hidden ones.

    Without NVML, as in some containers, `ask_torch` falls back to importing torch.
    """
    with open_driver() as driver:
        answers = [driver.ask("DeviceGetCudaComputeCapability", handle) for handle in driver.gpus()]
    if answers or not ask_torch:
        return [(int(answer[0]), int(answer[1])) for answer in answers if answer]
    import torch

    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def build_root() -> Path:
    """The folder of all extensions compiled by exl: in TORCH_EXTENSIONS_DIR if set, else in the user's cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(chosen) / "exl" if chosen else user_cache() / "extensions"


def build_folder(torch: Torch, archs: Iterable[str]) -> Path:
    """exl's cache folder for an extension for this installation and these architectures."""
    key = f"exllamav2-{_release()}-torch{_minor(torch.version)}-cu{torch.cuda}-{python_tag()}"
    return build_root() / f"{key}-{tag(archs)}"


def torch_build_folder(torch: Torch) -> Path:
    """Where a plain import of exllamav2 compiles; see `torch.utils.cpp_extension._get_build_directory`."""
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen) / MODULE
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - no error without HOME
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    return Path(cache) / "torch_extensions" / f"{python}_cu{(torch.cuda or '').replace('.', '')}" / MODULE


def _minor(version: str) -> str:
    """ "2.11.0+cu130" to "2.11". torch's C++ ABI is stable only within a minor version."""
    return ".".join(version.partition("+")[0].split(".")[:2])


# --- extensions -------------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What a compiled extension was built for."""

    exllamav2: str
    torch: str
    cuda: str
    python: str  # as `python_tag`
    archs: tuple[str, ...] = ()  # as TORCH_CUDA_ARCH_LIST has them: "9.0", or "9.0+PTX" to serve later GPUs too
    size: int = 0  # bytes of the library
    built: str = ""  # when, in ISO 8601
    seconds: float = 0.0
    compilers: str = ""

    def mismatch(self, torch: Torch, gpus: Sequence[Capability] = ()) -> str:
        """Why this does not fit the installed torch, Python, exllamav2 or GPUs; empty if it fits or is unknown."""
        if self.torch and _minor(self.torch) != _minor(torch.version):
            return f"built for torch {self.torch}, but torch {torch.version} is installed"
        if self.cuda and int(self.cuda.split(".")[0]) != torch.cuda_major:
            return f"built for CUDA {self.cuda}, but torch has {torch.cuda or 'none'}"
        if self.python and self.python != python_tag():
            return f"built for {self.python}, but this Python is {python_tag()}"
        if self.exllamav2 and (wanted := _release()) and self.exllamav2.partition("+")[0] != wanted:
            return f"built from exllamav2 {self.exllamav2}, but {wanted} is installed"
        if self.archs and (missing := uncovered(self.archs, gpus)):
            return f"built for {spoken(self.archs)}, but this machine's GPU is {', '.join(map(sm, missing))}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **self._asdict(), "archs": list(self.archs)}


class Extension(NamedTuple):
    """A compiled extension: importable, compiled by exl, or ("unproven") compiled by exllamav2 for unknown versions."""

    kind: Literal["installed", "compiled", "unproven"]
    path: Path
    facts: Facts | None = None
    problem: str = ""  # why it does not fit, as far as known without loading it

    @property
    def usable(self) -> bool:
        """Whether it may be loaded."""
        return self.kind != "unproven" and not self.problem


def extensions(torch: Torch, gpus: Sequence[Capability] = ()) -> list[Extension]:
    """All extensions, in order: importable, exl's that fit, torch's, exl's that do not fit.

    The first usable one should be loaded. If none is usable, the problem of the first one explains why best.
    """
    here = []
    if library := _importable():
        facts = read_facts(library) or _facts_of_wheel()
        here.append(Extension("installed", library, facts, facts.mismatch(torch, gpus) if facts else ""))
    paths = sorted(build_root().glob(f"{build_folder(torch, ()).name}sm*/{LIBRARY}"))
    own = [Extension("compiled", p, facts, facts.mismatch(torch, gpus)) for p in paths if (facts := read_facts(p))]
    here += [extension for extension in own if extension.usable]
    if (theirs := torch_build_folder(torch) / LIBRARY).is_file():
        here.append(Extension("unproven", theirs))
    return here + [extension for extension in own if not extension.usable]


def ready(torch: Torch, gpus: Sequence[Capability], archs: Iterable[str] = ()) -> tuple[Path, Facts] | None:
    """A usable extension compiled by exl, with code for all of `archs`; else None."""
    own = (e for e in extensions(torch, gpus) if e.kind == "compiled" and e.usable)
    return next(((e.path, e.facts) for e in own if e.facts and set(archs) <= set(e.facts.archs)), None)


def publish(
    library: Path, torch: Torch, archs: Iterable[str], seconds: float = 0.0, compilers: str = ""
) -> tuple[Path, Facts]:
    """Copy a tested library into exl's cache, atomically, with its facts beside it."""
    size, now = library.stat().st_size, datetime.now(timezone.utc).isoformat(timespec="seconds")
    made_for = _release(), torch.version, torch.cuda or "", python_tag(), tuple(archs)
    facts = Facts(*made_for, size, now, round(seconds, 1), compilers)
    folder = build_folder(torch, facts.archs)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{LIBRARY}.new"
    shutil.copyfile(library, temporary)
    # Until the new facts are written, the old ones are ignored, because they record another size.
    temporary.replace(folder / LIBRARY)
    write_atomically(folder / FACTS, json.dumps(facts.to_dict(), indent=1) + "\n")
    return folder / LIBRARY, facts


def read_facts(library: Path) -> Facts | None:
    """The facts beside a library; None if they are missing or describe a library of another size."""
    try:
        value = json.loads((library.parent / FACTS).read_text(encoding="utf-8"))
        known = {name: value[name] for name in Facts._fields if name in value}
        facts = Facts(**{**known, "archs": tuple(map(str, value.get("archs", ())))})
        return facts if facts.size == library.stat().st_size else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _importable() -> Path | None:
    try:
        spec = importlib.util.find_spec(MODULE)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _facts_of_wheel() -> Facts | None:
    """Parse the version of a prebuilt wheel, "0.3.2+cu128.torch2.8.0"."""
    match = re.fullmatch(r"([\d.]+)\+cu(\d+)(\d)\.torch([\d.]+)", package_version(EXLLAMAV2) or "")
    return Facts(match[1], match[4], f"{match[2]}.{match[3]}", "") if match else None


# --- GPU architectures ------------------------------------------------------------------------------------------------


def parse_archs(text: str) -> tuple[str, ...]:
    """ "8.6,sm_90a+PTX" to ("8.6", "9.0a+PTX"). ValueError holds the first word that is not an architecture."""
    archs = []
    for word in filter(None, re.split(r"[\s,;]+", text)):
        match = re.fullmatch(r"(?:sm_|compute_)?(\d{1,2})\.?(\d)([af]?)(\+PTX)?", word, re.IGNORECASE)
        if match is None:
            raise ValueError(word)
        archs.append(f"{int(match[1])}.{match[2]}{match[3].lower()}{(match[4] or '').upper()}")
    return tuple(dict.fromkeys(archs))


def capability_of(arch: str) -> Capability:
    """ "9.0a+PTX" to (9, 0)."""
    major, minor = re.sub(r"[af]?(\+PTX)?$", "", arch).split(".")
    return int(major), int(minor)


def uncovered(archs: Iterable[str], gpus: Iterable[Capability]) -> list[Capability]:
    """The GPUs that code for `archs` does not run on.

    Binary code runs on the same major version with an equal or higher minor version, PTX on anything later (CUDA C++
    Programming Guide, "Binary Compatibility" and "PTX Compatibility").
    """
    codes = [(capability_of(arch), arch.endswith("+PTX")) for arch in archs]
    return [gpu for gpu in gpus if not any(code <= gpu and (ptx or code[0] == gpu[0]) for code, ptx in codes)]


def sm(capability: Capability) -> str:
    """(9, 0) to "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"


def spoken(archs: Iterable[str]) -> str:
    """Architectures for messages: "sm_86, sm_90 and later"."""
    words = [sm(capability_of(arch)) + (" and later" if arch.endswith("+PTX") else "") for arch in archs]
    return ", ".join(words) or "no GPU"


def tag(archs: Iterable[str]) -> str:
    """Architectures for file names: "sm86.sm90"."""
    return ".".join(sm(capability_of(arch)).replace("_", "") for arch in archs)
