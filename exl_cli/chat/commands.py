"""The slash commands: one table, from which dispatch, `/help` and completion are made."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exl_cli.chat import actions, settings
from exl_cli.errors import UsageError
from exl_cli.sampling import PRESETS

if TYPE_CHECKING:
    from exl_cli.chat.loop import Chat

# A path such as /usr/bin is no command, nor is a line that begins with a space; a slash alone is the beginning of one.
_WORD = re.compile(r"/([a-zA-Z?]+(?=\s|$)|(?=\s*$))")

Complete = Callable[["Chat", str], Iterable[str]]


@dataclass(frozen=True)
class Command:
    """A slash command.

    Attributes:
        name: what is typed, without the slash.
        arguments: what may follow, as help shows it; empty for nothing.
        help: what it does, in a line.
        run: does it, with the text that followed the name.
        complete: what the text that follows may become.
        aliases: other names.
    """

    name: str
    arguments: str
    help: str
    run: Callable[[Chat, str], None]
    complete: Complete = lambda chat, text: ()
    aliases: tuple[str, ...] = ()


def _models(chat: Chat, text: str) -> Iterable[str]:
    return [*chat.host.names(), *_paths(chat, text)] if text else chat.host.names()


def _sessions(chat: Chat, text: str) -> Iterable[str]:
    return chat.store.names()


def _presets(chat: Chat, text: str) -> Iterable[str]:
    return PRESETS


def _set(chat: Chat, text: str) -> Iterable[str]:
    name, space, _ = text.partition(" ")
    return (f"{name} {value}" for value in settings.examples(name)) if space else settings.names()


def _topics(chat: Chat, text: str) -> Iterable[str]:
    return actions.TOPICS


def _names(chat: Chat, text: str) -> Iterable[str]:
    return COMMANDS


def _paths(chat: Chat, text: str) -> Iterable[str]:
    """Files and folders that begin with the text, these with a slash."""
    folder, _, beginning = text.rpartition("/")
    prefix = text[: len(text) - len(beginning)]
    place = Path(folder or ("/" if prefix else ".")).expanduser()
    try:
        entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith(".") or beginning)
        return [prefix + entry.name + ("/" if entry.is_dir() else "") for entry in entries]
    except OSError:
        return []


def _help(chat: Chat, text: str) -> None:
    """List the commands, or explain one."""
    chat.view.commands([find(text)] if text else list(_TABLE))


_TABLE = (
    Command("help", "[COMMAND]", "list the commands, or explain one", _help, _names, ("?",)),
    Command("system", "[TEXT|none]", "show or set the system message", actions.system),
    Command("set", "[NAME [VALUE|default]]", "show or change a setting", actions.change, _set),
    Command("preset", "[NAME|none]", "use named sampler settings", actions.preset, _presets),
    Command("show", "[settings|model|prompt|template]", "show what is in use", actions.show, _topics),
    Command("stats", "", "what this conversation took, and the memory in use", actions.stats),
    Command("retry", "", "answer the last message once more", actions.retry),
    Command("undo", "", "take back the last message and its answer, or an attached file", actions.undo),
    Command("edit", "", "change the last message in $EDITOR and send it again", actions.edit),
    Command("continue", "", "let a cut-off answer go on", actions.resume),
    Command("clear", "", "begin a new conversation; the old one stays saved", actions.clear),
    Command("save", "[NAME]", "save now, under a name of your own", actions.save, _sessions),
    Command("load", "NAME", "go on with a saved conversation", actions.load, _sessions),
    Command("sessions", "", "list the saved conversations", actions.list_sessions),
    Command("export", "PATH", "write the conversation to a .md or .json file", actions.export, _paths),
    Command("model", "[NAME]", "go on with another model, or show this one", actions.model, _models),
    Command("file", "PATH", "put a text file into the next message", actions.attach, _paths),
    Command("copy", "", "copy the last answer to the clipboard", actions.copy),
    Command("quit", "", "leave; the conversation is saved", actions.leave, aliases=("exit", "bye")),
)
COMMANDS = {command.name: command for command in _TABLE}
_BY_ANY_NAME = {name: command for command in _TABLE for name in (command.name, *command.aliases)}


def is_command(text: str) -> bool:
    """Whether a text is meant as a command."""
    return _WORD.match(text) is not None


def find(word: str) -> Command:
    """The command of a name.

    Raises:
        UsageError: there is none; the nearest is named.
    """
    name = word.lower().removeprefix("/")
    if name not in _BY_ANY_NAME:
        # A sign is like any other: only words can be meant by what is nearly one.
        near = difflib.get_close_matches(name, filter(str.isalpha, _BY_ANY_NAME), 1, 0.5)
        hint = (
            f"did you mean /{near[0]}?"
            if near
            else "/help lists them; a message may begin with a space before the slash"
        )
        raise UsageError(f"there is no command /{name}", hint)
    return _BY_ANY_NAME[name]


def run(chat: Chat, text: str) -> None:
    """Do what a command says.

    Raises:
        UsageError: there is no such command, or it takes nothing. And as the command.
    """
    match = _WORD.match(text)
    command = find(match[1] if match else text)
    rest = text[match.end() :].strip() if match else ""
    if rest and not command.arguments:
        raise UsageError(f"/{command.name} takes nothing after it", f"type /{command.name} alone")
    command.run(chat, rest)


def complete(chat: Chat, text: str) -> tuple[int, list[tuple[str, str]]]:
    """What a text may become.

    Args:
        chat: whose models, sessions and settings are offered.
        text: what stands before the cursor.

    Returns:
        How many characters at its end are replaced, and by what, each with a remark.
    """
    match = re.match(r"/([a-zA-Z]*)$", text)
    if match:
        found = [(f"/{name}", command.help) for name, command in COMMANDS.items() if name.startswith(match[1].lower())]
        return len(text), found
    word = _WORD.match(text)
    command = _BY_ANY_NAME.get(word[1].lower()) if word else None
    if word is None or command is None:
        return 0, []
    argument = text[word.end() :].lstrip()
    return len(argument), [(item, "") for item in command.complete(chat, argument) if item.startswith(argument)]
