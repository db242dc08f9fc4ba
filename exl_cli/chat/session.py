"""Sessions: the turns of a conversation, their file format, and the folder they are saved in.

All turns are kept. When the context fills up, the oldest are no longer sent to the model (`Session.trim`), but they
stay in the session, its file and exports.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_type_hints

from exl_cli.chat.settings import from_dict, is_kind
from exl_cli.engines.base import FinishReason, Summary
from exl_cli.errors import DiskError, UsageError, did_you_mean, os_errors, param
from exl_cli.models.prompt import half_character
from exl_cli.system.files import expanded, is_there, read_file, user_data, write_atomically

FORMAT = "exl-session"
VERSION = 1

Role = Literal["user", "assistant"]
Ending = FinishReason | Literal[""]

# Largest session file to read, in bytes: far more than a conversation with many attachments has, as what was saved must
# load. It is read into memory at once.
_MOST_BYTES = 1 << 30
_NAME = re.compile(r"\w[\w.-]{0,79}")
# In bytes. File systems allow 255; this leaves room for ".json" and a number that makes the name unique.
_LONGEST_NAME = 240
# Inode, modification time and size, to detect that another program has changed a file.
_Signature = tuple[int, int, int]


def now() -> str:
    """The local time with its offset, to the second, as ISO 8601 writes it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


@dataclass
class Turn:
    """One message.

    Attributes:
        content: the text exactly as typed or generated, without reasoning.
        reasoning: an answer's reasoning, without tags.
        raw: the answer as generated, with tags; empty if `content` is the whole answer.
        finish_reason: for answers: "stop", "length" or "cancelled"; see `engines.base.Summary`.
        timings: for answers: the numbers in the `engines.base.Summary` of the last generation that contributed.
    """

    role: Role
    content: str
    reasoning: str = ""
    raw: str = ""
    finish_reason: Ending = ""
    model: str = ""
    time: str = field(default_factory=now)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def generated(self) -> str:
        """An answer's text as the model wrote it."""
        return self.raw or self.content

    def message(self) -> dict[str, str]:
        """The turn as chat templates take it. Templates that support reasoning decide which of it the model sees."""
        message = {"role": self.role, "content": self.content}
        return {**message, "reasoning_content": self.reasoning} if self.reasoning else message


@dataclass
class Totals:
    """Sums of `engines.base.Summary` over a conversation, answers included that were later retried or undone."""

    answers: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, summary: Summary) -> None:
        self.answers += 1
        for entry in fields(self):
            if entry.name != "answers":
                setattr(self, entry.name, getattr(self, entry.name) + getattr(summary, entry.name))


@dataclass
class Session:
    """A conversation.

    Attributes:
        name: the name it is saved under; empty before the first save.
        turns: alternately the user's and the model's.
        dropped: number of turns at the beginning that the model no longer sees; even.
        settings: JSON-ready; see `Settings.to_dict`.
        created, updated: times; see `now`.
    """

    name: str = ""
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    dropped: int = 0
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    created: str = field(default_factory=now)
    updated: str = field(default_factory=now)

    @property
    def last(self) -> Turn | None:
        return self.turns[-1] if self.turns else None

    @property
    def title(self) -> str:
        """The first words of the first message, on one line."""
        return excerpt(self.turns[0].content) if self.turns else ""

    def last_user(self) -> int:
        """The index of the user's last turn; UsageError if there is none yet."""
        if not self.turns:
            raise UsageError("no message yet", "send a message first")
        return (len(self.turns) - 1) // 2 * 2

    def messages(self, start: int | None = None, stop: int | None = None) -> list[dict[str, str]]:
        """The messages for the model: the system message, then turns `start` (default: the first not dropped) to
        `stop`, exclusive."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *(turn.message() for turn in self.turns[self.dropped if start is None else start : stop])]

    def cut(self, count: int) -> list[Turn]:
        """Remove and return the turns after the first `count`. If that leaves only dropped turns, the model sees the
        last exchange of them again."""
        removed = self.turns[count:]
        del self.turns[count:]
        self.dropped = min(self.dropped, max(len(self.turns) - 1, 0)) // 2 * 2
        return removed

    def trim(self, size: Callable[[int], int], limit: int, goal: int) -> list[Turn]:
        """If the prompt has more than `limit` tokens, drop exchanges, oldest first, down to `goal` tokens.

        The user's last turn always stays, even if it alone exceeds the goal. The goal is lower than the limit because
        after each drop the prompt is computed from its first token again: dropping rarely is cheaper. `size(start)` are
        the prompt's tokens if it begins with that turn. Returns the turns that were dropped.
        """
        before = self.dropped
        starts = range(before + 2, self.last_user() + 1, 2)
        if starts and size(before) > limit:
            # The earliest start that meets the goal, by bisection, as each `size` tokenizes a prompt. Negated, since
            # sizes fall.
            first = bisect.bisect_left(starts, -goal, hi=len(starts) - 1, key=lambda start: -size(start))
            self.dropped = starts[first]
        return self.turns[before : self.dropped]


def dumps(session: Session) -> str:
    """A session as readable JSON, one turn per line."""
    kept = {k: v for k, v in vars(session).items() if k not in ("name", "turns")}
    value = {"format": FORMAT, "version": VERSION, **kept, "totals": vars(session.totals)}
    turns = [{k: v for k, v in vars(turn).items() if v or k == "content"} for turn in session.turns]
    lines = ",\n".join(f"    {json.dumps(turn, ensure_ascii=False)}" for turn in turns)
    head = json.dumps(value, ensure_ascii=False, indent=2).removesuffix("\n}")
    return f'{head},\n  "turns": [\n{lines}\n  ]\n}}\n'


def loads(text: str, name: str, source: str) -> Session:
    """Parse a session. DiskError, with `source` for the file's name, if it is none, is damaged, or is too new."""
    try:
        value = json.loads(text)
        half = half_character(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"invalid JSON: {error}") from error
    if half:
        raise _damaged(source, f"it contains a lone surrogate, {half}")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DiskError(f"{source} is not an exl session", "choose another one; /sessions lists them")
    version = value.get("version")
    if isinstance(version, int) and version > VERSION:
        raise DiskError(
            f"{source} was written by a newer exl: its format is {version}, but this version reads up to {VERSION}",
            "update exl",
        )
    try:
        return _session(value, name)
    except TypeError as error:
        raise _damaged(source, str(error)) from error


