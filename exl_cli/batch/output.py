"""The output of a batch job: a file of answers, one per line, that survives a killed job.

On disk: `answers.jsonl` only grows, by whole lines; the job writing it holds a lock on `answers.jsonl.exl.lock`; the
manifest `answers.jsonl.exl.json` says how the answers were made, and is written before the first of them. A job that
resumes reads the keys of the answers and cuts off a torn last line.

If several engines share the work, each writes a part, an output of the same form in the folder
`answers.jsonl.exl.parts`. Parts are merged into the output at the end, or by the next job that opens it.
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
# How long to wait for a lost worker to release its part.
_PART_SECONDS = 30.0
_LINES_AT_ONCE = 256
# The beginning of each line, which holds all that a resumed job needs, without parsing JSON.
_HEAD = re.compile(rb'\{"id": "batch_req_([0-9a-f]{16})", "error": (null|\{)')
# Field of a manifest: the hashes of further models, by name.
_OTHERS = "other_models"
_GO_ON = "run the same command to resume"


class KeySet:
    """A set of 64-bit keys, at little more than 8 bytes each.

    Recent keys are in a Python set, which is merged into a sorted array whenever it is full.
    """

    _RECENT = 1 << 20

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    def add(self, key: int) -> None:
        """Add a key."""
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
    """Encode an answer or an error as a line of the output."""
    value = {"id": f"batch_req_{key:016x}", "error": error, "custom_id": custom_id, **fields}
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(value).encode() + b"\n"


def key_of(line: bytes) -> int:
    """The key in a line of the output; 0 if it has none."""
    match = _HEAD.match(line)
    return int(match[1], 16) if match else 0


class Sink(Protocol):
    """Where answers go.

    Attributes:
        answered: keys of the lines it holds.
        failed: how many of these are errors.
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
        """Record that another model than the job's answers rows, too."""
        ...

    def close(self) -> None:
        """Flush everything to disk and close."""
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
        path: the file; may hold answers already.
        manifest: what determines the answers, JSON-ready; must match the file's unless `mix`.
        mix: accept answers made under another manifest.
        retry_errors: remove errors, so that their rows are tried again.

    Attributes:
        damaged: number of malformed lines that were removed.

    Raises:
        UsageError: another job is writing the file, it is not a batch job's, or its manifest differs.
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
            if not Path(self._lock.lock_file).exists():  # filelock waits, too, where it cannot make its file
                raise self._uncreatable("its lock file cannot be created") from None
            raise UsageError(
                f"another job is writing {brief(str(path))}", "wait for it to finish, or choose another output"
            ) from None
        except OSError as error:
            raise self._uncreatable(error.strerror or str(error)) from error
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
        """The path of a part."""
        return self._path.absolute().with_name(f"{self._path.name}.exl.parts") / f"{name}.jsonl"

    def parts(self) -> list[Path]:
        """The parts that exist."""
        return sorted(self.part("").parent.glob("*.jsonl"))

    def take_in(self, part: Path) -> tuple[int, int]:
        """Append the lines of a part that are not here yet, and delete the part. Safe to repeat if interrupted.

        Returns:
            The number of answers and the number of errors appended.

        Raises:
            UsageError: another process is writing the part.
            DiskError: the part cannot be read, or the output cannot be written.
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
            raise UsageError(
                f"another job is writing {brief(str(part))}", "wait for it to finish, then resume"
            ) from None
        except OSError as error:
            raise DiskError(f"cannot read {brief(str(part))}: {error.strerror or error}", _GO_ON) from error
        return counts[0], counts[1]

    def append(self, line: bytes) -> None:
        """See `Sink.append`. A partly written line is removed.

        Raises:
            DiskError: it cannot be written, as on a full disk.
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
            UsageError: the file has answers of a different model with this name.
        """
        others = self._manifest.setdefault(_OTHERS, {})
        if others.get(name, model_hash) != model_hash and not self._mix:
            raise UsageError(
                f"{brief(str(self._path))} has responses from a different model named {name}",
                f"choose another output, or add {param('mix')} to append anyway",
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

    def _uncreatable(self, reason: str) -> DiskError:
        return DiskError(f"cannot write {brief(str(self._path))}: {reason}", f"choose another {param('output')}")

    def _unwritable(self, error: OSError) -> DiskError:
        reason = error.strerror or str(error)
        return DiskError(f"cannot write {brief(str(self._path))}: {reason}", f"responses so far are kept; {_GO_ON}")

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest, JSON-ready."""
        return self._manifest

    @property
    def _manifest_file(self) -> Path:
        return self._path.with_name(f"{self._path.name}.exl.json")

    def _write_manifest(self) -> None:
        write_atomically(self._manifest_file, json.dumps(self._manifest, ensure_ascii=False, indent=1) + "\n")

    def _check(self) -> None:
        """Compare the manifest with that of the answers in the file, and write it."""
        is_begun = self._path.exists() and self._path.stat().st_size > 0
        if is_begun:
            try:
                before = json.loads(read_text(self._manifest_file))
            except (OSError, ValueError):
                before = None
            if not isinstance(before, dict):
                raise UsageError(
                    f"{brief(str(self._path))} has content that exl batch did not write", "choose another output"
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
                    f"the responses in {brief(str(self._path))} were generated with {name} {brief(were)}, "
                    f"not {brief(are)}",
                    f"choose another output, or add {param('mix')} to append anyway",
                )
        self._write_manifest()

    def _read(self, retry_errors: bool) -> None:
        """Read the keys of the answers, and remove malformed lines and, on request, errors."""
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
        """Atomically replace the file by one without malformed lines and, on request, errors."""
        temporary = self._path.with_name(f"{self._path.name}.exl.new")
        with self._path.open("rb") as file, temporary.open("wb") as new:
            for line in file:
                match = _HEAD.match(line)
                if match and line.endswith(b"}\n") and not (retry_errors and match[2] != b"null"):
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(self._path)
