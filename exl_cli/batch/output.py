"""The output of a batch job: a file of answers, a whole line each, that a killed job leaves whole.

State on disk: `answers.jsonl` only grows by whole lines; the job that writes it holds a lock on
`answers.jsonl.exl.lock`; `answers.jsonl.exl.json` says how its answers were made, and is there before the first of
them. A job that goes on reads the keys of the answers that are there; a torn last line is cut.

Where several engines share the work, each writes a part, an output in the folder `answers.jsonl.exl.parts`. Parts are
taken into the output at the end, or by the next job that opens it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from exl_cli.errors import DiskError, UsageError, brief, param
from exl_cli.system.files import read_text, write_atomically

_SYNC_SECONDS = 1.0
# For a worker that was lost to let go of its part.
_PART_SECONDS = 30.0
_LINES_AT_ONCE = 256
# How each line begins, so that reading them again takes no JSON parser.
_HEAD = re.compile(rb'\{"id": "batch_req_([0-9a-f]{16})", "error": (null|\{)')
# In a manifest: the hashes of further models, by their names.
_OTHERS = "other_models"
_GO_ON = "the same command goes on from there"


class KeySet:
    """A set of 8-byte keys in little more than 8 bytes each."""

    _RECENT = 1 << 20

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    def add(self, key: int) -> None:
        """Put a key in."""
        if key in self:
            return
        self._recent.add(key)
        if len(self._recent) >= self._RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            recent.sort()
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort(kind="stable")  # Timsort merges the two in one pass
            self._recent.clear()

    def __contains__(self, key: int) -> bool:
        if key in self._recent:
            return True
        at = int(np.searchsorted(self._sorted, np.uint64(key)))
        return at < len(self._sorted) and int(self._sorted[at]) == key

    def __len__(self) -> int:
        return len(self._recent) + len(self._sorted)


def line_of(key: int, custom_id: str, *, error: Mapping[str, Any] | None, **fields: Any) -> bytes:
    """An answer, or an error, as a line."""
    value = {"id": f"batch_req_{key:016x}", "error": error, "custom_id": custom_id, **fields}
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a character
        return json.dumps(value).encode() + b"\n"


def key_of(line: bytes) -> int:
    """The key of an answer's line; 0 for a line that is none."""
    match = _HEAD.match(line)
    return int(match[1], 16) if match else 0


class Sink(Protocol):
    """Where answers go.

    Attributes:
        answered: the keys of those that are there.
        failed: how many of them are errors.
    """

    answered: KeySet
    failed: int

    def append(self, line: bytes) -> None:
        """Write a whole line."""
        ...

    def tick(self) -> None:
        """Called every second at least."""
        ...

    def add_model(self, name: str, model_hash: str) -> None:
        """Another model than the job's answers lines, too."""
        ...

    def close(self) -> None:
        """Have all of it on the disk."""
        ...


class StreamSink:
    """Answers on standard output; see `Sink`."""

    def __init__(self) -> None:
        self.answered = KeySet()
        self.failed = 0

    def append(self, line: bytes) -> None:
        """See `Sink.append`."""
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    def tick(self) -> None:
        """See `Sink.tick`."""

    def add_model(self, name: str, model_hash: str) -> None:
        """See `Sink.add_model`."""

    def close(self) -> None:
        """See `Sink.close`."""