def _session(value: dict[str, Any], name: str) -> Session:
    """Build a session from the parsed file. TypeError names the first fault."""
    if value.get("version") != VERSION:
        raise TypeError(f"its version is {value.get('version')!r}")
    turns = value.pop("turns", None)
    if not isinstance(turns, list):
        raise TypeError("it has no list of turns")
    turns = [_read(Turn, turn, f"turn {index}") for index, turn in enumerate(turns, 1)]
    totals = _read(Totals, value.pop("totals", {}), "totals")
    for entry, number in vars(totals).items():
        if not 0 <= number < 1 << 63:
            raise TypeError(f"{entry} of totals is {number}"[:200])
    session: Session = _read(Session, {**value, "name": name}, "the session")
    session.turns, session.totals = turns, totals
    for index, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[index % 2]:
            raise TypeError(f"turn {index + 1} has the role {turn.role!r}")
    if not 0 <= session.dropped <= len(turns) or session.dropped % 2:
        raise TypeError(f"dropped is {session.dropped}")
    from_dict(session.settings)
    return session


_HINTS = {kind: get_type_hints(kind) for kind in (Turn, Totals, Session)}


def _read(kind: type[Any], value: Any, where: str) -> Any:
    """Build a dataclass from a JSON object, ignoring unknown fields. TypeError names the first fault; `where` is its
    place."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} is not an object")
    hints = _HINTS[kind]
    known = {name: value[name] for name in hints if name in value}
    for name, item in known.items():
        if not is_kind(item, hints[name]):
            raise TypeError(f"{name} of {where} is {item!r}"[:200])
    if kind is Turn and not {"role", "content"} <= known.keys():
        raise TypeError(f"{where} has no role or no content")
    return kind(**known)


def _damaged(source: str, why: str) -> DiskError:
    return DiskError(f"the session file {source} is damaged: {why}", "it was left unchanged; repair or remove it")


def excerpt(text: str, length: int = 48) -> str:
    """The beginning of a text on one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


# --- the folder of saved sessions -------------------------------------------------------------------------------------


def data_dir() -> Path:
    """The user's data folder for exl: `EXL_DATA_DIR`, else the platform's default."""
    env = os.environ.get("EXL_DATA_DIR")
    return Path(env) if env else user_data()


