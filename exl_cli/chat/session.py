"""A conversation: its turns, which of them the model still sees, and how it is written to a file.

All turns are kept. When the context fills, the oldest stop being sent to the model (`Session.trim`), but they stay in
the conversation, in its file and in what is exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Literal

from exl_cli.engines.base import FinishReason, Summary
from exl_cli.errors import DiskError

FORMAT = "exl-session"
VERSION = 1

Role = Literal["user", "assistant"]
Ending = FinishReason | Literal[""]


def now() -> str:
    """The local time with its offset, to the second, as ISO 8601 writes it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


@dataclass
class Turn:
    """One message.

    Attributes:
        role: who speaks.
        content: what is said, exactly as typed or generated; of an answer, what follows the reasoning.
        reasoning: the reasoning before an answer, its tags left out.
        raw: the answer as generated, tags and all, where it has reasoning; empty where `content` is all of it.
        finish_reason: of an answer: "stop", "length" or "cancelled"; see `engines.base.Summary`.
        model: the name of the model that answered.
        time: when it was said; see `now`.
        timings: of an answer: the numbers of `engines.base.Summary` for the last generation that made it.
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
        """The turn as chat templates take it. Those that know of reasoning decide for themselves what to do with it."""
        message = {"role": self.role, "content": self.content}
        return {**message, "reasoning_content": self.reasoning} if self.reasoning else message


@dataclass
class Totals:
    """What a conversation has cost so far, answers included that were later retried or undone.

    Attributes:
        answers: generations.
        prompt_tokens, reused_tokens, new_tokens: their sums; `reused_tokens` is a part of `prompt_tokens`.
        drafted_tokens, accepted_tokens: what speculation proposed, and how much of it was right.
        prompt_seconds, generation_seconds: their sums.
    """

    answers: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, summary: Summary) -> None:
        """Count one generation."""
        self.answers += 1
        for entry in fields(self):
            if entry.name != "answers":
                setattr(self, entry.name, getattr(self, entry.name) + getattr(summary, entry.name))


@dataclass
class Session:
    """A conversation.

    Attributes:
        name: what it is saved as; empty while it has no name.
        system: the system message, or None.
        turns: all of them, a user's first, then in alternation.
        dropped: how many of the first turns the model no longer sees.
        model: the name of the model last used.
        settings: what the chat was set to, JSON-ready; kept for whoever made it.
        totals: what it cost.
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
        """The last turn."""
        return self.turns[-1] if self.turns else None

    @property
    def title(self) -> str:
        """The first words that were said, on one line."""
        return excerpt(self.turns[0].content) if self.turns else ""

    def last_user(self) -> int | None:
        """Where the last message of the user is among the turns."""
        return next((i for i in range(len(self.turns) - 1, -1, -1) if self.turns[i].role == "user"), None)

    def messages(self, start: int | None = None, stop: int | None = None) -> list[dict[str, str]]:
        """What the model is to read: the system message and the turns from `start` (those not dropped) to `stop`."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *(turn.message() for turn in self.turns[self.dropped if start is None else start : stop])]

    def cut(self, count: int) -> list[Turn]:
        """Keep the first `count` turns; returns the others."""
        removed = self.turns[count:]
        del self.turns[count:]
        # Whoever goes back behind what was dropped sees it again.
        self.dropped = min(self.dropped, max(len(self.turns) - 1, 0))
        while self.dropped and self.turns[self.dropped].role != "user":
            self.dropped -= 1
        return removed

    def trim(self, size: Callable[[int], int], limit: int, goal: int) -> list[Turn]:
        """Drop the oldest exchanges whole, if the prompt has become too large. The last user message always stays.

        Args:
            size: tokens of the prompt that begins with the turn of this index; falls as the index rises.
            limit: most tokens that the prompt may have; while it holds, nothing is dropped.
            goal: tokens to come down to once something must go. A prompt that begins otherwise is computed anew from
                its first token, so room is made for several turns at a time.

        Returns:
            The turns that were dropped.
        """
        before, last = self.dropped, self.last_user()
        if last is None or size(before) <= limit:
            return []
        starts = [i for i in range(before + 1, last + 1) if self.turns[i].role == "user"]
        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if size(starts[middle]) <= goal else (middle + 1, high)
        if starts:
            self.dropped = starts[low]
        return self.turns[before : self.dropped]

    def to_dict(self) -> dict[str, Any]:
        """The file's content; it shares its parts with the session."""
        turns = [{k: v for k, v in vars(turn).items() if v or k == "content"} for turn in self.turns]
        rest = {k: v for k, v in vars(self).items() if k not in ("name", "turns")}
        return {"format": FORMAT, "version": VERSION, **rest, "totals": vars(self.totals), "turns": turns}


