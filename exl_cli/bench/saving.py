"""Results in files: whether a place will take one is found out before anything is measured for it."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exl_cli.bench import outputs
from exl_cli.bench.files import expanded
from exl_cli.bench.result import Result
from exl_cli.errors import DiskError, ExlError, UsageError
from exl_cli.system.files import write_atomically


def require_writable(path: Path, flag: str) -> None:
    """Refuse a place where no file can be written. Nothing is left behind there, no folder either.

    Args:
        path: where a file is to be.
        flag: which names it.

    Raises:
        UsageError: it is a folder or a device.
        DiskError: no file can be made there.
    """
    path = expanded(path)
    with _explained(path):
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            kind = stat.S_IFREG
        if stat.S_ISDIR(kind):
            raise UsageError(f"{flag} needs the name of a file, and {path} is a folder", "name a file in it")
        if not stat.S_ISREG(kind):
            raise UsageError(f"{flag} needs the name of a file, and {path} is none", "name another")
        # Permissions do not say whether a file can be made, least of all to root: only making one does.
        nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=nearest):
            pass


def keep(result: Result, save: Path | None, report: Path | None) -> list[ExlError]:
    """Write a result wherever it is wanted; a file that cannot be written does not keep the other from it.

    Args:
        result: the result.
        save: where its JSON is to be.
        report: where its report is to be.

    Returns:
        What went wrong; what was there before stays then.
    """
    failures: list[ExlError] = []
    if save is not None:
        failures += _write(save, outputs.render(result, "json"))
    if report is not None:
        from exl_cli.bench import html

        failures += _write(report, html.page(result))
    return failures


def _write(path: Path, text: str) -> list[ExlError]:
    path = expanded(path)
    try:
        with _explained(path):
            write_atomically(path, text)
            # A report is for others as well: the permissions that any new file would have.
            mask = os.umask(0)
            os.umask(mask)
            path.chmod(0o666 & ~mask)
    except DiskError as error:
        return [error]
    return []


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}", "check folder and disk space") from error
