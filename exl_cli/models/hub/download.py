"""A whole model: how much of an order is here, and the rest fetched in parallel and put in place at once."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from exl_cli.errors import DamagedModelError, DiskError, DownloadError, ModelNotFoundError, UnsupportedModelError, param
from exl_cli.models.hub import store
from exl_cli.models.hub.branches import fit_warning
from exl_cli.models.hub.client import Hub
from exl_cli.models.hub.files import Choice, File, Listing, check_runnable, is_pickle, matches, select
from exl_cli.models.hub.names import Repository
from exl_cli.models.hub.store import Marker
from exl_cli.models.hub.transfer import Transfer, run_all
from exl_cli.models.info import inspect
from exl_cli.models.memory import gpus
from exl_cli.system.files import is_there


@dataclass(frozen=True)
class Wanted:
    """An order: a model, and the folder of models to put it in.

    Attributes:
        force: fetch everything again, of the newest commit, even if it is here.
        verify: read everything that is here again and compare hashes.
    """

    repository: Repository
    models: Path
    choice: Choice = field(default_factory=Choice)
    force: bool = False
    verify: bool = False

    @property
    def folder(self) -> Path:
        return self.models / self.repository.folder


@dataclass(frozen=True)
class Item:
    """A file of an order, and how many of its bytes need no fetching, whether they are in its place or in a part."""

    file: File
    bytes_here: int
    in_place: bool = False

    @property
    def state(self) -> Literal["here", "staged", "partial", "missing"]:
        """For --dry-run; "staged" is a part that has all its bytes."""
        if self.in_place:
            return "here"
        if not self.bytes_here:
            return "missing"
        return "staged" if self.bytes_here == self.file.size else "partial"


@dataclass(frozen=True)
class Plan:
    """What a download will do: the order, the commit to fetch, its files, and config.json or nothing."""

    wanted: Wanted
    listing: Listing
    items: tuple[Item, ...]
    config: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def pickles(self) -> list[str]:
        """Names of the files that the user asked for and will not get."""
        names = (file.name for file in self.listing.files)
        return [name for name in names if is_pickle(name) and matches(name, self.wanted.choice.include)]

    @property
    def left_out(self) -> str:
        """Why files that the user asked for are not fetched; empty where none is missing."""
        return f"skipping {', '.join(self.pickles)}: pickles can run code when opened" if self.pickles else ""

    @property
    def total(self) -> int:
        return sum(item.file.size for item in self.items)

    @property
    def remaining(self) -> int:
        return sum(item.file.size - item.bytes_here for item in self.items)


@dataclass(frozen=True)
class Outcome:
    """How a download went.

    Attributes:
        commit: the commit that is here; empty for a folder put there by hand.
        fetched_bytes, seconds: 0 where all was here.
    """

    wanted: Wanted
    commit: str
    files: tuple[File, ...]
    fetched_bytes: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)


class Observer(Protocol):
    """Takes what a download has to show."""

    def begin(self, plan: Plan) -> None: ...  # before the first byte
    def advance(self, name: str, count: int) -> None: ...  # bytes that a file gained; negative where it gave some up


def already(wanted: Wanted) -> Outcome | None:
    """The model, if it is here and whole as far as the marker and the sizes tell; no request is made.

    A folder that was put there by hand counts, if it can be run.

    Raises:
        DownloadError: the folder belongs to another model.
    """
    return None if wanted.verify else _look_here(wanted)[1]


def _look_here(wanted: Wanted) -> tuple[set[File], Outcome | None]:
    """The files that need no fetching, as far as a marker tells, and the outcome if nothing does."""
    folder, marker = wanted.folder, store.read_marker(wanted.folder)
    if marker is not None and marker.repository != wanted.repository:
        raise DownloadError(
            f"{folder} contains {marker.repository}, not {wanted.repository}",
            f"move it, or use another {param('models_dir')}",
        )
    if wanted.force:
        return set(), None
    if marker is None:
        usable = not (wanted.verify or wanted.choice.include) and store.state(folder) == "manual" and _is_model(folder)
        return set(), Outcome(wanted, "", ()) if usable else None
    files = marker.files.values()
    whole = {file for file in files if wanted.verify or store.size_of(folder / file.name) == file.size}
    if wanted.verify:
        whole = {file for file in whole if file.matches(folder / file.name)}
    chosen = _chosen(marker, wanted.choice)
    return whole, Outcome(wanted, marker.commit, chosen) if chosen and whole.issuperset(chosen) else None


def _chosen(marker: Marker, choice: Choice) -> tuple[File, ...]:
    """The files of a complete download that a choice takes; none where it takes any that are not among them."""
    if marker.others is None:
        return ()
    files = select([*marker.files.values(), *(File(name, 0) for name in marker.others)], choice)
    return tuple(files) if all(file.name in marker.files for file in files) else ()


def _is_model(folder: Path) -> bool:
    try:
        inspect(folder)
    except (DamagedModelError, ModelNotFoundError, UnsupportedModelError):
        return False
    return True


def prepare(hub: Hub, wanted: Wanted, whole: Collection[File] | None = None) -> Plan:
    """Ask the Hub what there is, and look at what of it is here; `whole` are files in place that need no reading.

    Raises:
        ExlError: see `failures.explain`, `files.check_runnable` and `DownloadError` of files put there by hand.
    """
    marker = store.read_marker(wanted.folder)
    with hub.explained(wanted.repository):
        # Files missing from a complete download come from the same commit as the rest.
        commit = marker.commit if marker and not wanted.force else None
        listing = hub.listing(wanted.repository, wanted.choice, commit)
        chosen, config = select(listing.files, wanted.choice), hub.read_config(listing)
    check_runnable(listing, chosen, wanted.choice, config)
    if unknown := [file.name for file in chosen if not file.identity]:
        hub.note(f"the Hub has no hash for {', '.join(unknown)}; checking only the size")
    return Plan(wanted, listing, _survey(hub, wanted, chosen, whole), config)


def _survey(hub: Hub, wanted: Wanted, files: Sequence[File], whole: Collection[File] | None) -> tuple[Item, ...]:
    """What of these files is here."""
    folder, state = wanted.folder, store.state(wanted.folder)
    whole = _look_here(wanted)[0] if whole is None else whole
    items: list[Item] = []
    foreign = []
    for file in files:
        path = folder / file.name
        if file in whole or (not wanted.force and file.matches(path)):
            items.append(Item(file, file.size, in_place=True))
            continue
        part = store.size_of(store.part(folder, file))
        items.append(Item(file, part if 0 <= part <= file.size else 0))
        if state == "complete" and not wanted.force and path.exists():
            hub.note(f"{path} has changed since it was downloaded; downloading it again")
        elif state == "manual" and not wanted.force and path.exists():
            foreign.append(file.name)
    if foreign:
        differ = f"{', '.join(foreign)} {'differ' if len(foreign) > 1 else 'differs'} from the Hub"
        raise DownloadError(
            f"{folder} was not downloaded by exl, and its {differ}", f"replace them with {param('force')}"
        )
    return tuple(items)


def download(hub: Hub, wanted: Wanted, observer: Observer, plan: Plan | None = None) -> Outcome:
    """Fetch the missing part of a model, after `prepare` unless its plan is given.

    Raises:
        DownloadError: see `failures.explain`.
        DiskError: the disk is full or cannot be written.
        KeyboardInterrupt: Ctrl-C; what has come stays, and the next call resumes there.
    """
    waiting = f"another exl process is downloading {wanted.repository}; waiting for it to finish"
    with store.lock(wanted.folder, lambda: hub.note(waiting)):
        # The other one may have done all of it.
        whole, done = _look_here(wanted)
        if done is not None:
            return done
        if plan is None:
            plan = prepare(hub, wanted, whole)
        else:
            plan = replace(plan, items=_survey(hub, wanted, [item.file for item in plan.items], whole))
        for message in filter(None, (plan.left_out, fit_warning(plan, gpus()))):
            hub.note(message)
        _check_disk(plan)
        begun = time.monotonic()
        _carry_out(hub, plan, observer)
        files = tuple(item.file for item in plan.items)
        return Outcome(wanted, plan.listing.commit, files, plan.remaining, time.monotonic() - begun)


def _check_disk(plan: Plan) -> None:
    """Raise before the first byte if the disk cannot take the last."""
    place = plan.wanted.folder.absolute()
    while not is_there(place):
        place = place.parent
    free = shutil.disk_usage(place).free
    if plan.remaining > free:
        need, have = f"{plan.remaining / 1e9:,.2f} GB more", f"{free / 1e9:,.2f} GB free"
        raise DiskError(
            f"{plan.wanted.repository} needs {need}, but {place} has {have}",
            f"free some space, or use another {param('models_dir')}",
        )


def _carry_out(hub: Hub, plan: Plan, observer: Observer) -> None:
    """Fetch the missing files and put them in place; the first failure, or Ctrl-C, stops all transfers."""
    folder, old = plan.wanted.folder, store.read_marker(plan.wanted.folder)
    marker = _marker(plan, old)
    # The largest first: a small one at the end keeps no one waiting.
    rest = sorted((item for item in plan.items if not item.in_place), key=lambda item: -item.file.size)
    if old is not None and not rest:
        if marker != old:
            with store.explained(folder):
                store.write_marker(folder, marker)
        return
    files = [item.file for item in rest]
    store.prepare_staging(folder, marker, files)
    observer.begin(plan)
    stop = threading.Event()
    transfers = [Transfer(hub, plan.listing, item.file, folder, item.bytes_here, stop) for item in rest]
    reported = [item.bytes_here for item in rest]

    def report() -> None:
        for index, transfer in enumerate(transfers):
            gained = transfer.size - reported[index]
            reported[index] += gained
            if gained:
                observer.advance(transfer.file.name, gained)

    with hub.explained(plan.wanted.repository):
        try:
            run_all([transfer.run for transfer in transfers], stop, report)
        except BaseException:
            hub.close()
            raise
    store.install(folder, files, marker)


def _marker(plan: Plan, old: Marker | None) -> Marker:
    """What to declare: the files of this order, and those of earlier ones that the commit still has."""
    listing, before = plan.listing, old.files if old else {}
    same = old is not None and old.commit == listing.commit
    kept = [file for file in listing.files if file.name in before and (same or before[file.name] == file)]
    files = {file.name: before[file.name] for file in kept} | {item.file.name: item.file for item in plan.items}
    others = tuple(file.name for file in listing.files if file.name not in files)
    return Marker(listing.repository, listing.commit, files, listing.license, others)
