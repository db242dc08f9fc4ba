"""The user's folders for exl's data, and files that are whole at any moment."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import time
from pathlib import Path
from typing import BinaryIO


def user_data() -> Path:
    """The platform's place for a user's data of exl; nothing is made there."""
    import platformdirs

    return Path(platformdirs.user_data_path("exl", appauthor=False))


def user_cache() -> Path:
    """The platform's place for what exl can make again; nothing is made there."""
    import platformdirs

    return Path(platformdirs.user_cache_path("exl", appauthor=False))


def expanded(path: Path) -> Path:
    """The path, `~` at its start replaced by that user's folder; as it is where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def is_folder(path: Path) -> bool:
    """Whether there is a folder, as far as the user can see; False too for a name that no folder can have."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether there is anything, as far as the user can see; False too for a name that nothing can have."""
    try:
        return path.exists()
    except OSError:
        return False


LARGEST_TEXT = 256 << 20
_TEMPORARY = re.compile(r"\..{1,40}\.([0-9]+)\.tmp")
_LEFT_SECONDS = 5


def read_file(path: Path, *, limit: int = LARGEST_TEXT, pipes: bool = False) -> bytes:
    """A file's bytes: a device would be read without end, and a pipe that nobody writes to waited for.

    Args:
        path: the file.
        limit: the most bytes that are read.
        pipes: read a pipe too, as a shell's `<(command)` gives one.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than the limit.
    """
    _refuse_zero_byte(path)
    mode = path.stat().st_mode  # before it is opened: opening a pipe waits for a writer
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
        raise OSError(errno.EINVAL, f"it is a device{'' if pipes else ' or a pipe'}", str(path))
    with path.open("rb") as stream:
        return read_stream(stream, limit)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as \\n; see `read_file`.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is something else.
    """
    return io.StringIO(read_file(path).decode("utf-8"), newline=None).read()


def read_stream(stream: BinaryIO, limit: int = LARGEST_TEXT) -> bytes:
    """All bytes of a stream.

    Raises:
        OSError: there are more than `limit`.
    """
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB")
    return data


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file and its folder; at any moment the old or the new one is there, whole.

    Args:
        path: where to.
        content: all of it; text is written as UTF-8.
        private: nobody but the user may read it, whatever the umask says.

    Raises:
        OSError: it cannot be written; nothing has changed then.
    """
    _refuse_zero_byte(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a device or a pipe", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path.parent)
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


def _refuse_zero_byte(path: Path) -> None:
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no file's name has a zero byte", str(path))


def _remove_left(folder: Path) -> None:
    """Remove what writes that were killed have left in a folder."""
    for file in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(file.name)
        with contextlib.suppress(OSError):
            # A few seconds are for a process of the same id in another container or on another machine.
            if match and not _is_running(int(match[1])) and time.time() - file.stat().st_mtime > _LEFT_SECONDS:
                file.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # somebody else's
    return True
