"""Files on their way: each from wherever it stopped to its verified end, several at a time."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from exl_cli.errors import DiskError, DownloadError
from exl_cli.models.hub import store
from exl_cli.models.hub.client import Hub
from exl_cli.models.hub.failures import BrokenTransferError, Patience, status_of
from exl_cli.models.hub.files import File, Listing

_BLOCK = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORKERS = 4
_TICK_SECONDS = 0.1
_STOPPING_SECONDS = 0.3


class Transfer:
    """One file: its bytes so far, on disk, and their digest.

    Args:
        folder: the model's folder, prepared with `store.prepare_staging`.
        size: bytes of it that are here. Any thread may read it: it grows, and falls where bytes had to be given up.
        stop: set it to end at the next piece.
    """

    def __init__(self, hub: Hub, listing: Listing, file: File, folder: Path, size: int, stop: threading.Event) -> None:
        self.file, self.size = file, size
        self._hub, self._listing, self._stop = hub, listing, stop
        self._part = store.part(folder, file)

    def run(self) -> None:
        """Complete the part and verify it.

        Raises:
            DownloadError: the content is wrong, twice.
            DiskError: it cannot be written.
            SystemExit: `stop` was set.
            Exception: the Hub's last failure.
        """
        with store.explained(self._part):
            self._stream = os.open(self._part, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            with store.explained(self._part):
                self._read_part()
            self._receive()
            if not self.file.is_right(self._digest):
                self._hub.note(f"{self.file.name} was corrupted in transit (wrong hash); downloading it again")
                self._restart()
                self._receive()
            if not self.file.is_right(self._digest):
                got, listed = self._digest.hexdigest()[:16], self.file.identity[:16]
                raise DownloadError(
                    f"{self.file.name} was corrupted twice: its hash is {got}…, but the Hub lists {listed}…",
                    "try again later, or check the repository's discussions",
                )
            with store.explained(self._part):
                os.fsync(self._stream)
        finally:
            os.close(self._stream)

    def _read_part(self) -> None:
        """Hash the bytes that an earlier download left; discard them if there are too many."""
        self._digest, self.size = self.file.digest(), os.fstat(self._stream).st_size
        if self.size > self.file.size:
            self._restart()
        while block := os.read(self._stream, _BLOCK):
            self._digest.update(block)

    def _restart(self) -> None:
        os.ftruncate(self._stream, 0)
        os.lseek(self._stream, 0, os.SEEK_SET)
        self.size, self._digest = 0, self.file.digest()

    def _receive(self) -> None:
        """Fill the part up to the file's size, going on after failures that pass."""
        wanted, patience = self.file.size, Patience(self.file.name, self._hub.note, self._hub.wait)
        while self.size < wanted:
            try:
                with closing(self._hub.chunks(self._listing, self.file, self.size)) as chunks:
                    for chunk in chunks:
                        if self._stop.is_set():
                            raise SystemExit
                        if self.size + len(chunk) > wanted:
                            self._restart()
                            raise BrokenTransferError(f"received more than the {wanted:,} bytes that the Hub lists")
                        self._write(chunk)
                        patience.reached(self.size)
                if self.size < wanted:
                    raise BrokenTransferError(f"received only {self.size:,} of {wanted:,} bytes")
            except Exception as error:
                if self._stop.is_set():
                    raise
                if status_of(error) == 416:
                    self._restart()
                    error = BrokenTransferError("the server refuses to resume")
                patience.failed(error)

    def _write(self, chunk: bytes) -> None:
        """Append; bytes written survive the end of the process at any moment."""
        try:
            while chunk:
                written = os.write(self._stream, chunk)
                self._digest.update(chunk[:written])
                self.size += written
                chunk = chunk[written:]
        except OSError as error:
            if error.errno in _FULL:
                raise DiskError(
                    f"the disk is full: {self.file.name} stopped at {self.size:,} of {self.file.size:,} bytes",
                    "free some space, then run the same command to resume",
                ) from error
            raise DiskError(f"cannot write {self._part}: {error.strerror or error}", "check the disk") from error


def run_all(
    jobs: Sequence[Callable[[], object]], stop: threading.Event, tick: Callable[[], object] = lambda: None
) -> None:
    """Run jobs in this order, a few at a time; the first failure, or Ctrl-C, sets `stop` and is raised here.

    Once `stop` is set no other job begins. `tick` is called from this thread, ten times a second and after the last
    job. The threads are daemons: one that hangs in a dead connection must not keep the program from ending.
    """
    waiting = iter(jobs)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for job in waiting:
                if stop.is_set():
                    return
                job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_WORKERS, len(jobs)))]
    try:
        for thread in threads:
            thread.start()
        while not failures and (running := [thread for thread in threads if thread.is_alive()]):
            running[0].join(_TICK_SECONDS)
            tick()
        # The last thread may have ended, or failed, since the loop last looked.
        if failures:
            raise failures[0]
        tick()
    except BaseException:
        stop.set()
        deadline = time.monotonic() + _STOPPING_SECONDS
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        raise
