"""A model's folder on disk: what is complete, and what is still on its way.

A download collects its files in `.exl-download/` inside the model's folder, under names made of their contents' hashes,
so that a part is never continued with the bytes of another file or commit. Only when all are there and verified do
they move to their places, `config.json` last, and only then is the marker `.exl.json` written. A folder with
`.exl-download/` and no marker is half a model and never taken for one; a folder with neither was put there by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from exl_cli.errors import DiskError, DownloadError, param
from exl_cli.models.hub.names import Repository, is_safe
from exl_cli.system.files import write_atomically

MARKER = ".exl.json"
STAGING = ".exl-download"
_ORIGIN = "origin.json"
_VERSION = 1
_BLOCK = 2**20

State = Literal["complete", "partial", "manual", "empty"]


@dataclass(frozen=True)
class File:
    """A file of a repository.

    Attributes:
        name: its path in the repository.
        size: bytes.
        blob_id: git's SHA-1 of it (of the pointer, where it is an LFS file); empty where unknown.
        sha256: of the content, for LFS files; empty for others.
    """

    name: str
    size: int
    blob_id: str = ""
    sha256: str = ""

    @property
    def identity(self) -> str:
        """What the content is known by: its SHA-256, else its git id, else empty."""
        return self.sha256 or self.blob_id

    @property
    def stem(self) -> str:
        """What its staged file is called: from its content and, since two names may share one, from its name."""
        content = self.identity or hashlib.sha256(f"{self.name}:{self.size}".encode()).hexdigest()
        return f"{content}.{zlib.crc32(self.name.encode()):08x}"

    def digest(self) -> Any:
        """A hashlib object to feed the content to, whose hexdigest is to equal `identity`.

        git names a file by the SHA-1 of "blob", its length, a zero byte and its content.
        """
        if self.sha256 or not self.blob_id:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has this content; where no hash is known, this size."""
        try:
            if not path.is_file() or path.stat().st_size != self.size:
                return False
            if not self.identity:
                return True
            digest = self.digest()
            with path.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            raise DiskError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from error
        return bool(digest.hexdigest() == self.identity)


@dataclass(frozen=True)
class Marker:
    """What `.exl.json` says of a complete download.

    Attributes:
        repository, revision: where it came from.
        commit: the commit that the revision stood for.
        files: by name.
        license: the model card's, or empty.
        include, exclude: the patterns that chose the files; empty for exl's own choice.
    """

    repository: str
    revision: str
    commit: str
    files: dict[str, File] = field(default_factory=dict)
    license: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the user calls it: owner/name or owner/name:revision."""
        return self.repository if self.revision == "main" else f"{self.repository}:{self.revision}"

    def damaged(self, folder: Path) -> list[str]:
        """Names of the files that are missing or of another size."""

        def size(name: str) -> int:
            try:
                return (folder / name).stat().st_size
            except OSError:
                return -1

        return [name for name, file in self.files.items() if size(name) != file.size]


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; None where there is none that can be understood."""
    try:
        value = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = {name: File(name=name, **entry) for name, entry in value["files"].items()}
        text = {key: str(value[key]) for key in ("repository", "revision", "commit", "license")}
        found = Marker(**text, files=files, include=tuple(value["include"]), exclude=tuple(value["exclude"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if all(is_safe(name) for name in files) else None


def write_marker(folder: Path, marker: Marker) -> None:
    """Declare a folder complete: all at once, or not at all."""
    value = {"version": _VERSION, **asdict(marker)}
    value["files"] = {
        name: {"size": file.size, "blob_id": file.blob_id, "sha256": file.sha256} for name, file in marker.files.items()
    }
    _write_json(folder / MARKER, value)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1))


def state(folder: Path) -> State:
    """What a folder is: see the module's first lines."""
    if not folder.is_dir():
        return "empty"
    if read_marker(folder) is not None:
        return "complete"
    origin = read_origin(folder)
    if origin is not None and origin.by_hand:
        return "manual"
    if (folder / STAGING).exists() or (folder / MARKER).exists():
        return "partial"
    return "manual" if any(folder.iterdir()) else "empty"


def holds_another(folder: Path, repository: Repository) -> str:
    """The name of another model that this folder belongs to (two names can share one folder); empty where none does."""
    marker = read_marker(folder)
    if marker is None or (marker.repository, marker.revision) == (repository.id, repository.revision):
        return ""
    return marker.name


def staged(folder: Path, file: File) -> Path:
    """Where a file waits, complete and verified, until it moves to its place."""
    return folder / STAGING / f"{file.stem}.whole"


def part(folder: Path, file: File) -> Path:
    """Where the bytes of a file that have come so far are."""
    return folder / STAGING / f"{file.stem}.part"


def staged_bytes(folder: Path) -> int:
    """Bytes that an unfinished download has collected."""
    found = (folder / STAGING).glob("*.*") if (folder / STAGING).is_dir() else ()
    return sum(path.stat().st_size for path in found if path.suffix in (".part", ".whole"))


@dataclass(frozen=True)
class Origin:
    """What an unfinished download is of.

    Attributes:
        name: owner/name or owner/name:revision.
        total: bytes of all its files.
        by_hand: the folder was put there by hand, and is still as it was.
    """

    name: str
    total: int
    by_hand: bool = False


def read_origin(folder: Path) -> Origin | None:
    """What an unfinished download is of; None where nothing says so."""
    try:
        value = json.loads((folder / STAGING / _ORIGIN).read_text(encoding="utf-8"))
        return Origin(str(value["name"]), int(value["total"]), bool(value["by_hand"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def prepare_staging(folder: Path, origin: Origin) -> None:
    """Make the place where files are collected.

    Raises:
        DiskError: it cannot be made, or a link stands in its place.
    """
    place = folder / STAGING
    if place.is_symlink():
        raise DiskError(f"{place} is a link; files written there could land anywhere", "remove it")
    by_hand = state(folder) == "manual"
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)
        _write_json(place / _ORIGIN, asdict(replace(origin, by_hand=by_hand)))


def check_destination(folder: Path, name: str) -> None:
    """Make sure that a file of this name lands inside the model's folder.

    Raises:
        DownloadError: links inside the folder lead out of it.
    """
    if not _is_inside(folder, folder / name):
        raise DownloadError(f"a link inside {folder} leads out of it; {name} would be written there", "remove the link")


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether a file written at `path`, links followed, would be inside `folder`."""
    return path.parent.resolve().is_relative_to(folder.resolve())


def install(folder: Path, files: list[File], marker: Marker) -> None:
    """Move staged files to their places and declare the folder complete.

    Raises:
        DiskError, DownloadError: see `destination`.
    """
    for file in files:
        check_destination(folder, file.name)
    old = read_marker(folder)
    with explained(folder):
        # From here to the new marker this is half a model.
        (folder / MARKER).unlink(missing_ok=True)
        _write_json(folder / STAGING / _ORIGIN, asdict(Origin(marker.name, 0)))
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            staged(folder, file).replace(folder / file.name)
        for name in old.files if old else ():
            if name not in marker.files and _is_inside(folder, folder / name):
                (folder / name).unlink(missing_ok=True)
        write_marker(folder, marker)
        shutil.rmtree(folder / STAGING)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system raises into a `DiskError`."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise DiskError(f"cannot write {where}: {why}", f"check it, or use another {param('models_dir')}") from error
