"""User data folders, bounded reads, atomic writes, and locks."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def user_data() -> Path:
    """The platform's data folder for exl; not created."""
    import platformdirs

    return Path(platformdirs.user_data_path("exl", appauthor=False))


def user_cache() -> Path:
    """The platform's cache folder for exl; not created."""
    import platformdirs

    return Path(platformdirs.user_cache_path("exl", appauthor=False))


def expanded(path: Path) -> Path:
    """`Path.expanduser`, but an unknown user's `~name` stays as it is."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def is_folder(path: Path) -> bool:
    """`Path.is_dir`, but False instead of OSError, for example for a name that is too long."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """`Path.exists`, but False instead of OSError, for example for a name that is too long."""
    try:
        return path.exists()
    except OSError:
        return False


LARGEST_TEXT = 256 << 20
_TEMPORARY = re.compile(r"\..{1,40}\.([0-9]+)\.tmp")
_STALE_SECONDS = 5


def read_file(path: Path, *, limit: int = LARGEST_TEXT, pipes: bool = False) -> bytes:
    """Read a file, refusing devices, which never end, and pipes, which may block.

    Args:
        path: the file.
        limit: largest size in bytes.
        pipes: allow a pipe, such as a shell's `<(command)`.

    Raises:
        OSError: unreadable, not a regular file, or larger than `limit`.
    """
    _refuse_null_byte(path)
    status = path.stat()  # before opening: opening a pipe blocks until it has a writer
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
        raise OSError(errno.EINVAL, f"it is a device{'' if pipes else ' or a pipe'}", str(path))
    if status.st_size > limit:
        raise _too_large(limit)
    with path.open("rb") as stream:
        return read_stream(stream, limit)


def read_text(path: Path) -> str:
    """Read a UTF-8 file with universal newlines.

    Raises:
        OSError: see `read_file`.
        UnicodeDecodeError: not UTF-8.
    """
    return io.StringIO(read_file(path).decode("utf-8"), newline=None).read()


def _too_large(limit: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB")


def read_stream(stream: BinaryIO, limit: int = LARGEST_TEXT) -> bytes:
    """Read a stream to its end, or raise OSError after `limit` bytes."""
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise _too_large(limit)
    return data


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write to a temporary file, fsync it, and rename it into place; create the parent folder if needed.

    Args:
        path: the destination.
        content: bytes, or text to encode as UTF-8.
        private: create with mode 0600 instead of the umask's default.

    Raises:
        OSError: the write failed; the old file is unchanged.
    """
    _refuse_null_byte(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a device or a pipe", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent)
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], object]) -> Iterator[bool]:
    """Hold a lock file, in a folder that is created if needed; yields whether another process held it.

    The kernel releases it if this process is killed.

    Args:
        path: the lock file.
        busy: called if another process holds the lock, before waiting for it; may raise instead.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = FileLock(path, mode=0o664), False  # which the members of a group can share
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy()
        waited = True
        lock.acquire()
    try:
        yield waited
    finally:
        lock.release()


def _refuse_null_byte(path: Path) -> None:
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a file name cannot contain a null byte", str(path))


def _remove_stale(folder: Path) -> None:
    """Remove temporary files of writers that were killed."""
    for file in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(file.name)
        with contextlib.suppress(OSError):
            # The writer may run in another container or on another machine, where we cannot see its process id.
            if match and not _is_running(int(match[1])) and time.time() - file.stat().st_mtime > _STALE_SECONDS:
                file.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's process
    return True
