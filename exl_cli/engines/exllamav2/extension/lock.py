"""One build at a time, and which lock nobody holds any more.

torch marks a build by a file named `lock` that exists while it lasts (`torch/utils/file_baton.py`). Whoever finds it
waits until it is gone: for ever, where the builder was killed. Its maker keeps it open while it builds, so a lock is

- *held* while some process of this machine has that very file open (by device and inode, in /proc), or while the
  process that it names lives (`exl` writes down its process id, machine and boot; torch writes nothing);
- *stale* where no process has it open, and either it names a process of this machine that is gone, or nothing in its
  folder was written for ten minutes, more than any single file takes to compile;
- *unclear* otherwise: made a short while ago by no process that can be seen from here, which may still be one in
  another container, or on another machine that shares the folder.

Builds of exl exclude each other by a lock of the kernel's besides, which ends with its process; what is stale is
removed under it, so that no one removes the lock that another has just made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

QUIET_SECONDS = 600.0
_POLL_SECONDS = 0.2
_OURS = ".exl-lock"

State = Literal["free", "held", "stale", "unclear"]


@dataclass(frozen=True)
class Lock:
    """A build folder's lock.

    Attributes:
        path: torch's lock file.
        state: see the module's first lines.
        holder: who holds it, in words; empty where that is not known.
        age: seconds since it was made.
    """

    path: Path
    state: State
    holder: str = ""
    age: float = 0.0


def look(folder: Path, now: float | None = None) -> Lock:
    """What the lock of a build folder is.

    Args:
        folder: the build folder; it need not exist.
        now: the time, seconds since 1970; the clock's where not given.
    """
    path = folder / "lock"
    now = time.time() if now is None else now
    try:
        status = path.stat()
    except OSError:
        return Lock(path, "free")
    age = max(0.0, now - status.st_mtime)
    named = _named(path)
    if pid := _opener(status) or (named.pid if named and named.alive() else None):
        name = "exl build" if named and named.pid == pid else _command(pid)
        return Lock(path, "held", f"process {pid} ({name})", age)
    if named and named.here():
        return Lock(path, "stale", f"process {named.pid}, which is gone", age)
    if now - _newest(folder) > QUIET_SECONDS:
        return Lock(path, "stale", "", age)
    return Lock(path, "unclear", "", age)


@dataclass(frozen=True)
class _Named:
    """The process that a lock of exl's names."""

    pid: int
    started: str
    host: str
    boot: str

    def here(self) -> bool:
        """Whether it ran on this machine since it was last started, in the same container."""
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    def alive(self) -> bool:
        """Whether it still runs; another process may have got its number meanwhile."""
        return self.here() and bool(self.started) and _started(self.pid) == self.started


def _named(path: Path) -> _Named | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return _Named(int(value["pid"]), str(value["started"]), str(value["host"]), str(value["boot"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _boot() -> str:
    """Names the time since the machine was started, and the container: their process numbers are their own."""
    found = ""
    with contextlib.suppress(OSError):
        found = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with contextlib.suppress(OSError):
        found += " " + str(Path("/proc/self/ns/pid").readlink())
    return found


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; empty where it is gone or dead."""
    with contextlib.suppress(OSError, IndexError):
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _opener(status: os.stat_result) -> int | None:
    """A process that has this file open, as far as this user may see."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for handle in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.path.samestat(handle.stat(), status):
                        return int(process.name)
    return None


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        text = " ".join(word for word in words if word)
        return text if len(text) <= 60 else text[:57] + "..."
    return "another user's"


def _newest(folder: Path) -> float:
    """When something in the folder was last written: compilers write beside the lock."""
    newest = 0.0
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.startswith(_OURS):
                newest = max(newest, entry.stat().st_mtime)
    return newest


@contextlib.contextmanager
def ours(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Be the only exl that builds in a folder; the kernel gives this lock back however its process ends.

    Args:
        folder: the build folder; it is made.
        waiting: called once if another is at work, before waiting for it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / _OURS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def wait(folder: Path) -> None:
    """Wait while some process holds torch's lock."""
    while look(folder).state == "held":
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def torchs(folder: Path) -> Iterator[None]:
    """Hold torch's lock, so that an import of exllamav2 elsewhere waits for this build.

    Raises:
        FileExistsError: it is there already.
    """
    path = folder / "lock"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        me = os.getpid()
        facts = {"pid": me, "started": _started(me), "host": socket.gethostname(), "boot": _boot()}
        os.write(handle, json.dumps(facts).encode())
        yield
    finally:
        os.close(handle)
        path.unlink(missing_ok=True)


def release(folder: Path) -> None:
    """Remove torch's lock if the process that it names is gone: after that one was killed."""
    lock = look(folder)
    if lock.state == "stale":
        lock.path.unlink(missing_ok=True)
