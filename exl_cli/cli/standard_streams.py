"""Make stdin, stdout and stderr safe to use: they may be closed, full or in any encoding."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from typing import Any, TextIO

from exl_cli.errors import DiskError


def prepare() -> None:
    """Replace closed or unsafe streams, before anything is written.

    Writing to a broken stdout then raises a `DiskError`, or a BrokenPipeError if its reader went away. Messages to a
    broken stderr are dropped and the command continues, since its result is what counts.
    """
    # In this order, each gets its own descriptor number back; otherwise a file opened later would get it.
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    if sys.stdout is None:
        # Opened for reading, so writing fails as on a closed stream.
        sys.stdout = _text(_Output(os.open(os.devnull, os.O_RDONLY), "wb"), None)
    else:
        sys.stdout = _around(sys.stdout, _Output)
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    else:
        sys.stderr = _around(sys.stderr, _Messages)


def silence_libraries() -> None:
    """Keep the warnings of other people's code off stderr: of Python, of loggers, of torch's C++.

    Warnings that the user asked Python for (-W, PYTHONWARNINGS) stay.
    """
    if not sys.warnoptions:
        # Not a warnings filter: transformers and torch change those.
        warnings.showwarning = lambda *_, **__: None
    logging.disable(logging.WARNING)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class _Output(io.FileIO):
    """stdout's bytes."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            raise
        except OSError as error:
            return self.failed(error, data)

    def failed(self, error: OSError, data: Any) -> int:
        hint = _NEXT.get(error.errno or 0, "")
        raise DiskError(f"cannot write to stdout: {error.strerror or error}", hint) from error


_NEXT = {
    errno.ENOSPC: "free some space, or write it elsewhere",
    errno.EBADF: "stdout is closed; open it, or add >/dev/null",
}


class _Messages(_Output):
    """stderr's bytes, dropped if they cannot be written."""

    def failed(self, error: OSError, data: Any) -> int:
        return memoryview(data).nbytes


def _around(stream: TextIO, kind: type[_Output]) -> TextIO:
    """The same text stream over a raw stream of `kind`; streams without a file descriptor stay as they are."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return stream
    stream.flush()
    return _text(kind(number, "wb", closefd=False), stream)


def _text(raw: io.FileIO, like: TextIO | None) -> TextIO:
    # A terminal or pipe with another encoding than UTF-8 must not end a run.
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding if like else "utf-8",
        errors="replace",
        line_buffering=like is sys.stderr or bool(getattr(like, "line_buffering", False)),
        write_through=bool(getattr(like, "write_through", False)),
    )
