"""stdin, stdout and stderr as the commands expect them, however the shell left them: closed, full, in any encoding."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

from exl_cli.errors import DiskError
from exl_cli.ui.console import abandon_stdout


def prepare() -> None:
    """Make sure of all three, before anything is written.

    Where stdout cannot be written, writing raises a `DiskError`, or a BrokenPipeError where its reader went away. Where
    stderr cannot be, what would be said there is lost, and the work goes on: the answer is what counts.
    """
    # In this order, each takes the free number that is its own; whatever is opened later would else be written over.
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    if sys.stdout is None:
        # Opened for reading, so that writing fails as it does on what is closed.
        sys.stdout = _text(_Output(os.open(os.devnull, os.O_RDONLY), "wb"), None)
    else:
        sys.stdout = _around(sys.stdout, _Output)
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    else:
        sys.stderr = _around(sys.stderr, _Messages)


def finish() -> None:
    """Write what has not been yet; after that the interpreter has nothing left to complain about."""
    try:
        sys.stdout.flush()
    except (OSError, DiskError):
        abandon_stdout()


class _Output(io.FileIO):
    """stdout's bytes."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            raise
        except OSError as error:
            hint = _NEXT.get(error.errno or 0, "")
            raise DiskError(f"cannot write the output: {error.strerror or error}", hint) from error


_NEXT = {errno.ENOSPC: "make room, or write it elsewhere", errno.EBADF: "stdout is closed: open it, or use >/dev/null"}


class _Messages(io.FileIO):
    """stderr's bytes."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            raise
        except OSError:
            return memoryview(data).nbytes


def _around(stream: TextIO, kind: type[io.FileIO]) -> TextIO:
    """The same stream over bytes of that kind; one that is no file stays as it is."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return stream
    stream.flush()
    return _text(kind(number, "wb", closefd=False), stream)


def _text(raw: io.FileIO, like: TextIO | None) -> TextIO:
    # A terminal or pipe in another encoding than UTF-8 must not end a run.
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding if like else "utf-8",
        errors="replace",
        line_buffering=like is sys.stderr or bool(getattr(like, "line_buffering", False)),
        write_through=bool(getattr(like, "write_through", False)),
    )
