"""The input of a batch job: rows with a prompt, and the key that identifies each row's answer.

Formats: JSON lines (https://jsonlines.org), in OpenAI's batch format or as plain objects; lines of text; CSV; Parquet.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from exl_cli.errors import DiskError, ExlError, PromptError, UsageError, brief, os_errors

# A longer line becomes an error, and is not kept in memory.
_LONGEST = 64 << 20
_BOM = b"\xef\xbb\xbf"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Row:
    """A row of the input.

    Attributes:
        number: line number, from 1; in Parquet the row's number.
        custom_id: the row's, or "line-12" if it has none.
        key: identifies its answer: a hash of `custom_id`, or `line_key` if it has none.
        line_key: a hash of the number and the contents of the line.
        record: its fields.
        is_table: whether the fields are columns of a table, which cannot change settings.
        error: why the row is unusable; None if nothing is known to be wrong.
    """

    number: int
    custom_id: str
    key: int
    line_key: int
    record: dict[str, Any] = field(default_factory=dict)
    is_table: bool = False
    error: ExlError | None = None


def hashed(*parts: str | bytes) -> int:
    """A 64-bit hash of these parts, the same on every machine."""
    data = (part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts)
    return int.from_bytes(hashlib.blake2b(b"\0".join(data), digest_size=8).digest(), "big")


class Source(Protocol):
    """An input that is read once, from its beginning to its end.

    Attributes:
        name: for messages.
        columns: column names of a table; None for lines, each with its own fields.
    """

    name: str
    columns: Sequence[str] | None

    @property
    def expected_rows(self) -> int | None:
        """Estimated number of rows; None if unknown."""
        ...

    def __iter__(self) -> Iterator[Row]: ...

    def close(self) -> None:
        """Close the file; reading to its end does so, too."""
        ...


def open_source(path: Path) -> Source:
    """Open a file as rows; its suffix determines the format.

    Args:
        path: the file; "-" is standard input.

    Raises:
        UsageError: a table has duplicate columns, or needs a library that is not installed.
        DiskError: it cannot be read.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in (".csv", ".tsv"):
        return _TableFile(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _ParquetFile(path)
    return _LineFile(path, {".jsonl": True, ".ndjson": True, ".json": True, ".txt": False}.get(suffix))


class RowReader:
    """Reads rows by number. Reading in ascending order is one pass over the file; going back opens it again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: Iterator[Row] = iter(())
        self._next: int | None = None

    def read(self, index: int) -> Row | None:
        """The row of this number, from 0; None after the last.

        Raises:
            DiskError: the file cannot be read.
        """
        if self._next is None or index < self._next:
            self._rows, self._next = iter(open_source(self._path)), 0
        row = None
        while self._next <= index:
            row = next(self._rows, None)
            self._next += 1
        return row


class _File:
    """A file that is read once, decompressed if its name ends in .gz; see `Source`."""

    columns: Sequence[str] | None = None

    def __init__(self, path: Path) -> None:
        self.name = "standard input" if str(path) == "-" else str(path)
        self._rows = self._size = 0
        self._stack = contextlib.ExitStack()
        if str(path) == "-":
            self._raw: IO[bytes] = sys.stdin.buffer
        else:
            try:
                mode = path.stat().st_mode
                if stat.S_ISDIR(mode):
                    raise DiskError(f"{brief(str(path))} is a folder", "pass the files in it")
                self._raw = self._stack.enter_context(path.open("rb"))
                self._size = path.stat().st_size if stat.S_ISREG(mode) else 0
            except (OSError, ValueError) as error:
                raise self._unreadable(error) from error
        self._bytes: IO[bytes] | gzip.GzipFile = self._raw
        if path.name.lower().endswith(".gz"):
            self._bytes = self._stack.enter_context(gzip.GzipFile(fileobj=self._raw))

    @property
    def expected_rows(self) -> int | None:
        """See `Source.expected_rows`: extrapolated from the bytes read so far; exact at the end."""
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
                for row in self._read():
                    self._rows += 1
                    yield row
            except (OSError, EOFError, gzip.BadGzipFile, csv.Error) as error:
                raise self._unreadable(error) from error

    def close(self) -> None:
        """See `Source.close`."""
        self._stack.close()

    def _read(self) -> Iterator[Row]:
        raise NotImplementedError

    def _unreadable(self, error: Exception) -> DiskError:
        reason = getattr(error, "strerror", None) or str(error)
        return DiskError(f"cannot read {brief(self.name)}: {reason}", "check the path")


class _LineFile(_File):
    """JSON lines or lines of text.

    Args:
        path: the file.
        is_json: whether lines are JSON; None to judge by the first line.
    """

    def __init__(self, path: Path, is_json: bool | None) -> None:
        super().__init__(path)
        self._is_json = is_json

    def _read(self) -> Iterator[Row]:
        for number, line in enumerate(self._split(), 1):
            if line is None or line.strip():
                yield self._row(number, line)

    def _split(self) -> Iterator[bytes | None]:
        """Yield the lines without line breaks; None for one that is too long."""
        is_first = True
        while line := self._bytes.readline(_LONGEST):
            is_long = len(line) == _LONGEST and not line.endswith(b"\n")
            while is_long and (rest := self._bytes.readline(_LONGEST)) and not rest.endswith(b"\n"):
                pass
            if is_first:
                line = line.removeprefix(_BOM)
                is_first = False
            yield None if is_long else line.removesuffix(b"\n").removesuffix(b"\r")

    def _row(self, number: int, line: bytes | None) -> Row:
        key = hashed("line", str(number), line or b"")

        def wrong(message: str) -> Row:
            return Row(number, f"line-{number}", key, key, error=PromptError(message))

        if line is None:
            return wrong(f"the line is longer than {_LONGEST >> 20} MiB")
        if self._is_json is None:
            self._is_json = line.lstrip().startswith(b"{")
        try:
            text = line.decode()
            record = json.loads(text) if self._is_json else {"prompt": text}
        except UnicodeDecodeError as error:
            return wrong(f"it is not UTF-8 text: byte {error.start} of the line is 0x{line[error.start]:02x}")
        except (ValueError, RecursionError) as error:
            return wrong(f"invalid JSON: {error}")
        return _identified(number, key, record) if isinstance(record, dict) else wrong("it must be a JSON object")


class _TableFile(_File):
    """CSV (RFC 4180) or TSV with column names in the first line; fields may contain line breaks.

    Args:
        path: the file.
        delimiter: between fields.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        csv.field_size_limit(_LONGEST)
        # Bytes that are not UTF-8 become lone surrogates, which are an error of their row alone.
        text = io.TextIOWrapper(self._bytes, "utf-8-sig", errors="surrogateescape", newline="")
        self._table = csv.reader(text, delimiter=delimiter)
        try:
            self.columns = names = next(self._table, [])
        except (OSError, EOFError, csv.Error) as error:
            raise self._unreadable(error) from error
        if any("\udc80" <= char <= "\udcff" for char in "".join(names)):
            raise UsageError(
                f"the first line of {brief(self.name)} is not UTF-8 text", "convert it with iconv -t UTF-8"
            )
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"{brief(self.name)} has two columns named {twice!r}", "rename one")

    def _read(self) -> Iterator[Row]:
        names = self.columns or ()
        begin = self._table.line_num + 1
        for values in self._table:
            number, begin = begin, self._table.line_num + 1
            if not values:
                continue
            key = hashed("row", str(number), *values)
            if len(values) != len(names):
                wrong = PromptError(f"it has {len(values)} fields, but the first line names {len(names)}")
                yield Row(number, f"line-{number}", key, key, error=wrong)
            else:
                yield _identified(number, key, dict(zip(names, values, strict=True)), is_table=True)