class SessionStore:
    """A folder of sessions, one JSON file each, written atomically; the first save creates it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, _Signature | None] = {}

    def path(self, name: str) -> Path:
        """The file for a session name. UsageError if the name is not valid."""
        if not _NAME.fullmatch(name) or len(name.encode()) > _LONGEST_NAME:
            raise UsageError(
                f"invalid session name {name!r}", "use up to 80 letters, digits, '-', '_' and '.', a letter first"
            )
        return self.folder / f"{name}.json"

    def exists(self, name: str) -> bool:
        return is_there(self.path(name))

    def names(self) -> list[str]:
        """The names of all sessions, most recently changed first."""
        try:
            files = [file for file in self.folder.glob("*.json") if _NAME.fullmatch(file.stem)]
        except OSError:  # the folder does not exist or is not readable
            return []
        # Skip files removed just now, and dangling links.
        changed = {file.stem: seen[1] for file in files if (seen := _signature(file))}
        return sorted(changed, key=lambda name: changed[name], reverse=True)

    def load(self, name: str) -> Session:
        """Read a session.

        Raises:
            UsageError: there is no session of that name.
            DiskError: its file cannot be read, is damaged, or has a newer format; the file is not touched.
        """
        path = self.path(name)
        try:
            session = loads(_text(path), name, str(path))
        except FileNotFoundError:
            hint = did_you_mean(name, self.names()) or f"sessions are stored in {self.folder}"
            raise UsageError(f"no session named {name!r}", hint) from None
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise DiskError(f"cannot read the session file {path}: {why}", "it was left unchanged") from error
        self._seen[name] = _signature(path)
        return session

    def overviews(self) -> Iterator[tuple[str, datetime, Session | str]]:
        """Yield (name, last change, session) for each, most recent first; an unreadable one yields its error's text."""
        for name in self.names():
            path = self.path(name)
            with contextlib.suppress(FileNotFoundError):
                updated = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
                try:
                    yield name, updated, loads(_text(path), name, name)
                except (DiskError, OSError, UnicodeDecodeError) as error:
                    yield name, updated, str(error)

    def save(self, session: Session) -> str:
        """Write a session, naming it first if it has no name.

        Returns:
            The old name if it had to change, because another process has written that file since and it must not be
            overwritten. Empty otherwise.

        Raises:
            DiskError: it cannot be written; the file is unchanged.
        """
        before = session.name
        if not before:
            session.name = self._new_name(session)
        elif _signature(self.path(before)) not in (None, self._seen.get(before)):
            session.name = self._free(f"{before[:56]}-{datetime.now():%H%M%S}")
        session.updated = now()
        path = self.path(session.name)
        try:
            write_atomically(path, dumps(session), private=True)
        except OSError as error:
            session.name = before
            raise DiskError(
                f"cannot save the session in {self.folder}: {error.strerror or error}",
                f"free some space, set EXL_DATA_DIR to another folder, or start with {param('no_save')}; "
                "/export PATH writes this conversation elsewhere",
            ) from error
        self._seen[session.name] = _signature(path)
        return before if before != session.name else ""

    def remove(self, name: str) -> None:
        """Remove a session's file if it is still as this store last read or wrote it."""
        if _signature(self.path(name)) == self._seen.get(name):
            with contextlib.suppress(OSError):
                self.path(name).unlink()

    def _new_name(self, session: Session) -> str:
        """The date and the first words of the conversation, to recognize it by in a list."""
        words = re.findall(r"[^\W_]+", session.title.lower())[:5]
        return self._free("-".join([f"{datetime.now():%Y-%m-%d}", *words])[:60].rstrip("-"))

    def _free(self, name: str) -> str:
        """The name, with a number appended if it is taken."""
        candidates = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
        return next(candidate for candidate in candidates if not self.exists(candidate))


def _text(path: Path) -> str:
    return read_file(path, limit=_MOST_BYTES).decode("utf-8-sig")


def _signature(path: Path) -> _Signature | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


# --- writing for other programs ---------------------------------------------------------------------------------------


def export(session: Session, path: str, *, replace: bool = False) -> Path:
    """Write a conversation to a .md or .json file.

    Raises:
        UsageError: an unknown suffix, or the file exists and `replace` is False.
        DiskError: the file cannot be written.
    """
    file = expanded(Path(path))
    writers = {".json": dumps, ".md": _markdown}
    writer = writers.get(file.suffix.lower())
    if writer is None:
        raise UsageError(f"unknown export format: {path}", "end the name in .md or .json")
    if is_there(file) and not replace:
        raise UsageError(f"{file} already exists", "choose another name, or remove it first")
    with os_errors(f"cannot write {file}", "choose another path"):
        write_atomically(file, writer(session))
    return file


def _markdown(session: Session) -> str:
    parts = [f"# {session.title or 'A conversation'}"]
    facts = {"Model": session.model, "Started": session.created, "Last change": session.updated}
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items() if value))
    if session.system is not None:
        parts += ["## System", session.system]
    for turn in session.turns:
        parts += _turn(turn)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _turn(turn: Turn) -> list[str]:
    parts = [f"## {turn.role.capitalize()}"]
    if turn.reasoning:
        parts.append(f"<details><summary>Reasoning</summary>\n\n{turn.reasoning.strip()}\n\n</details>")
    parts.append(turn.content)
    if turn.finish_reason in ("length", "cancelled"):
        why = "cut off at the token limit" if turn.finish_reason == "length" else "stopped by the user"
        parts.append(f"*({why})*")
    return parts
