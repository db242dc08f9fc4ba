"""A model's folder on disk: complete files, and parts still to be completed.

A download collects its files in `.exl-download/` inside the model's folder, under names made of their contents' hashes:
a part is never continued with the bytes of another file or commit. Once all are complete and verified they are moved to
their places, `config.json` last, and then the marker `.exl.json` is written; until then the same marker lies in
`.exl-download/` and names the files being fetched. A folder with `.exl-download/` and no marker beside it is half a
model and never taken for one; a folder with neither was put there by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from exl_cli.errors import DiskError, DownloadError, param
from exl_cli.models.hub.files import File, is_reserved
from exl_cli.models.hub.names import Repository
from exl_cli.system.files import is_folder, locked, read_file, write_atomically

MARKER = ".exl.json"
STAGING = ".exl-download"
_LOCKS = ".exl-locks"
_VERSION = 1


@dataclass(frozen=True)
class Marker:
    """What `.exl.json` says of a download.

    Attributes:
        commit: the commit that the repository's revision stood for.
        files: by name.
        license: the model card's, or empty.
        others: names of the commit's files that were not fetched; None where an older exl did not note them.
        by_hand: of an unfinished download: the folder was put there by hand, and is still as it was.
    """

    repository: Repository
    commit: str
    files: dict[str, File] = field(default_factory=dict)
    license: str = ""
    others: tuple[str, ...] | None = None
    by_hand: bool = False

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files.values())


def size_of(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def read_marker(folder: Path) -> Marker | None:
    """The marker in a folder; None where there is none that can be understood."""
    try:
        value = json.loads(read_file(folder / MARKER))
        owner, name = value["repository"].split("/")
        repository = Repository(owner, name, str(value["revision"]))
        files = {name: File(name=name, **entry) for name, entry in value["files"].items() if not is_reserved(name)}
        others = None if value.get("others") is None else tuple(File(name, 0).name for name in value["others"])
        commit, license_ = str(value["commit"]), str(value["license"])
        return Marker(repository, commit, files, license_, others, bool(value.get("by_hand")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def write_marker(folder: Path, marker: Marker) -> None:
    """Declare a folder complete: all at once, or not at all."""
    files = {name: {"size": it.size, "blob_id": it.blob_id, "sha256": it.sha256} for name, it in marker.files.items()}
    repository = {"repository": marker.repository.id, "revision": marker.repository.revision}
    value = {"version": _VERSION, **vars(marker), **repository, "files": files}
    write_atomically(folder / MARKER, json.dumps(value, indent=1))


def state(folder: Path) -> Literal["complete", "partial", "manual", "empty"]:
    """Of a model's folder; see the module's first lines."""
    if not is_folder(folder):
        return "empty"
    if read_marker(folder) is not None:
        return "complete"
    if (folder / STAGING).exists() or (folder / MARKER).exists():
        unfinished = read_marker(folder / STAGING)
        return "manual" if unfinished is not None and unfinished.by_hand else "partial"
    return "manual" if any(folder.iterdir()) else "empty"


def holds_another(folder: Path, repository: Repository) -> bool:
    """Whether this folder belongs to another model: two names can share a folder."""
    marker = read_marker(folder)
    return marker is not None and marker.repository != repository


def part(folder: Path, file: File) -> Path:
    """Where the bytes of a file are collected.

    Its name is made of the content's hash and, since two files may share their content, of the file's name.
    """
    content = file.identity or hashlib.sha256(f"{file.name}:{file.size}".encode()).hexdigest()
    return folder / STAGING / f"{content}.{zlib.crc32(file.name.encode()):08x}.part"


def staged_bytes(folder: Path) -> int:
    """Bytes that an unfinished download has collected."""
    return sum(path.stat().st_size for path in (folder / STAGING).glob("*.part"))


def prepare_staging(folder: Path, marker: Marker, to_install: Collection[File] = ()) -> None:
    """Make the place where the files of a download are collected.

    Raises:
        DownloadError: a link inside the folder leads out of it, where one of the files would be written.
        DiskError: it cannot be made, or a link stands in its place.
    """
    for file in to_install:
        if not _is_inside(folder, folder / file.name):
            leads = f"a link in {folder} leads outside it; {file.name} would be written there"
            raise DownloadError(leads, "remove the link")
    place = folder / STAGING
    if place.is_symlink():
        raise DiskError(f"{place} is a link, so files could be written anywhere", "remove it")
    by_hand = state(folder) == "manual"
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)
        write_marker(place, replace(marker, by_hand=by_hand))


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether a file written at `path`, links followed, would be inside `folder`."""
    return path.parent.resolve().is_relative_to(folder.resolve())


def install(folder: Path, files: Collection[File], marker: Marker) -> None:
    """Move complete parts to their places and declare the folder complete; DiskError if something is in the way."""
    old = read_marker(folder)
    with explained(folder):
        # From here to the new marker this is half a model.
        (folder / MARKER).unlink(missing_ok=True)
        write_marker(folder / STAGING, marker)
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            part(folder, file).replace(folder / file.name)
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
        hint = f"check it, or use another {param('models_dir')}"
        raise DiskError(f"cannot write {where}: {why}", hint) from error


@contextlib.contextmanager
def lock(folder: Path, waiting: Callable[[], object] | None) -> Iterator[None]:
    """Hold the lock of a model's folder, which lies beside the folder, since that can be removed under it.

    `waiting` is called if another process holds it, before waiting for it; with None that is a DiskError.
    """

    def busy() -> None:
        if waiting is None:
            raise DiskError(f"another exl process is using {folder}", "wait for it to finish, or stop it")
        waiting()

    path = folder.parent / _LOCKS / f"{folder.name}.lock"
    with contextlib.ExitStack() as stack:
        with explained(path):
            stack.enter_context(locked(path, busy))
        yield