class _ParquetFile:
    """A Parquet file, read through pyarrow; see `Source`."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        with os_errors(f"cannot read {brief(self.name)}", "check the path"):
            path.open("rb").close()
        try:
            from pyarrow import parquet
        except ImportError:
            raise UsageError(f"{brief(self.name)}: reading Parquet needs pyarrow", "run pip install pyarrow") from None
        try:
            self._file = parquet.ParquetFile(path)
            self.columns: Sequence[str] | None = self._file.schema_arrow.names
        except (OSError, ValueError) as error:  # pyarrow's own errors are among the latter
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise DiskError(f"cannot read {brief(self.name)}: {reason}", "check the path") from error

    @property
    def expected_rows(self) -> int | None:
        """See `Source.expected_rows`."""
        return int(self._file.metadata.num_rows)

    def close(self) -> None:
        """See `Source.close`."""
        self._file.close()

    def __iter__(self) -> Iterator[Row]:
        number = 0
        for batch in self._file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                key = hashed("row", str(number), json.dumps(record, default=str))
                yield _identified(number, key, record, is_table=True)


def _identified(number: int, line_key: int, record: dict[str, Any], *, is_table: bool = False) -> Row:
    """Make a row, with the key of its custom_id if it has one."""
    own = record.get("custom_id")
    if isinstance(own, int) and not isinstance(own, bool):
        own = str(own)
    if own is None or (is_table and own == ""):
        return Row(number, f"line-{number}", line_key, line_key, record, is_table)
    if not isinstance(own, str):
        wrong = PromptError("custom_id must be a string")
        return Row(number, f"line-{number}", line_key, line_key, record, is_table, wrong)
    return Row(number, own, hashed("id", own), line_key, record, is_table)


def check_path(path: str) -> Path:
    """The path of a local file.

    Raises:
        UsageError: it is empty, for example from an unset variable, or a URL.
    """
    if not path:
        raise UsageError("a path is empty", "pass a file, or - for standard input or output")
    if match := _SCHEME.match(path):
        raise UsageError(f"{brief(path)}: {match[0]} is not supported", "copy it to a local file, or pipe it in as -")
    return Path(path)
