"""What a download is to do: what is wanted, what the Hub has, and what of it is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from exl_cli.errors import DamagedModelError, DownloadError, ModelNotFoundError, UnsupportedModelError, param
from exl_cli.models.hub import listing as listings
from exl_cli.models.hub import store
from exl_cli.models.hub.client import Hub, Listing
from exl_cli.models.hub.listing import Choice
from exl_cli.models.hub.names import Repository
from exl_cli.models.hub.store import File, Marker
from exl_cli.models.info import inspect


@dataclass(frozen=True)
class Wanted:
    """What is to be downloaded, and where to.

    Attributes:
        repository: the model.
        models: the folder of models.
        choice: which files.
        force: fetch everything anew, of the newest commit, even if it is here.
        verify: read everything that is here again and compare hashes.
    """

    repository: Repository
    models: Path
    choice: Choice = field(default_factory=Choice)
    force: bool = False
    verify: bool = False

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.models / self.repository.folder


@dataclass(frozen=True)
class Item:
    """A file to have, and how much of it is here.

    Attributes:
        file: the file.
        state: "here" (in its place), "staged" (complete, waiting), "partial" or "missing".
        bytes_here: how many of its bytes need no fetching.
    """

    file: File
    state: Literal["here", "staged", "partial", "missing"]
    bytes_here: int


@dataclass(frozen=True)
class Plan:
    """What a download will do.

    Attributes:
        wanted: the order.
        listing: the commit to fetch.
        items: the files.
        config: config.json, empty where there is none.
        pickles: files that the user asked for and will not get.
    """

    wanted: Wanted
    listing: Listing
    items: tuple[Item, ...]
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    pickles: tuple[str, ...] = ()

    @property
    def left_out(self) -> str:
        """Why files that the user asked for are not fetched; empty where none is missing."""
        return f"left out {', '.join(self.pickles)}: a pickle can run code when it is opened" if self.pickles else ""

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(item.file.size for item in self.items)

    @property
    def remaining(self) -> int:
        """Bytes still to fetch."""
        return sum(item.file.size - item.bytes_here for item in self.items)


@dataclass(frozen=True)
class Outcome:
    """How a download went.

    Attributes:
        wanted: the order.
        commit: the commit that is here; empty for a folder put there by hand.
        files: what is here, by size and hash.
        fetched_bytes, seconds: the work done; 0 where all was here.
        by_hand: the folder was not made by exl.
    """

    wanted: Wanted
    commit: str
    files: tuple[File, ...]
    fetched_bytes: int = 0
    seconds: float = 0.0
    by_hand: bool = False

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def already(wanted: Wanted) -> Outcome | None:
    """The model, if it is here and whole as far as the marker and the sizes tell; touches no network.

    A folder that was put there by hand counts, if it can be run.

    Raises:
        DownloadError: the folder belongs to another model.
    """
    folder = wanted.folder
    if other := store.holds_another(folder, wanted.repository):
        raise DownloadError(
            f"{folder} holds {other}, not {wanted.repository}", f"move it away, or use another {param('models_dir')}"
        )
    if wanted.force or wanted.verify:
        return None
    marker = store.read_marker(folder)
    if marker is not None:
        same = (marker.include, marker.exclude) == (wanted.choice.include, wanted.choice.exclude)
        if not same or marker.damaged(folder):
            return None
        return Outcome(wanted, marker.commit, tuple(marker.files.values()))
    if store.state(folder) == "manual" and not wanted.choice.include and _is_model(folder):
        return Outcome(wanted, "", (), by_hand=True)
    return None


def _is_model(folder: Path) -> bool:
    try:
        inspect(folder)
    except (DamagedModelError, ModelNotFoundError, UnsupportedModelError):
        return False
    return True


def prepare(hub: Hub, wanted: Wanted, note: Callable[[str], None], seen: Mapping[str, Item] | None = None) -> Plan:
    """Ask the Hub what there is, and look at what of it is here.

    Args:
        hub: whom to ask.
        wanted: the order.
        note: is told of files that changed.
        seen: what an earlier look at the same files found.

    Raises:
        ExlError: see `failures.explain`, `listing.check_runnable` and `survey`.
    """
    repository = wanted.repository
    marker = store.read_marker(wanted.folder)
    # What is missing of a complete download comes from the same commit as the rest.
    pinned = replace(repository, revision=marker.commit) if marker and not wanted.force else repository
    with hub.explained(repository):
        found = hub.listing(pinned)
        chosen = listings.select(found.files, wanted.choice)
        config = listings.read_config(hub, found)
    found = replace(found, repository=repository)
    listings.check_runnable(found, chosen, wanted.choice, config)
    pickles = tuple(listings.left_out_pickles(found.files, wanted.choice))
    return Plan(wanted, found, survey(wanted, chosen, note, seen), config, pickles)


def survey(
    wanted: Wanted, files: Sequence[File], note: Callable[[str], None], seen: Mapping[str, Item] | None = None
) -> tuple[Item, ...]:
    """What of these files is here.

    Raises:
        DownloadError: files put there by hand differ from the Hub's.
    """
    folder = wanted.folder
    marker = store.read_marker(folder)
    trusted = _trusted(wanted, marker)
    items: list[Item] = []
    foreign = []
    for file in files:
        earlier = (seen or {}).get(file.name)
        if earlier is not None and earlier.file == file:
            items.append(earlier)
            continue
        item = Item(file, "here", file.size) if file in trusted else _look(wanted, file)
        items.append(item)
        if item.state == "here" or wanted.force or not (folder / file.name).exists():
            continue
        if marker is not None:
            note(f"{folder / file.name} is not as it was downloaded: fetching it again")
        elif store.state(folder) == "manual":
            foreign.append(file.name)
    if foreign:
        differ = f"{', '.join(foreign)} {'differ' if len(foreign) > 1 else 'differs'} from the Hub's"
        raise DownloadError(f"{folder} was put there by hand, and its {differ}", f"{param('force')} replaces them")
    return tuple(items)


def _trusted(wanted: Wanted, marker: Marker | None) -> set[File]:
    """Files that need no reading to be believed."""
    if marker is None or wanted.verify or wanted.force:
        return set()
    damaged = marker.damaged(wanted.folder)
    return {file for file in marker.files.values() if file.name not in damaged}


def _look(wanted: Wanted, file: File) -> Item:
    folder = wanted.folder
    if not wanted.force and file.matches(folder / file.name):
        return Item(file, "here", file.size)
    if _size(store.staged(folder, file)) == file.size and store.staged(folder, file).exists():
        return Item(file, "staged", file.size)
    part = min(_size(store.part(folder, file)), file.size)
    return Item(file, "partial" if part else "missing", part)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