def dumps(session: Session) -> str:
    """A session as readable JSON, a turn on each line."""
    value = session.to_dict()
    turns = ",\n".join(f"    {json.dumps(turn, ensure_ascii=False)}" for turn in value.pop("turns"))
    head = json.dumps(value, ensure_ascii=False, indent=2).removesuffix("\n}")
    return f'{head},\n  "turns": [\n{turns}\n  ]\n}}\n'


def loads(text: str, name: str, source: str) -> Session:
    """A session from its JSON.

    Args:
        text: the file's content.
        name: the session's name.
        source: the file, for messages.

    Raises:
        DiskError: the text is no session, is damaged, or is of a newer format.
    """
    try:
        value = json.loads(text)
        # JSON can spell half a character, which no file and no model takes.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise damaged(source, f"it has half a character, {half}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(source, f"it is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DiskError(f"{source} is not a session of exl", "choose another; /sessions lists them")
    version = value.get("version")
    if isinstance(version, int) and version > VERSION:
        raise DiskError(
            f"{source} was written by a newer exl: its format is {version}, this one reads up to {VERSION}",
            "update exl",
        )
    if version != VERSION:
        raise damaged(source, f"its version is {version!r}")
    try:
        turns = [_read(Turn, turn, f"turn {index + 1}") for index, turn in enumerate(_list(value.get("turns")))]
        totals = _read(Totals, value.get("totals", {}), "totals")
        rest = {key: item for key, item in value.items() if key not in ("format", "version", "turns", "totals")}
        session: Session = _read(Session, {**rest, "name": name}, "the session")
    except TypeError as error:
        raise damaged(source, str(error)) from error
    session.turns, session.totals = turns, totals
    wrong = next((i for i, turn in enumerate(turns) if turn.role != ("user", "assistant")[i % 2]), None)
    if wrong is not None:
        raise damaged(source, f"turn {wrong + 1} has the role {turns[wrong].role!r}")
    if not 0 <= session.dropped <= len(turns) or session.dropped % 2:
        raise damaged(source, f"dropped is {session.dropped}")
    return session


# What each field must be in a file.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "str | None": (str, type(None)),
    "Role": str,
    "Ending": str,
    "dict[str, Any]": dict,
    "dict[str, float]": dict,
}


def _read(kind: type[Any], value: Any, where: str) -> Any:
    """A dataclass from a JSON object; fields that this version does not know are left out."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} is not an object")
    known = {}
    for entry in fields(kind):
        if entry.name not in value:
            continue
        item = value[entry.name]
        if not isinstance(item, _TYPES[str(entry.type)]) or isinstance(item, bool):
            raise TypeError(f"{entry.name} of {where} is {item!r}"[:200])
        known[entry.name] = item
    if kind is Turn and not {"role", "content"} <= known.keys():
        raise TypeError(f"{where} has no role or no content")
    return kind(**known)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("it has no list of turns")
    return value


def damaged(source: str, why: str) -> DiskError:
    """The error for a session's file that cannot be used."""
    return DiskError(f"the session file {source} is damaged: {why}", "it is left as it is; mend it or remove it")


def excerpt(text: str, length: int = 48) -> str:
    """The beginning of a text on one line, at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
