"""The compiled extensions that are here, and whether they fit; found without importing torch or exllamav2.

They lie in three kinds of places: on the path as module `exllamav2_ext` (a prebuilt wheel of exllamav2, a wheel of
`exl build --out`, or a bare library), in a folder of exl's own (`environment.build_root`), and in torch's build folder,
where exllamav2's own import compiles. A file beside the library, `exllamav2_ext.json`, says what it was made for; it
counts only for a library of the size that it names.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from exl_cli.engines.exllamav2.extension import environment
from exl_cli.engines.exllamav2.extension.environment import Torch, major_minor
from exl_cli.system.files import write_atomically

MODULE = "exllamav2_ext"
FACTS = f"{MODULE}.json"
LIBRARY = f"{MODULE}.so"
_FORMAT = 1

Capability = tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """What a compiled extension was made for.

    Attributes:
        exllamav2, torch, cuda: versions.
        python: the binary interface's tag, as `environment.python_tag`.
        archs: GPU architectures, as TORCH_CUDA_ARCH_LIST has them: "9.0", or "9.0+PTX" where later ones can be served.
        size: bytes of the library.
        built: when, in ISO 8601; seconds: how long that took; compilers: which.
    """

    exllamav2: str
    torch: str
    cuda: str
    python: str
    archs: tuple[str, ...] = ()
    size: int = 0
    built: str = ""
    seconds: float = 0.0
    compilers: str = ""

    def mismatch(self, torch: Torch, capabilities: Sequence[Capability] = ()) -> str:
        """Why this does not fit here, in a few words; empty where it does. Unknown facts count as fitting.

        Args:
            torch: the installed torch.
            capabilities: the GPUs'.
        """
        if self.torch and major_minor(self.torch) != torch.release:
            return f"built for torch {self.torch}, and torch {torch.version} is here"
        if self.cuda and int(self.cuda.split(".")[0]) != torch.cuda_major:
            return f"built for CUDA {self.cuda}, and this torch has {torch.cuda or 'none'}"
        if self.python and self.python != environment.python_tag():
            return f"built for {self.python}, and this Python is {environment.python_tag()}"
        wanted = environment.exllamav2_release()
        if self.exllamav2 and wanted and self.exllamav2.partition("+")[0] != wanted:
            return f"built from exllamav2 {self.exllamav2}, and {wanted} is here"
        missing = uncovered(self.archs, capabilities) if self.archs else []
        if missing:
            return f"built for {spoken(self.archs)}, and the GPU here is {', '.join(map(sm, missing))}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"format": _FORMAT, **asdict(self), "archs": list(self.archs)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Facts:
        """The same back; unknown keys are left out."""
        names = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        return cls(**{**names, "archs": tuple(map(str, value.get("archs", ())))})


@dataclass(frozen=True)
class Extension:
    """A compiled extension, or none.

    Attributes:
        kind: "installed" (importable), "compiled" (by exl), "unproven" (in torch's folder, for nobody knows what) or
            "missing".
        path: the library.
        facts: what it was made for, where that is known.
        problem: why it cannot serve here, as far as can be told without loading it.
    """

    kind: Literal["installed", "compiled", "unproven", "missing"]
    path: Path | None = None
    facts: Facts | None = None
    problem: str = ""

    @property
    def usable(self) -> bool:
        """Whether it may be loaded as it is."""
        return self.kind in ("installed", "compiled") and not self.problem


def installed(torch: Torch, capabilities: Sequence[Capability] = ()) -> Extension:
    """The importable extension."""
    path = _importable()
    if path is None:
        return Extension("missing", problem=_of_another_python())
    facts = read_facts(path) or _facts_of_wheel()
    return Extension("installed", path, facts, facts.mismatch(torch, capabilities) if facts else "")


def built(torch: Torch, capabilities: Sequence[Capability] = (), archs: Iterable[str] = ()) -> list[Extension]:
    """What exl compiled for this installation with code for all of `archs`; those that fit the GPUs come first."""
    made = []
    for path in sorted(environment.build_root().glob(f"{environment.build_prefix(torch)}-sm*/{LIBRARY}")):
        if (facts := read_facts(path)) and set(archs) <= set(facts.archs):
            made.append(Extension("compiled", path, facts, facts.mismatch(torch, capabilities)))
    return sorted(made, key=lambda extension: bool(extension.problem))


def ready(torch: Torch, capabilities: Sequence[Capability], archs: Iterable[str] = ()) -> tuple[Path, Facts] | None:
    """The first of these that fits."""
    for extension in built(torch, capabilities, archs):
        if extension.usable and extension.path and extension.facts:
            return extension.path, extension.facts
    return None


def find(torch: Torch, capabilities: Sequence[Capability] = ()) -> Extension:
    """The extension that exl would load; where none will do, the one that says most about why.

    Args:
        torch: the installed torch.
        capabilities: of the GPUs it must serve.
    """
    on_path, ours = installed(torch, capabilities), next(iter(built(torch, capabilities)), None)
    for extension in (on_path, ours):
        if extension and extension.usable:
            return extension
    if on_path.kind == "missing" and (path := environment.torch_build_folder(torch) / LIBRARY).is_file():
        return Extension("unproven", path)
    return on_path if on_path.kind == "installed" or ours is None else ours


def publish(library: Path, facts: Facts, torch: Torch) -> Path:
    """Copy a tested library into exl's folder for its architectures, whole at any moment.

    Args:
        library: somewhere else.
        facts: what it was made for.
        torch: the installed torch.
    """
    folder = build_folder(torch, facts.archs)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{LIBRARY}.new"
    shutil.copyfile(library, temporary)
    # Until the new facts are written those of the old library do not fit the new one's size.
    temporary.replace(folder / LIBRARY)
    write_atomically(folder / FACTS, json.dumps(facts.to_dict(), indent=1) + "\n")
    return folder / LIBRARY


def build_folder(torch: Torch, archs: Iterable[str]) -> Path:
    """exl's folder for an extension with code for these architectures."""
    return environment.build_root() / f"{environment.build_prefix(torch)}-{tag(archs)}"


def read_facts(library: Path) -> Facts | None:
    """What stands beside a library; None where nothing does, or it is about another one."""
    try:
        facts = Facts.from_dict(json.loads((library.parent / FACTS).read_text(encoding="utf-8")))
        return facts if facts.size == library.stat().st_size else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _importable() -> Path | None:
    if (module := sys.modules.get(MODULE)) is not None:
        origin = getattr(module, "__file__", None)
        return Path(origin) if origin else None
    try:
        spec = importlib.util.find_spec(MODULE)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _facts_of_wheel() -> Facts | None:
    """From the version of a prebuilt wheel: "0.3.2+cu128.torch2.8.0"."""
    try:
        match = re.fullmatch(r"([\d.]+)\+cu(\d+)(\d)\.torch([\d.]+)", version(environment.EXLLAMAV2))
    except PackageNotFoundError:
        return None
    return Facts(match[1], match[4], f"{match[2]}.{match[3]}", "") if match else None


def _of_another_python() -> str:
    """Says so where an extension lies on the path that this Python does not see."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    for folder in sys.path:
        for path in Path(folder or ".").glob(f"{MODULE}.*.so"):
            if not path.name.endswith(suffixes):
                return f"{path} is for another Python than this one ({environment.python_tag()})"
    return ""


# --- architectures ----------------------------------------------------------------------------------------------------


def parse_archs(text: str) -> tuple[str, ...]:
    """ "8.6,sm_90" to ("8.6", "9.0"); "+PTX" and a letter behind the number are kept.

    Raises:
        ValueError: something else stands there.
    """
    archs = []
    for word in filter(None, re.split(r"[\s,;]+", text)):
        match = re.fullmatch(r"(?:sm_|compute_)?(?:(\d+)\.(\d)|(\d{1,2})(\d))([af]?)(\+PTX)?", word, re.IGNORECASE)
        if match is None:
            raise ValueError(word)
        major, minor = (match[1], match[2]) if match[1] else (match[3], match[4])
        archs.append(f"{int(major)}.{minor}{match[5].lower()}{(match[6] or '').upper()}")
    return tuple(dict.fromkeys(archs))


def capability_of(arch: str) -> Capability:
    """ "9.0a+PTX" to (9, 0)."""
    major, minor = re.sub(r"[af]?(\+PTX)?$", "", arch).split(".")
    return int(major), int(minor)


def uncovered(archs: Iterable[str], capabilities: Iterable[Capability]) -> list[Capability]:
    """The GPUs for which there is no code.

    Machine code runs on its own major version from its minor version on, PTX on everything later (CUDA C++
    Programming Guide, "Binary Compatibility" and "PTX Compatibility").
    """
    codes = [(capability_of(arch), arch.endswith("+PTX")) for arch in archs]

    def covered(gpu: Capability) -> bool:
        return any((code[0] == gpu[0] and code <= gpu) or (ptx and code <= gpu) for code, ptx in codes)

    return [gpu for gpu in capabilities if not covered(gpu)]


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
