"""Local models: list, describe and remove the built-in model and those in the models folder."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_cli.errors import ExlError, ModelNotFoundError, UsageError, brief, os_errors
from exl_cli.models.hub import names, store
from exl_cli.models.hub.store import Marker
from exl_cli.models.info import ModelInfo, inspect
from exl_cli.system.files import expanded, is_folder, is_there, read_file, user_data

BUILTIN = "fable-7m"
BUILTIN_FOLDER = Path(__file__).parent / "builtin" / BUILTIN


def models_dir(given: Path | None = None) -> Path:
    """The folder of downloaded models: `given`, else `EXL_MODELS_DIR`, else `models` in the user data folder."""
    if given is not None:
        return given
    if env := os.environ.get("EXL_MODELS_DIR"):
        return Path(env)
    return user_data() / "models"


def known_models(models: Path | None = None) -> list[str]:
    """Model names that work without a path: the built-in one and the names of downloaded folders."""
    return [BUILTIN, *(path.name for path in model_folders(models) if store.state(path) != "partial")]


def model_folders(models: Path | None = None) -> list[Path]:
    """Sorted model folders, including partial downloads; without those that cannot be read.

    Raises:
        DiskError: the models folder cannot be read.
    """
    folder = models_dir(models)
    if not is_folder(folder):
        return []
    with os_errors(f"cannot read {folder}", "check its permissions"):
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in entries if is_there(path / "config.json") or is_there(path / store.STAGING))


def complete_model(incomplete: str) -> list[str]:
    """Shell completions: owner/name[:revision] for downloads, else the folder's name.

    A folder with a revision is offered under both names, because some shells break words at a colon.
    """
    names_here = [BUILTIN]
    for path in model_folders():
        marker = store.read_marker(path)
        names_here += [str(marker.repository)] if marker else []
        if store.state(path) != "partial" and (marker is None or ":" in str(marker.repository)):
            names_here.append(path.name)
    return [name for name in names_here if name.startswith(incomplete)]


def in_hub_cache(repository: names.Repository) -> Path | None:
    """A repository's snapshot in huggingface_hub's cache, if it has safetensors weights; else None."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    hub = expanded(Path(os.environ.get("HF_HUB_CACHE") or home / "hub"))
    folder = hub / f"models--{repository.owner}--{repository.name}"
    try:
        commit = (folder / "refs" / repository.revision).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = repository.revision
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or not is_there(snapshot / "config.json"):
        return None
    return snapshot if any(snapshot.glob("*.safetensors")) else None


@dataclass(frozen=True)
class Entry:
    """A local model, complete or not.

    Attributes:
        name: the name to use on the command line.
        path: its folder.
        size_bytes: size of all its files, following symbolic links.
        info: None if the model cannot run.
        problem: why it cannot run; else empty.
        marker: exl's download record, also of a partial download; None if exl did not download it.
        complete: False for a partial download.
    """

    name: str
    path: Path
    size_bytes: int
    info: ModelInfo | None = None
    problem: str = ""
    marker: Marker | None = None
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        known: dict[str, Any] = self.info.to_dict() if self.info else {}
        source = self.marker if self.complete else None
        return {
            **known,
            "name": self.name,
            "path": str(self.path),
            "disk_bytes": self.size_bytes,
            "repository": source.repository.id if source else None,
            "revision": source.repository.revision if source else None,
            "commit": source.commit if source else None,
            "complete": self.complete,
            "problem": self.problem or None,
        }


def entries(models: Path | None = None) -> list[Entry]:
    """All local models, the built-in one first. Broken ones are included, with their `problem`.

    Raises:
        DiskError: the models folder cannot be read.
    """
    builtin = inspect(BUILTIN_FOLDER, BUILTIN)
    home = models_dir(models)
    with os_errors(f"cannot read {home}", "check its permissions"):
        paths = sorted(home.iterdir()) if home.is_dir() else []
    listed = [path for path in paths if not path.name.startswith(".") and _is_listed(path)]
    return [
        Entry(builtin.name, builtin.path, folder_bytes(builtin.path, linked=True), builtin),
        *(describe(path) for path in listed),
    ]


def _is_listed(path: Path) -> bool:
    """Whether to list a folder as a model. Dangling links count: their disk may just not be mounted."""
    try:
        (path / "config.json").lstat()
    except PermissionError:
        return True
    except OSError:
        return _is_model(path) or _is_lost(path)
    return True


