"""One file, from wherever it stopped to its verified end."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exl_cli.errors import DiskError, DownloadError
from exl_cli.models.hub import store
from exl_cli.models.hub.client import Hub, Listing
from exl_cli.models.hub.failures import BrokenTransferError, Patience
from exl_cli.models.hub.store import File

_BLOCK = 2**20
_REPORT_BYTES, _REPORT_SECONDS = 2**18, 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Advance = Callable[[int], None]


class StoppedError(Exception):
    """Another file failed, or the user asked to stop."""


def fetch(hub: Hub, listing: Listing, file: File, folder: Path, advance: Advance, stop: threading.Event) -> None:
    """Bring a file to its staged place, complete and verified.

    Args:
        hub: where from.
        listing: the commit.
        file: one of its files.
        folder: the model's folder, prepared with `store.prepare_staging`.
        advance: called with bytes gained, or lost where a part had to be given up.
        stop: set it to end at the next piece.

    Raises:
        StoppedError: `stop` was set.
        DownloadError: the content is wrong, twice.
        DiskError: it cannot be written.
        Exception: what the Hub's last failure was.
    """
    patience = hub.patience(file.name)
    part = _Part(store.part(folder, file), file)
    try:
        damaged = False
        while True:
            _receive(hub, listing, part, patience, advance, stop)
            if part.is_right():
                break
            if damaged:
                got, listed = part.hexdigest()[:16], file.identity[:16]
                raise DownloadError(
                    f"{file.name} arrived damaged twice: its hash is {got}…, the Hub lists {listed}…",
                    "try again later, or look at the repository's discussions",
                )
            damaged = True
            hub.note(f"{file.name} arrived damaged (wrong hash): fetching it again")
            advance(part.restart())
        part.finish(store.staged(folder, file))
    finally:
        part.close()


def _receive(
    hub: Hub, listing: Listing, part: _Part, patience: Patience, advance: Advance, stop: threading.Event
) -> None:
    """Fill a part up to the file's size, going on after failures that pass."""
    meter = _Meter(advance)
    furthest = part.size
    while part.size < part.file.size:
        try:
            with hub.stream(listing, part.file, part.size) as (begin, chunks):
                if begin != part.size:
                    hub.note(f"{part.file.name}: the server cannot go on in the middle: starting anew")
                    meter.add(part.restart())
                for chunk in chunks:
                    if stop.is_set():
                        raise StoppedError
                    if part.size + len(chunk) > part.file.size:
                        meter.add(part.restart())
                        raise BrokenTransferError(f"more than the {part.file.size:,} bytes that the Hub lists")
                    part.write(chunk)
                    meter.add(len(chunk))
                    # Bytes that were here before a restart are no progress: else a hopeless server is tried for ever.
                    if part.size > furthest:
                        furthest = part.size
                        patience.progressed()
            if part.size < part.file.size:
                raise BrokenTransferError(f"only {part.size:,} of {part.file.size:,} bytes came")
        except (StoppedError, DiskError):
            raise
        except Exception as error:
            if stop.is_set():
                raise StoppedError from error
            if getattr(getattr(error, "response", None), "status_code", 0) == 416:
                meter.add(part.restart())
                error = BrokenTransferError("the server refuses to go on in the middle")
            patience.failed(error)
        finally:
            meter.flush()


class _Part:
    """The bytes of a file that are here, and their digest."""

    def __init__(self, path: Path, file: File) -> None:
        self.path, self.file = path, file
        self.size = 0
        self._digest: Any = file.digest()
        with store.explained(path):
            self._stream = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            while block := os.read(self._stream, _BLOCK):
                self._digest.update(block)
                self.size += len(block)
        if self.size > file.size:
            self.restart()

    def write(self, chunk: bytes) -> None:
        """Append; what is written survives the end of the process at any moment."""
        rest = memoryview(chunk)
        try:
            while rest:
                written = os.write(self._stream, rest)
                self._digest.update(rest[:written])
                self.size += written
                rest = rest[written:]
        except OSError as error:
            if error.errno in _FULL:
                raise DiskError(
                    f"the disk is full: {self.file.name} stopped at {self.size:,} of {self.file.size:,} bytes",
                    "make room; the same command goes on where it stopped",
                ) from error
            raise DiskError(f"cannot write {self.path}: {error.strerror or error}", "check the disk") from error

    def restart(self) -> int:
        """Throw the bytes away; returns how many, negative."""
        lost = self.size
        os.ftruncate(self._stream, 0)
        os.lseek(self._stream, 0, os.SEEK_SET)
        self.size, self._digest = 0, self.file.digest()
        return -lost

    def hexdigest(self) -> str:
        """Of the bytes so far, as `File.identity` counts it."""
        return str(self._digest.hexdigest())

    def is_right(self) -> bool:
        """Whether the complete content is the one that the Hub lists."""
        return not self.file.identity or self.hexdigest() == self.file.identity

    def finish(self, staged: Path) -> None:
        """Make sure of the bytes and give the file its staged name."""
        with store.explained(staged):
            os.fsync(self._stream)
            self.path.replace(staged)

    def close(self) -> None:
        """Leave the part as it is."""
        os.close(self._stream)


class _Meter:
    """Adds bytes up, so that whoever watches is not called for every packet."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._bytes, self._last = 0, time.monotonic()

    def add(self, count: int) -> None:
        self._bytes += count
        if self._bytes >= _REPORT_BYTES or time.monotonic() - self._last > _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._bytes:
            self._advance(self._bytes)
        self._bytes, self._last = 0, time.monotonic()