class AnswerFile:
    """Answers in a file; see `Sink`.

    Args:
        path: the file, which may have answers.
        manifest: what decides how answers are made, JSON-ready; the answers that are there have to be made alike.
        mix: let them be made otherwise.
        retry_errors: take the errors out, for their prompts to be tried again.

    Attributes:
        damaged: lines that were no answers and were taken out.

    Raises:
        UsageError: another job writes the file, it is none of a batch job, or its answers were made otherwise.
        DiskError: it cannot be read or written.
    """

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], *, mix: bool = False, retry_errors: bool = False
    ) -> None:
        self._path, self._mix = path, mix
        self._manifest = dict(manifest)
        self.answered, self.failed, self.damaged = KeySet(), 0, 0
        self._synced, self._is_dirty = time.monotonic(), False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{path}.exl.lock", timeout=0, thread_local=False)
            self._lock.acquire()
        except Timeout:
            raise UsageError(f"another job writes {brief(str(path))}", "wait for it, or give another output") from None
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._check()
            if parts := self.parts():
                self._read(retry_errors=False)
                self._open()
                for part in parts:
                    self.take_in(part)
                self._sync()
                os.close(self._file)
                self.answered, self.failed = KeySet(), 0
            self._read(retry_errors)
            self._open()
        except OSError as error:
            self._lock.release()
            raise self._unwritable(error) from error
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._file).st_size

    def part(self, name: str) -> Path:
        """Where a part of this name is written."""
        return self._path.absolute().with_name(f"{self._path.name}.exl.parts") / f"{name}.jsonl"

    def parts(self) -> list[Path]:
        """The parts that are there."""
        return sorted(self.part("").parent.glob("*.jsonl"))

    def take_in(self, part: Path) -> tuple[int, int]:
        """Append the answers of a part that are not here yet, and remove it. Cut off, it can be done again.

        Returns:
            how many were answers, and how many errors.

        Raises:
            UsageError: somebody writes the part.
            DiskError: it cannot be read, or these not be written.
        """
        counts = [0, 0]
        try:
            with FileLock(f"{part}.exl.lock", timeout=_PART_SECONDS):
                with part.open("rb") as file:
                    lines: list[bytes] = []
                    for line in file:
                        match = _HEAD.match(line)
                        if match is None or not line.endswith(b"}\n") or (key := int(match[1], 16)) in self.answered:
                            continue
                        self.answered.add(key)
                        counts[match[2] != b"null"] += 1
                        lines.append(line)
                        if len(lines) >= _LINES_AT_ONCE:
                            self.append(b"".join(lines))
                            lines.clear()
                    self.append(b"".join(lines))
                self._sync()
                for name in ("", ".exl.json", ".exl.lock"):
                    Path(f"{part}{name}").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another part is there
                part.parent.rmdir()
        except Timeout:
            raise UsageError(f"another job writes {brief(str(part))}", "wait for it; then go on") from None
        except OSError as error:
            raise DiskError(f"cannot read {brief(str(part))}: {error.strerror or error}", _GO_ON) from error
        return counts[0], counts[1]

    def append(self, line: bytes) -> None:
        """See `Sink.append`. What cannot be written whole is taken back.

        Raises:
            DiskError: the disk is full, say.
        """
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise self._unwritable(error) from error
        self._end += len(line)
        self._is_dirty = True
        self.tick()

    def tick(self) -> None:
        """See `Sink.tick`."""
        if self._is_dirty and time.monotonic() - self._synced >= _SYNC_SECONDS:
            self._sync()

    def add_model(self, name: str, model_hash: str) -> None:
        """See `Sink.add_model`.

        Raises:
            UsageError: there are answers of another model of this name.
        """
        others = self._manifest.setdefault(_OTHERS, {})
        if others.get(name, model_hash) != model_hash and not self._mix:
            raise UsageError(
                f"answers in {brief(str(self._path))} were made with another model called {name}",
                f"give another output, or {param('mix')} to add to them all the same",
            )
        if others.get(name) != model_hash:
            others[name] = model_hash
            self._write_manifest()

    def close(self) -> None:
        """See `Sink.close`."""
        try:
            if self._is_dirty:
                self._sync()
        finally:
            os.close(self._file)
            self._lock.release()

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise self._unwritable(error) from error
        self._synced, self._is_dirty = time.monotonic(), False

    def _unwritable(self, error: OSError) -> DiskError:
        reason = error.strerror or str(error)
        return DiskError(f"cannot write {brief(str(self._path))}: {reason}", f"answers so far are kept: {_GO_ON}")

    @property
    def manifest(self) -> Mapping[str, Any]:
        """How its answers are made, JSON-ready."""
        return self._manifest

    @property
    def _manifest_file(self) -> Path:
        return self._path.with_name(f"{self._path.name}.exl.json")

    def _write_manifest(self) -> None:
        write_atomically(self._manifest_file, json.dumps(self._manifest, ensure_ascii=False, indent=1) + "\n")

    def _check(self) -> None:
        """Compare with how the answers in the file were made, and write that down."""
        is_begun = self._path.exists() and self._path.stat().st_size > 0
        if is_begun:
            try:
                before = json.loads(read_text(self._manifest_file))
            except (OSError, ValueError):
                before = None
            if not isinstance(before, dict):
                raise UsageError(
                    f"{brief(str(self._path))} has something in it that no batch job wrote", "give another output"
                )
            if _OTHERS in before:
                self._manifest[_OTHERS] = before[_OTHERS]
            now = self._manifest
            names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if names in ([], ["model"]):  # one model under two names
                return
            if not self._mix:
                name = names[0]
                were, are = (json.dumps(side.get(name), ensure_ascii=False) for side in (before, now))
                raise UsageError(
                    f"the answers in {brief(str(self._path))} were made with {name} {brief(were)}, not {brief(are)}",
                    f"give another output, or {param('mix')} to add to them all the same",
                )
        self._write_manifest()

    def _read(self, retry_errors: bool) -> None:
        """Take in what is answered, and take out what is no answer."""
        if not self._path.exists():
            return
        end = drop = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                match = _HEAD.match(line)
                if match is None or not line.endswith(b"}\n"):
                    self.damaged += 1
                elif match[2] == b"null":
                    self.answered.add(int(match[1], 16))
                elif retry_errors:
                    drop += 1
                else:
                    self.answered.add(int(match[1], 16))
                    self.failed += 1
        if end < self._path.stat().st_size:
            os.truncate(self._path, end)
        if self.damaged or drop:
            self._rewrite(retry_errors)

    def _rewrite(self, retry_errors: bool) -> None:
        """Replace the file by one without errors and damaged lines; at any moment the old or the new one is there."""
        temporary = self._path.with_name(f"{self._path.name}.exl.new")
        with self._path.open("rb") as file, temporary.open("wb") as new:
            for line in file:
                match = _HEAD.match(line)
                if match and line.endswith(b"}\n") and not (retry_errors and match[2] != b"null"):
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(self._path)