def _is_lost(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def describe(path: Path) -> Entry:
    """Describe the model in a folder; never raises."""
    size = folder_bytes(path, linked=True)
    try:
        for link in (path, path / "config.json"):
            if _is_lost(link):
                return Entry(path.name, path, size, problem=f"{link} points to {link.readlink()}, which does not exist")
        return _described(path, size)
    except OSError as error:
        return Entry(path.name, path, size, problem=f"unreadable: {error.strerror or error}")
    except Exception as error:
        # One broken folder must not hide the others.
        return Entry(path.name, path, size, problem=f"unreadable: {type(error).__name__} {error}")


def _described(path: Path, size: int) -> Entry:
    partial = store.state(path) == "partial"
    marker = store.read_marker(path / store.STAGING if partial else path)
    name = str(marker.repository) if marker else path.name
    if partial:
        return Entry(name, path, size, problem="only partly downloaded", marker=marker, complete=False)
    try:
        info = inspect(path, name)
        info.to_dict()  # raises for values that cannot be shown
        return Entry(name, path, size, info, marker=marker)
    except ExlError as error:
        return Entry(name, path, size, problem=error.message, marker=marker)


def folder_bytes(path: Path, *, linked: bool = False) -> int:
    """Total size of the files in a folder, in bytes.

    Args:
        path: the folder.
        linked: count the targets of symbolic links to files, each once (huggingface_hub's cache consists of links),
            instead of the links. Links to folders are never followed.
    """
    sizes: dict[tuple[int, int], int] = {}
    for place, _, files in os.walk(path):
        for name in files:
            try:
                status = (Path(place) / name).stat(follow_symlinks=linked)
            except OSError:
                continue  # removed meanwhile, or a dangling link
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def licence(path: Path, marker: Marker | None) -> str:
    """The licence from the download record or the model card, else a licence file's first line, else empty."""
    if marker and marker.license:
        return marker.license
    card = _lines(path / "README.md")
    if card and card[0].strip() == "---":
        for line in card[1:]:
            if line.strip() == "---":
                break
            key, _, value = line.partition(":")
            if key == "license" and value.strip():
                return value.strip().strip("\"'")
    for pattern in ("LICENSE*", "LICENCE*"):
        for file in sorted(path.glob(pattern)):
            if first := next((line.strip() for line in _lines(file) if line.strip()), ""):
                return first
    return ""


def _lines(path: Path) -> list[str]:
    try:
        return read_file(path).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def find_to_remove(model: str, models: Path | None = None) -> Path:
    """Find the entry of the models folder that `exl rm` would delete. A link is returned as it is, not followed.

    Args:
        model: owner/name[:revision], a folder's name, or a path to it.
        models: see `models_dir`.

    Raises:
        UsageError: the built-in model, or a path outside the models folder.
        ModelNotFoundError: no such entry, or not a model.
    """
    if model == BUILTIN:
        raise UsageError(f"{model} is part of exl and cannot be removed", "uninstall exl-cli to remove it")
    home = models_dir(models)
    repository = names.parse(model)
    given = expanded(Path(model))
    if repository is not None and not os.path.lexists(given):
        path = home / repository.folder
        if store.holds_another(path, repository):
            raise ModelNotFoundError(f"{brief(model)} is not in {home}", "exl list shows what is")
    elif given.name == model and model not in (".", ".."):
        path = home / model
    else:
        # Resolve the parent only: resolving the last component would follow a link out of the models folder.
        path = given.absolute()
        if path.name in ("", ".", "..") or path.parent.resolve() != home.resolve():
            raise UsageError(
                f"{brief(model)} is not directly in {home}, and exl rm only deletes models there", "delete it yourself"
            )
    if not os.path.lexists(path):
        raise ModelNotFoundError(f"{brief(model)} is not in {home}", "exl list shows what is")
    if not path.is_symlink() and not _is_model(path):
        raise ModelNotFoundError(f"{path} is not a model, and exl rm only deletes models", "delete it yourself")
    return path


def _is_model(path: Path) -> bool:
    return path.is_dir() and any(os.path.lexists(path / name) for name in ("config.json", store.MARKER, store.STAGING))


def remove(path: Path) -> None:
    """Delete what `find_to_remove` returned; for a link, only the link.

    Raises:
        DiskError: it cannot be deleted, or a download holds its lock.
    """
    with store.lock(path, None), store.explained(path):
        if path.is_symlink():
            path.unlink()
            return
        # Rename first: an interrupted deletion must not leave something that looks like a model.
        doomed = path.with_name(f".exl-removed-{os.getpid()}-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
