"""The installation, the compiled extensions that are here, and whether they fit it; without importing torch.

Extensions lie in three kinds of places: on the path as module `exllamav2_ext` (a prebuilt wheel of exllamav2, a wheel
of `exl build --out`, or a bare library), in a folder of exl's (`build_root`), and in torch's build folder, where
exllamav2's own import compiles. A file beside the library, `exllamav2_ext.json`, says what it was made for; it counts
only for a library of the size that it names.
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
    """The installed torch: versions as "2.11.0+cu130" and "13.0" (None where built without), and its folder."""

    version: str
    cuda: str | None
    hip: str | None
    folder: Path

    @property
    def cuda_major(self) -> int:
        """0 for a build without CUDA."""
        return int(self.cuda.split(".")[0]) if self.cuda else 0


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


def exllamav2_version() -> str | None:
    """The installed exllamav2's version, with a prebuilt wheel's "+cu128.torch2.8.0"; None where there is none."""
    return package_version(EXLLAMAV2) or "unknown" if importlib.util.find_spec(EXLLAMAV2) else None


def _release() -> str:
    """The version of exllamav2's sources: without the wheel's tag."""
    return (exllamav2_version() or "").partition("+")[0]


def capabilities(*, ask_torch: bool = False) -> list[Capability]:
    """Compute capabilities of this machine's GPUs from the driver, hidden ones included.

    Where NVML tells nothing, as in a container without it, `ask_torch` imports torch to ask.
    """
    with open_driver() as driver:
        answers = [driver.ask("DeviceGetCudaComputeCapability", handle) for handle in driver.gpus()]
    if answers or not ask_torch:
        return [(int(answer[0]), int(answer[1])) for answer in answers if answer]
    import torch

    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def build_root() -> Path:
    """The folder of everything that exl compiles: under TORCH_EXTENSIONS_DIR where set, else in the user's cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(chosen) / "exl" if chosen else user_cache() / "extensions"


def build_folder(torch: Torch, archs: Iterable[str]) -> Path:
    """exl's folder for an extension that fits this installation and has code for these architectures."""
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
    """ "2.11.0+cu130" to "2.11": torch's C++ interface holds within a minor version, and only there."""
    return ".".join(version.partition("+")[0].split(".")[:2])


# --- extensions -------------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What a compiled extension was made for, and how."""

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
        """Why this does not fit the installed torch and the GPUs, in a few words; empty where it does.

        Unknown facts count as fitting.
        """
        if self.torch and _minor(self.torch) != _minor(torch.version):
            return f"built for torch {self.torch}, and torch {torch.version} is here"
        if self.cuda and int(self.cuda.split(".")[0]) != torch.cuda_major:
            return f"built for CUDA {self.cuda}, and this torch has {torch.cuda or 'none'}"
        if self.python and self.python != python_tag():
            return f"built for {self.python}, and this Python is {python_tag()}"
        if self.exllamav2 and (wanted := _release()) and self.exllamav2.partition("+")[0] != wanted:
            return f"built from exllamav2 {self.exllamav2}, and {wanted} is here"
        if self.archs and (missing := uncovered(self.archs, gpus)):
            return f"built for {spoken(self.archs)}, and the GPU here is {', '.join(map(sm, missing))}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"format": 1, **self._asdict(), "archs": list(self.archs)}


class Extension(NamedTuple):
    """A compiled extension: importable, compiled by exl, or in torch's folder, its versions unknown."""

    kind: Literal["installed", "compiled", "unproven"]
    path: Path
    facts: Facts | None = None
    problem: str = ""  # why it cannot serve here, as far as can be told without loading it

    @property
    def usable(self) -> bool:
        """Whether it may be loaded as it is."""
        return self.kind != "unproven" and not self.problem


def extensions(torch: Torch, gpus: Sequence[Capability] = ()) -> list[Extension]:
    """The extensions that are here: the importable one, exl's for this installation, torch's, exl's that do not fit.

    The first usable one is to be loaded; where there is none, the first of all says most about why.
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
    """One that exl compiled, with code for all of `archs` and for the GPUs."""
    own = (e for e in extensions(torch, gpus) if e.kind == "compiled" and e.usable)
    return next(((e.path, e.facts) for e in own if e.facts and set(archs) <= set(e.facts.archs)), None)


def publish(
    library: Path, torch: Torch, archs: Iterable[str], seconds: float = 0.0, compilers: str = ""
) -> tuple[Path, Facts]:
    """Copy a tested library into exl's folder for its architectures, whole at any moment, with its facts beside it."""
    size, now = library.stat().st_size, datetime.now(timezone.utc).isoformat(timespec="seconds")
    made_for = _release(), torch.version, torch.cuda or "", python_tag(), tuple(archs)
    facts = Facts(*made_for, size, now, round(seconds, 1), compilers)
    folder = build_folder(torch, facts.archs)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{LIBRARY}.new"
    shutil.copyfile(library, temporary)
    # Until the new facts are written those of the old library do not fit the new one's size.
    temporary.replace(folder / LIBRARY)
    write_atomically(folder / FACTS, json.dumps(facts.to_dict(), indent=1) + "\n")
    return folder / LIBRARY, facts


def read_facts(library: Path) -> Facts | None:
    """What stands beside a library; None where nothing does, or it is about another one."""
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
    """From the version of a prebuilt wheel: "0.3.2+cu128.torch2.8.0"."""
    match = re.fullmatch(r"([\d.]+)\+cu(\d+)(\d)\.torch([\d.]+)", package_version(EXLLAMAV2) or "")
    return Facts(match[1], match[4], f"{match[2]}.{match[3]}", "") if match else None


# --- GPU architectures ------------------------------------------------------------------------------------------------


def parse_archs(text: str) -> tuple[str, ...]:
    """ "8.6,sm_90" to ("8.6", "9.0"), "+PTX" and a letter behind the number kept; ValueError holds what is none."""
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
    """The GPUs for which there is no code.

    Machine code runs on its own major version from its minor version on, PTX on everything later (CUDA C++
    Programming Guide, "Binary Compatibility" and "PTX Compatibility").
    """
    codes = [(capability_of(arch), arch.endswith("+PTX")) for arch in archs]
    return [gpu for gpu in gpus if not any(code <= gpu and (ptx or code[0] == gpu[0]) for code, ptx in codes)]


def sm(capability: Capability) -> str:
    """(9, 0) to "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"


def spoken(archs: Iterable[str]) -> str:
    """Architectures as people write them: "sm_86, sm_90 and later"."""
    words = [sm(capability_of(arch)) + (" and later" if arch.endswith("+PTX") else "") for arch in archs]
    return ", ".join(words) or "no GPU"


def tag(archs: Iterable[str]) -> str:
    """Architectures in a file's name: "sm86.sm90"."""
    return ".".join(sm(capability_of(arch)).replace("_", "") for arch in archs)
