"""The user's folders for exl's data, and files that are whole at any moment."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def user_data() -> Path:
    """The platform's place for a user's data of exl; nothing is made there."""
    import platformdirs

    return Path(platformdirs.user_data_path("exl", appauthor=False))


def user_cache() -> Path:
    """The platform's place for what exl can make again; nothing is made there."""
    import platformdirs

    return Path(platformdirs.user_cache_path("exl", appauthor=False))


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file and its folder; at any moment the old or the new one is there, whole.

    Args:
        path: where to.
        content: all of it; text is written as UTF-8.
        private: nobody but the user may read it, whatever the umask says.

    Raises:
        OSError: it cannot be written; nothing has changed then.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a device or a pipe", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
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
