"""The input of a batch job: a prompt a row, with the key that its answer is known by.

JSON lines (https://jsonlines.org) as OpenAI's batch input or as plain objects, or lines of text; plain or gzipped.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from exl_cli.errors import DiskError, ExlError, PromptError, UsageError, brief

# A line that is longer is an error of its own, and is not kept in memory.
_LONGEST = 64 << 20
_BOM = b"\xef\xbb\xbf"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Row:
    """A row of the input.

    Attributes:
        number: its line, from 1.
        custom_id: its own, or "line-12".
        key: what its answer is known by: a hash of `custom_id`, or `line_key` where it has none.
        line_key: a hash of the line's number and text.
        record: its fields.
        error: why it is no prompt; None where it may be one.
    """

    number: int
    custom_id: str
    key: int
    line_key: int
    record: dict[str, Any] = field(default_factory=dict)
    error: ExlError | None = None


def hashed(*parts: str | bytes) -> int:
    """8 bytes that stand for these parts, the same on every machine."""
    data = (part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts)
    return int.from_bytes(hashlib.blake2b(b"\0".join(data), digest_size=8).digest(), "big")


class Source:
    """An input that is read once, from its beginning to its end.

    Args:
        path: the file; "-" is standard input.

    Raises:
        UsageError: it is no file.
        DiskError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.name = "standard input" if str(path) == "-" else str(path)
        self._path = path
        self._rows = 0
        self._stack = contextlib.ExitStack()
        self._size = 0
        name = path.name.lower()
        is_packed = name.endswith(".gz")
        suffix = Path(name.removesuffix(".gz")).suffix
        self._is_json = True if suffix in (".jsonl", ".ndjson", ".json") else False if suffix == ".txt" else None
        if str(path) == "-":
            self._raw: IO[bytes] = sys.stdin.buffer
        else:
            try:
                mode = path.stat().st_mode
                if stat.S_ISDIR(mode):
                    raise UsageError(f"{brief(str(path))} is a folder", "give the files in it")
                self._raw = self._stack.enter_context(path.open("rb"))
                self._size = os.fstat(self._raw.fileno()).st_size if stat.S_ISREG(mode) else 0
            except (OSError, ValueError) as error:
                raise self._unreadable(error) from error
        self._lines: IO[bytes] | gzip.GzipFile = self._raw
        if is_packed:
            self._lines = self._stack.enter_context(gzip.GzipFile(fileobj=self._raw))

    @property
    def expected_rows(self) -> int | None:
        """How many rows there are, as far as can be told: exact at the end, before it by what was read."""
        if self._size == 0:
            return None
        try:
            done = self._raw.tell()
        except ValueError:  # closed: it was read to its end
            done = self._size
        return max(round(self._rows * self._size / done), self._rows) if done else None

    def __iter__(self) -> Iterator[Row]:
        with self._stack:
            try:
                for number, line in enumerate(self._split(), 1):
                    if line is not None and not line.strip():
                        continue
                    self._rows += 1
                    yield self._row(number, line)
            except (OSError, EOFError, gzip.BadGzipFile) as error:
                raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DiskError:
        reason = getattr(error, "strerror", None) or str(error)
        return DiskError(f"cannot read {brief(self.name)}: {reason}", "check the path")

    def _split(self) -> Iterator[bytes | None]:
        """The lines without their ends; None for one that is too long."""
        is_first = True
        while line := self._lines.readline(_LONGEST):
            is_long = len(line) == _LONGEST and not line.endswith(b"\n")
            while is_long and (rest := self._lines.readline(_LONGEST)) and not rest.endswith(b"\n"):
                pass
            if is_first:
                line = line.removeprefix(_BOM)
                is_first = False
            yield None if is_long else line.removesuffix(b"\n").removesuffix(b"\r")

    def _row(self, number: int, line: bytes | None) -> Row:
        key = hashed("line", str(number), line or b"")
        name = f"line-{number}"
        if line is None:
            return Row(number, name, key, key, error=PromptError(f"the line is longer than {_LONGEST >> 20} MiB"))
        if self._is_json is None:
            self._is_json = line.lstrip().startswith(b"{")
        try:
            text = line.decode()
            record = json.loads(text) if self._is_json else {"prompt": text}
        except UnicodeDecodeError as error:
            at = f"byte {error.start} of the line is 0x{line[error.start]:02x}"
            return Row(number, name, key, key, error=PromptError(f"it is not UTF-8 text: {at}"))
        except (ValueError, RecursionError) as error:
            return Row(number, name, key, key, error=PromptError(f"it is not JSON: {error}"))
        if not isinstance(record, dict):
            return Row(number, name, key, key, error=PromptError("it is not a JSON object"))
        own = record.get("custom_id")
        if isinstance(own, int) and not isinstance(own, bool):
            own = str(own)
        if own is None:
            return Row(number, name, key, key, record)
        if not isinstance(own, str):
            return Row(number, name, key, key, record, PromptError("custom_id is not a text"))
        return Row(number, own, hashed("id", own), key, record)


def check_path(path: str) -> Path:
    """A path of a file here.

    Raises:
        UsageError: it is the address of something elsewhere.
    """
    if match := _SCHEME.match(path):
        raise UsageError(f"{brief(path)}: {match[0]} is not supported", "copy it to a file here, or pipe it in as -")
    return Path(path)
