"""API keys: a file of them, read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path

from exl_cli.errors import ExlError, UsageError, os_errors, param
from exl_cli.system.files import read_file

_LARGEST = 16 << 20


class Keys:
    """The keys in a file, one a line as `name: key` or the key alone; empty lines and those with a # do not count.

    Args:
        path: the file.
        note: takes a line when a changed file cannot be used, and the keys stay as they were.

    Raises:
        DiskError: the file cannot be read.
        UsageError: it has no key, or is not text.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self._path, self._note = path, note
        self._stamp = self._stamp_now()
        self._keys = _read(path)

    def name_of(self, given: str) -> str | None:
        """The name of a key; None for a wrong one. Takes as long for a wrong key as for any."""
        self._read_again()
        digest = _digest(given)
        name = None
        for known, its_name in self._keys:
            if hmac.compare_digest(known, digest):
                name = its_name
        return name

    def _stamp_now(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read_again(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._path)
            self._note(f"reloaded {self._path}: {len(self._keys)} keys")
        except ExlError as error:
            self._note(f"keeping the old keys: {error.message}")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(path: Path) -> list[tuple[bytes, str]]:
    option = param("api_key_file")
    problem, hint = f"cannot read {option} {path}", "pass a file with one key per line"
    with os_errors(problem, hint):
        data = read_file(path, limit=_LARGEST, pipes=True)
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{problem}: it is not UTF-8 text", hint) from error
    keys = []
    for number, line in enumerate(lines, 1):
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not name or name.startswith("#"):
            continue
        if colon and (not key or " " in key):
            raise UsageError(f"{option} {path}, line {number} has no key", "write name: key, or the key alone")
        keys.append((_digest(key if colon else name), name if colon else f"key {number}"))
    if not keys:
        raise UsageError(f"{option} {path} contains no key", "create one, e.g. with openssl rand -hex 24")
    return keys
