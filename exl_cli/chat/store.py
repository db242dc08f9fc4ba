"""The folder of saved sessions: one JSON file each, written whole or not at all."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from exl_cli.chat import session as sessions
from exl_cli.chat.session import Session
from exl_cli.chat.settings import from_dict
from exl_cli.errors import DiskError, UsageError
from exl_cli.system.files import user_data, write_atomically

_NAME = re.compile(r"\w[\w.-]{0,79}")
_ADVICE = "free some space or check the permissions; /export PATH writes it elsewhere"

# What is compared to tell whether a file is still the one that was read or written: inode, time and size.
_Signature = tuple[int, int, int]


def data_dir() -> Path:
    """The folder of what exl keeps for the user: `EXL_DATA_DIR`, else the platform's place for such things."""
    if env := os.environ.get("EXL_DATA_DIR"):
        return Path(env)
    return user_data()


@dataclass(frozen=True)
class Overview:
    """A saved session in a list.

    Attributes:
        name: its name.
        updated: when it was last written.
        session: what it holds; None where it cannot be read, and then `problem` says why.
        problem: the error.
    """

    name: str
    updated: datetime
    session: Session | None
    problem: str = ""


class SessionStore:
    """Reads and writes sessions.

    Args:
        folder: where they are; made at the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, _Signature | None] = {}

    def path(self, name: str) -> Path:
        """The file of a name.

        Raises:
            UsageError: it cannot be a session's name.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot be a session's name", "use up to 80 letters, digits, '-', '_' and '.', a letter first"
            )
        return self.folder / f"{name}.json"

    def exists(self, name: str) -> bool:
        """Whether there is a session of that name."""
        return self.path(name).exists()

    def names(self) -> list[str]:
        """The names of all sessions, the latest first."""
        try:
            files = [file for file in self.folder.glob("*.json") if _NAME.fullmatch(file.stem)]
            return [file.stem for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)]
        except OSError:  # no such folder, not ours to read, or a file that has just gone
            return []

    def load(self, name: str) -> Session:
        """Read a session.

        Raises:
            UsageError: there is none of that name.
            DiskError: its file cannot be read, is damaged, or is of a newer format; it is left as it is.
        """
        path = self.path(name)
        try:
            session = _read(path, name, str(path))
        except FileNotFoundError:
            near = difflib.get_close_matches(name, self.names(), 1)
            hint = f"did you mean {near[0]}?" if near else f"the sessions are in {self.folder}"
            raise UsageError(f"there is no session named {name!r}", hint) from None
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise DiskError(f"cannot read the session file {path}: {why}", "it is left as it is") from error
        self._seen[name] = _signature(path)
        return session

    def overviews(self) -> Iterator[Overview]:
        """All sessions, the latest first."""
        for name in self.names():
            with contextlib.suppress(FileNotFoundError):
                updated = datetime.fromtimestamp(self.path(name).stat().st_mtime).astimezone()
                try:
                    yield Overview(name, updated, _read(self.path(name), name, name))
                except (DiskError, OSError, UnicodeDecodeError) as error:
                    yield Overview(name, updated, None, str(error))

    def save(self, session: Session) -> str:
        """Write a session, naming it first where it has no name.

        Returns:
            The name it had before, if that had to change: another exl has written a file of that name meanwhile, and it
            is not overwritten. Empty otherwise.

        Raises:
            DiskError: it cannot be written; the file is as it was.
        """
        before = session.name
        if not before:
            session.name = self._new_name(session)
        elif _signature(self.path(before)) not in (None, self._seen.get(before)):
            session.name = self._free(f"{before}-{datetime.now():%H%M%S}")
        session.updated = sessions.now()
        path = self.path(session.name)
        try:
            write_atomically(path, sessions.dumps(session), private=True)
        except OSError as error:
            session.name = before
            raise DiskError(
                f"the session cannot be saved in {self.folder}: {error.strerror or error}", _ADVICE
            ) from error
        self._seen[session.name] = _signature(path)
        return before if before != session.name else ""

    def remove(self, name: str) -> None:
        """Remove the file of a session that now has another name, or nothing in it; none is no error, and one that
        another exl has written meanwhile stays."""
        if _signature(self.path(name)) == self._seen.get(name):
            with contextlib.suppress(OSError):
                self.path(name).unlink()

    def _new_name(self, session: Session) -> str:
        """The day and the first words: something to recognise it by in a list."""
        words = re.findall(r"[^\W_]+", session.title.lower())[:5]
        return self._free("-".join([f"{datetime.now():%Y-%m-%d}", *words])[:60].rstrip("-"))

    def _free(self, name: str) -> str:
        count = 1
        candidate = name
        while self.exists(candidate):
            count += 1
            candidate = f"{name}-{count}"
        return candidate


def _read(path: Path, name: str, source: str) -> Session:
    session = sessions.loads(path.read_text(encoding="utf-8-sig"), name, source)
    try:
        from_dict(session.settings)
    except TypeError as error:
        raise sessions.damaged(source, str(error)) from error
    return session


def _signature(path: Path) -> _Signature | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
