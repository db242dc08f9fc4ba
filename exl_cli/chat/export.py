"""Writing a conversation for other programs and people: JSON as it is saved, or Markdown to read."""

from __future__ import annotations

from pathlib import Path

from exl_cli.chat.session import Session, Turn, dumps
from exl_cli.errors import DiskError, UsageError
from exl_cli.system.files import write_atomically


def export(session: Session, path: str, *, replace: bool = False) -> Path:
    """Write a conversation to a file.

    Args:
        session: all of its turns are written.
        path: where to; its ending decides: .md or .json.
        replace: write over a file that is there.

    Raises:
        UsageError: another ending, or a file that is there.
        DiskError: the file cannot be written.
    """
    file = Path(path).expanduser()
    writers = {".json": dumps, ".md": markdown}
    writer = writers.get(file.suffix.lower())
    if writer is None:
        raise UsageError(f"{path} ends neither in .md nor in .json", "its ending chooses the format")
    if file.exists() and not replace:
        raise UsageError(f"{file} exists already", "choose another name, or remove it first")
    try:
        write_atomically(file, writer(session))
    except OSError as error:
        raise DiskError(f"cannot write {file}: {error.strerror or error}", "choose another place") from error
    return file


def markdown(session: Session) -> str:
    """A conversation as Markdown."""
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
