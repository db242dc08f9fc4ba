"""The models that are here: the built-in one and those in the models folder, listed, described and removed."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_cli.errors import DiskError, ExlError, ModelNotFoundError, UsageError, brief
from exl_cli.models.hub import names, store
from exl_cli.models.hub.store import Marker
from exl_cli.models.info import ModelInfo, inspect
from exl_cli.system.files import expanded, is_folder, is_there, read_file, user_data

BUILTIN = "fable-7m"
BUILTIN_FOLDER = Path(__file__).parent / "builtin" / BUILTIN


def models_dir(given: Path | None = None) -> Path:
    """The folder of downloaded models: the one given, else `EXL_MODELS_DIR`, else the user's data folder."""
    if given is not None:
        return given
    if env := os.environ.get("EXL_MODELS_DIR"):
        return Path(env)
    return user_data() / "models"


def known_models(models: Path | None = None) -> list[str]:
    """Names of the models that can be given without a path: the built-in one and the downloaded folders."""
    return [BUILTIN, *(path.name for path in model_folders(models) if store.state(path) != "partial")]


def model_folders(models: Path | None = None) -> list[Path]:
    """The folders of models, those half downloaded among them, sorted."""
    folder = models_dir(models)
    if not is_folder(folder):
        return []
    entries = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in entries if (path / "config.json").exists() or (path / store.STAGING).exists())


def complete_model(incomplete: str) -> list[str]:
    """Names for the shell to complete: what was downloaded, as owner/name[:revision], else the folder's own name.

    Some shells take a colon for the end of a word; a folder with a revision can be completed by both names.
    """
    names_here = [BUILTIN]
    for path in model_folders():
        marker = store.read_marker(path)
        names_here += [marker.name] if marker else []
        if store.state(path) != "partial" and (marker is None or ":" in marker.name):
            names_here.append(path.name)
    return [name for name in names_here if name.startswith(incomplete)]


def in_hub_cache(repository: names.Repository) -> Path | None:
    """The repository's snapshot in the cache of the Hub's own library, where one with weights is there."""
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
    """A model that is here, or part of one.

    Attributes:
        name: what the user can call it.
        path: its folder.
        size_bytes: bytes of all its files, those that links lead to included.
        info: what it is; None where it cannot be run.
        problem: why not; empty where it can.
        marker: of a download by exl, also of an unfinished one.
        complete: false where a download is unfinished.
    """

    name: str
    path: Path
    size_bytes: int
    info: ModelInfo | None = None
    problem: str = ""
    marker: Marker | None = None
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; sizes in bytes."""
        known: dict[str, Any] = self.info.to_dict() if self.info else {}
        source = self.marker if self.complete else None
        return {
            **known,
            "name": self.name,
            "path": str(self.path),
            "disk_bytes": self.size_bytes,
            "repository": source.repository if source else None,
            "revision": source.revision if source else None,
            "commit": source.commit if source else None,
            "complete": self.complete,
            "problem": self.problem or None,
        }


def entries(models: Path | None = None) -> list[Entry]:
    """All models, the built-in one first, and folders that only look like one, each with its problem.

    Raises:
        DiskError: the models folder cannot be read.
    """
    builtin = inspect(BUILTIN_FOLDER, BUILTIN)
    home = models_dir(models)
    try:
        paths = sorted(home.iterdir()) if home.is_dir() else []
    except OSError as error:
        raise DiskError(f"cannot read {home}: {error.strerror or error}", "check its permissions") from error
    listed = [path for path in paths if not path.name.startswith(".") and _is_listed(path)]
    return [
        Entry(builtin.name, builtin.path, folder_bytes(builtin.path, linked=True), builtin),
        *(describe(path) for path in listed),
    ]


def _is_listed(path: Path) -> bool:
    """Whether it is a model as far as one can see: a lost link, say of a disk not mounted, may well have been one."""
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
    """The model in one folder."""
    size = folder_bytes(path, linked=True)
    try:
        for link in (path, path / "config.json"):
            if _is_lost(link):
                return Entry(path.name, path, size, problem=f"{link} leads to {link.readlink()}, which is not there")
        return _described(path, size)
    except OSError as error:
        return Entry(path.name, path, size, problem=f"cannot be read: {error.strerror or error}")
    except Exception as error:
        # Whatever one folder holds, the others are to be seen.
        return Entry(path.name, path, size, problem=f"cannot be read: {type(error).__name__} {error}")


def _described(path: Path, size: int) -> Entry:
    partial = store.state(path) == "partial"
    marker = store.read_unfinished(path) if partial else store.read_marker(path)
    name = marker.name if marker else path.name
    if partial:
        return Entry(name, path, size, problem="only partly downloaded", marker=marker, complete=False)
    try:
        info = inspect(path, name)
        info.to_dict()  # the values shown come from the same files
        return Entry(name, path, size, info, marker=marker)
    except ExlError as error:
        return Entry(name, path, size, problem=error.message, marker=marker)


def folder_bytes(path: Path, *, linked: bool = False) -> int:
    """Bytes of the files in a folder.

    Args:
        path: the folder.
        linked: count the files that links in it lead to, each once (the Hub's cache consists of links); else what
            lies in the folder itself. Links to folders are not followed.
    """
    sizes: dict[tuple[int, int], int] = {}
    for place, _, files in os.walk(path):
        for name in files:
            try:
                status = (Path(place) / name).stat(follow_symlinks=linked)
            except OSError:
                continue  # removed meanwhile, or a link to nothing
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def licence(path: Path, marker: Marker | None) -> str:
    """The licence as the model card names it, else the first line of a licence file; empty where neither is there."""
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
    """The folder, directly in the models folder, that a name means. It may be a link, which is not followed.

    Args:
        model: owner/name[:revision], a folder's name, or a path to it.
        models: see `models_dir`.

    Raises:
        UsageError: the built-in model, or a place outside the models folder.
        ModelNotFoundError: nothing of that name is there, or it is no model.
    """
    if model == BUILTIN:
        raise UsageError(f"{model} comes with exl and is not removed", "uninstall exl-cli to be rid of it")
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
        # Only the last part is taken as it is: following it could lead anywhere.
        path = given.absolute()
        if path.name in ("", ".", "..") or path.parent.resolve() != home.resolve():
            raise UsageError(
                f"{brief(model)} is not directly in {home}, and exl rm deletes nothing else", "remove it yourself"
            )
    if not os.path.lexists(path):
        raise ModelNotFoundError(f"{brief(model)} is not in {home}", "exl list shows what is")
    if not path.is_symlink() and not _is_model(path):
        raise ModelNotFoundError(f"{path} is no model, so exl rm leaves it alone", "remove it yourself")
    return path


def _is_model(path: Path) -> bool:
    return path.is_dir() and any(os.path.lexists(path / name) for name in ("config.json", store.MARKER, store.STAGING))


def remove(path: Path) -> None:
    """Remove a folder found with `find_to_remove`; of a link, the link alone.

    Raises:
        DiskError: it cannot be removed, or is being downloaded just now.
    """
    with store.lock(path, None), store.explained(path):
        if path.is_symlink():
            path.unlink()
            return
        # Out of sight at once: nothing half removed is ever taken for a model.
        doomed = path.with_name(f".exl-removed-{os.getpid()}-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
