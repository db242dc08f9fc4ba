"""A whole model: the missing files fetched in parallel, and all of them put in place at once."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from exl_cli.errors import DiskError, param
from exl_cli.models.hub import locking, store
from exl_cli.models.hub.branches import fit_warning
from exl_cli.models.hub.client import Hub
from exl_cli.models.hub.plan import Item, Outcome, Plan, Wanted, already, prepare, survey
from exl_cli.models.hub.store import Marker, Origin
from exl_cli.models.hub.transfer import StoppedError, fetch
from exl_cli.models.memory import gpus

_WORKERS = 4
_STOPPING_SECONDS = 0.5


class Observer(Protocol):
    """Whoever wants to know how a download is going. Called from several threads."""

    def note(self, message: str) -> None:
        """Something worth a line."""
        ...

    def begin(self, plan: Plan) -> None:
        """The bytes start to come."""
        ...

    def advance(self, name: str, count: int) -> None:
        """So many bytes of a file came; negative where some had to be given up."""
        ...


def download(hub: Hub, wanted: Wanted, observer: Observer, plan: Plan | None = None) -> Outcome:
    """Have a model here, whole.

    Args:
        hub: where from.
        wanted: what, and where to.
        observer: is told what happens.
        plan: from `prepare`, where that has been done.

    Raises:
        DownloadError: it cannot be had; see `failures.explain`.
        DiskError: the disk is full or cannot be written.
        KeyboardInterrupt: Ctrl-C; what has come stays, and the next call goes on from there.
    """
    if done := already(wanted):
        return done
    folder = wanted.folder

    def waiting() -> None:
        observer.note(f"another exl is downloading {wanted.repository}: waiting for it to finish")

    with locking.lock(folder, waiting):
        # Whoever was waited for may have done all of it.
        if done := already(wanted):
            return done
        if plan is not None:
            plan = replace(plan, items=survey(wanted, [item.file for item in plan.items], observer.note))
        else:
            seen: dict[str, Item] = {}
            marker = store.read_marker(folder)
            if marker is not None and wanted.verify and not wanted.force:
                items = survey(wanted, tuple(marker.files.values()), observer.note)
                if all(item.state == "here" for item in items):
                    return Outcome(wanted, marker.commit, tuple(marker.files.values()))
                seen = {item.file.name: item for item in items}
            plan = prepare(hub, wanted, observer.note, seen)
        for message in (plan.left_out, fit_warning(plan, gpus())):
            if message:
                observer.note(message)
        check_disk(plan)
        return _carry_out(hub, plan, observer)


def check_disk(plan: Plan) -> None:
    """Raise before the first byte if the disk cannot take the last.

    Raises:
        DiskError: with both numbers.
    """
    place = plan.wanted.folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if plan.remaining > free:
        need, have = f"{plan.remaining / 1e9:,.2f} GB more", f"{free / 1e9:,.2f} GB free"
        raise DiskError(
            f"{plan.wanted.repository} needs {need}, and {place} has {have}",
            f"make room, or use another {param('models_dir')}",
        )


def _carry_out(hub: Hub, plan: Plan, observer: Observer) -> Outcome:
    wanted, found = plan.wanted, plan.listing
    begun = time.monotonic()
    to_install = [item.file for item in plan.items if item.state != "here"]
    if to_install or store.read_marker(wanted.folder) is None:
        for file in to_install:
            store.check_destination(wanted.folder, file.name)
        store.prepare_staging(wanted.folder, Origin(str(wanted.repository), plan.total))
        observer.begin(plan)
        stop = threading.Event()
        # The largest first: a small one at the end keeps no one waiting.
        rest = sorted((i for i in plan.items if i.state in ("partial", "missing")), key=lambda i: -i.file.size)
        jobs = [
            partial(fetch, hub, found, item.file, wanted.folder, partial(observer.advance, item.file.name), stop)
            for item in rest
        ]
        with hub.explained(wanted.repository):
            _in_threads(jobs, stop, hub.close)
        store.install(wanted.folder, to_install, _marker(plan))
    files = tuple(item.file for item in plan.items)
    return Outcome(wanted, found.commit, files, plan.remaining, time.monotonic() - begun)


def _marker(plan: Plan) -> Marker:
    """What to declare: the files of this order, and those of earlier ones that the commit still has."""
    old = store.read_marker(plan.wanted.folder)
    files = {file.name: file for file in plan.listing.files if old and old.files.get(file.name) == file}
    files |= {item.file.name: item.file for item in plan.items}
    repository, choice, found = plan.wanted.repository, plan.wanted.choice, plan.listing
    origin = (repository.id, repository.revision, found.commit)
    return Marker(*origin, files, found.license, choice.include, choice.exclude)


def _in_threads(jobs: Sequence[Callable[[], None]], stop: threading.Event, abort: Callable[[], None]) -> None:
    """Run the jobs, a few at a time; the first failure, or Ctrl-C, stops them all.

    The threads are daemons: one that hangs in a dead connection must not keep the program from ending.
    """
    waiting = deque(jobs)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            try:
                job = waiting.popleft()
            except IndexError:
                return
            try:
                job()
            except BaseException as error:
                ended.put(error)
                return
            ended.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_WORKERS, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            error = ended.get()
            if error is not None and not isinstance(error, StoppedError):
                raise error
    except BaseException:
        stop.set()
        abort()
        deadline = time.monotonic() + _STOPPING_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        raise
