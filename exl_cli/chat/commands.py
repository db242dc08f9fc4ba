"""Slash commands with their help and completion, and the parsing of input lines."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exl_cli.chat import settings
from exl_cli.chat.session import Session, excerpt, export
from exl_cli.errors import PromptError, UsageError, did_you_mean, os_errors, param, spell
from exl_cli.models.prompt import decode, read_input
from exl_cli.sampling import PRESETS
from exl_cli.system import readings
from exl_cli.system.files import expanded, read_text

if TYPE_CHECKING:
    from exl_cli.chat.conversation import Conversation

# Neither a path such as /usr/bin nor a line that begins with a space is a command; a lone slash is an incomplete one.
_WORD = re.compile(r"/([a-zA-Z?]+(?=\s|$)|(?=\s*$))")
_QUOTES = '"""'
# A block may also be the argument of a command: /system """…
_OPENING = re.compile(r'\s*(?:/[a-z]+\s+)?"""')

_TOPICS = ("settings", "model", "prompt", "template")
_EDITORS = ("nano", "vim", "vi")
# Clipboard programs, each with the environment variable that is set where its display server runs; "" for none needed.
_CLIPBOARDS = (
    ("WAYLAND_DISPLAY", "wl-copy"),
    ("DISPLAY", "xclip -selection clipboard"),
    ("DISPLAY", "xsel --clipboard --input"),
    ("", "pbcopy"),
    ("", "clip.exe"),
)

Run = Callable[["Conversation", str], None]
Complete = Callable[["Conversation", str], Iterable[str]]


# --- lines ------------------------------------------------------------------------------------------------------------


def is_open(text: str) -> bool:
    """Whether the text opens a triple-quoted block and does not close it, so the next line belongs to it."""
    opening = _OPENING.match(text)
    return opening is not None and not text[opening.end() :].rstrip().endswith(_QUOTES)


def unquote(text: str) -> str:
    """Strip trailing white space and, from a block, its triple quotes with the line breaks next to them."""
    text = text.rstrip()
    begun = text.lstrip()
    if not begun.startswith(_QUOTES):
        return text
    return begun.removeprefix(_QUOTES).removesuffix(_QUOTES).removeprefix("\n").removesuffix("\n")


def is_command(text: str) -> bool:
    """Whether a line is a command rather than a message."""
    return _WORD.match(text) is not None


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A slash command."""

    name: str  # without the slash
    arguments: str  # as help shows them; empty for none
    help: str
    aliases: tuple[str, ...]
    run: Run  # called with the conversation and the text after the name
    complete: Complete  # called likewise; returns the possible arguments


COMMANDS: dict[str, Command] = {}
_BY_ANY_NAME: dict[str, Command] = {}


def _command(
    usage: str, help: str, complete: Complete = lambda chat, text: (), aliases: tuple[str, ...] = ()
) -> Callable[[Run], Run]:
    """Register a function as a command; `usage` is its name and arguments."""

    def register(run: Run) -> Run:
        name, _, arguments = usage.partition(" ")
        COMMANDS[name] = Command(name, arguments, help, aliases, run, complete)
        _BY_ANY_NAME.update(dict.fromkeys((name, *aliases), COMMANDS[name]))
        return run

    return register


def find(word: str) -> Command:
    """Look up a command by name or alias. UsageError for an unknown one suggests the nearest."""
    name = word.lower().removeprefix("/")
    if name not in _BY_ANY_NAME:
        hint = "/help lists commands; to send it as a message, put a space before the slash"
        near = did_you_mean(name, filter(str.isalpha, _BY_ANY_NAME), "did you mean /{}?", 0.5)
        raise UsageError(f"unknown command /{name}", near or hint)
    return _BY_ANY_NAME[name]


def run(chat: Conversation, text: str) -> None:
    """Run a command line."""
    match = _WORD.match(text)
    command = find(match[1] if match else text)
    rest = text[match.end() :].strip() if match else ""
    if rest and not command.arguments:
        raise UsageError(f"/{command.name} takes no argument", f"enter just /{command.name}")
    command.run(chat, rest)


def complete(chat: Conversation, text: str) -> tuple[int, list[tuple[str, str]]]:
    """How many characters at the end of a command line to replace, and (replacement, remark) for each completion."""
    if match := re.match(r"/([a-zA-Z]*)$", text):
        start = match[1].lower()
        return len(text), [(f"/{name}", command.help) for name, command in COMMANDS.items() if name.startswith(start)]
    word = _WORD.match(text)
    command = _BY_ANY_NAME.get(word[1].lower()) if word else None
    if word is None or command is None:
        return 0, []
    argument = text[word.end() :].lstrip()
    return len(argument), [(item, "") for item in command.complete(chat, argument) if item.startswith(argument)]


def _paths(chat: Conversation, text: str) -> list[str]:
    """Paths in the folder that the text names; folders end in a slash."""
    folder, _, beginning = text.rpartition("/")
    prefix = text[: len(text) - len(beginning)]
    place = expanded(Path(folder or ("/" if prefix else ".")))
    try:
        entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith(".") or beginning)
        return [prefix + entry.name + ("/" if entry.is_dir() else "") for entry in entries]
    except OSError:
        return []


def _models(chat: Conversation, text: str) -> list[str]:
    return chat.loader.names() + (_paths(chat, text) if text else [])


def _sessions(chat: Conversation, text: str) -> list[str]:
    return chat.store.names()


def _settings(chat: Conversation, text: str) -> list[str]:
    name, space, _ = text.partition(" ")
    return [f"{name} {value}" for value in settings.examples(name)] if space else settings.names()


# --- the commands, in the order of /help ------------------------------------------------------------------------------


@_command("help [COMMAND]", "list all commands, or describe one", lambda chat, text: COMMANDS, aliases=("?",))
def _help(chat: Conversation, text: str) -> None:
    chat.view.commands([find(text)] if text else COMMANDS.values())


@_command("system [TEXT|none]", "show or set the system message")
def _system(chat: Conversation, text: str) -> None:
    session = chat.session
    if not text:
        chat.view.block(session.system if session.system is not None else "no system message")
        return
    old, session.system = session.system, None if text == "none" else unquote(text)
    try:
        spelled = chat.model.check_system(session)
    except PromptError:
        session.system = old
        raise
    chat.say_spelled("system message", spelled)
    chat.save()
    chat.view.say("system message removed" if session.system is None else "system message set")


def _change(chat: Conversation, name: str, value: str) -> None:
    try:
        changed = chat.change(chat.settings.with_value(name, value))
    except UsageError as error:
        # In a chat, settings have no flags.
        raise UsageError(spell(error.message), spell(error.hint)) from error
    chat.view.changes(changed, unchanged=settings.resolve(name))


@_command("set [NAME [VALUE|default]]", "show or change a setting", _settings)
def _set(chat: Conversation, text: str) -> None:
    name, _, value = text.partition(" ")
    if not name:
        chat.view.settings(chat.values())
    elif not value:
        key = settings.resolve(name)
        chat.view.settings({key: chat.values()[key]})
    else:
        _change(chat, name, value.strip())


@_command("preset [NAME|none]", "use a preset of sampler settings", lambda chat, text: PRESETS)
def _preset(chat: Conversation, text: str) -> None:
    if text:
        _change(chat, "preset", text)
    else:
        chat.view.block("\n".join(f"{name}: {values}" for name, values in PRESETS.items()))


@_command(
    "show [settings|model|prompt|template]",
    "show the model, settings, last prompt or chat template",
    lambda chat, text: _TOPICS,
)
def _show(chat: Conversation, text: str) -> None:
    model = chat.model
    if text not in ("", *_TOPICS):
        raise UsageError(f"unknown topic {text!r}", f"choose {', '.join(_TOPICS[:-1])} or {_TOPICS[-1]}")
    if text in ("", "model"):
        chat.view.model(model)
    if text == "settings":
        chat.view.settings(chat.values())
    if text == "prompt":
        messages = chat.session.messages()
        if not messages:
            raise UsageError("no prompt yet", "send a message first")
        prompt = model.render(messages, add_generation_prompt=False)
        chat.view.block(model.tokenizer.shown(prompt))
        chat.view.say(f"{model.encoder.count(prompt):,} tokens")
    if text == "template":
        chat.view.block(model.format.source)
    if not text:
        rest = [f"sampling: {chat.settings.sampling(model.info.generation_config).brief()}"]
        rest += [f"session: {chat.session.name or 'not saved yet'}, {len(chat.session.turns)} turns"]
        rest += [f"attached: {name}" for name, _ in chat.attachments]
        chat.view.block("\n".join(rest))


@_command("stats", "token counts, speed and memory")
def _stats(chat: Conversation, text: str) -> None:
    memory = chat.model.engine.memory()
    chat.view.stats(chat.session, readings.read_gpus(memory), readings.read_host())


@_command("retry", "regenerate the last response")
def _retry(chat: Conversation, text: str) -> None:
    chat.retry()


@_command("undo", "remove the last message and its response, or an attached file")
def _undo(chat: Conversation, text: str) -> None:
    if chat.attachments:
        chat.view.say(f"{chat.attachments.pop()[0]} is no longer attached")
    else:
        chat.view.say(f"removed “{excerpt(chat.undo())}”")


@_command("edit", "edit the last message in $EDITOR and resend it")
def _edit(chat: Conversation, text: str) -> None:
    session = chat.session
    before = session.turns[session.last_user()].content
    if not chat.interactive:
        raise UsageError("/edit needs a terminal", "enter /undo, then the new message")
    after = _edited(before)
    if after == before or not after.strip():
        chat.view.say("message unchanged")
        return
    chat.view.message(after)
    chat.revise(after)


@_command("continue", "continue a response that was cut off")
def _continue(chat: Conversation, text: str) -> None:
    chat.resume()


@_command("clear", "start a new conversation; the current one stays saved")
def _clear(chat: Conversation, text: str) -> None:
    old = chat.session
    chat.adopt(Session(system=old.system))
    kept = f"; the previous one is saved as {old.name}" if chat.saving and old.name else ""
    chat.view.say(f"new conversation{kept}")


@_command("save [NAME]", "save the conversation, optionally under a new name", _sessions)
def _save(chat: Conversation, text: str) -> None:
    session = chat.session
    if not text and not chat.saving:
        raise UsageError(f"saving is off ({param('no_save')})", "/save NAME turns it on and saves this conversation")
    if not session.turns:
        raise UsageError("nothing to save yet", "send a message first")
    if text and text != session.name:
        if chat.store.exists(text):
            raise UsageError(f"a session named {text} already exists", "choose another name")
        chat.rename(text)
    chat.save_or_fail()
    chat.view.say(f"saved as {session.name} ({chat.store.path(session.name)})")


@_command("load NAME", "resume a saved session", _sessions)
def _load(chat: Conversation, text: str) -> None:
    if not text:
        raise UsageError("/load needs a name", "/sessions lists them")
    session = chat.store.load(text)
    chat.adopt(session)
    chat.view.resumed(session)
    if session.model != chat.model.name:
        chat.view.say(f"this session used {session.model}; /model {session.model} switches back to it")


@_command("sessions", "list saved sessions")
def _list_sessions(chat: Conversation, text: str) -> None:
    store = chat.store
    if sessions := list(store.overviews()):
        chat.view.sessions(sessions, chat.session.name)
    else:
        chat.view.say(f"no saved sessions in {store.folder}")


@_command("export PATH", "write the conversation to a .md or .json file", _paths)
def _export(chat: Conversation, text: str) -> None:
    if not text:
        raise UsageError("/export needs a path", "end it in .md or .json")
    if not chat.session.turns:
        raise UsageError("nothing to export yet", "send a message first")
    file = export(chat.session, text, replace=expanded(Path(text)) in chat.exported)
    chat.exported.add(file)
    chat.view.say(f"wrote {file}")


@_command("model [NAME]", "switch to another model, or show this one", _models)
def _model(chat: Conversation, text: str) -> None:
    if text:
        chat.switch(text)
    chat.view.model(chat.model)
    if not text:
        chat.view.say(f"available models: {', '.join(chat.loader.names())}")


@_command("file PATH", "attach a text file to the next message", _paths)
def _file(chat: Conversation, text: str) -> None:
    if not text:
        raise UsageError("/file needs a path", "the file is sent with the next message")
    name, block = _attachment(expanded(Path(text)))
    size = chat.attach(name, block)
    chat.view.say(f"attached {name} ({size:,} tokens) to the next message; /undo removes it")


@_command("copy", "copy the last response to the clipboard")
def _copy(chat: Conversation, text: str) -> None:
    answer = chat.last_answer().content.strip()
    if not _fill_clipboard(answer) and not chat.view.copy(answer):
        raise UsageError("no clipboard available", "/export PATH writes the conversation to a file")
    chat.view.say(f"copied {len(answer):,} characters")


@_command("quit", "save and quit", aliases=("exit", "bye"))
def _quit(chat: Conversation, text: str) -> None:
    chat.leave()


# --- files, the editor, the clipboard ---------------------------------------------------------------------------------


def _attachment(file: Path) -> tuple[str, str]:
    """A file's name, and its text as a fenced block for a message, fenced by more backticks than it contains."""
    hint = "only text files can be attached"
    text = decode(read_input(file, "check the path"), str(file), hint)
    if "\0" in text:
        raise PromptError(f"{file} is not a text file: it contains null bytes", hint)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if text.endswith("\n") else "\n"
    return file.name, f"{file.name}:\n\n{fence}\n{text}{end}{fence}"


def _edited(text: str) -> str:
    """Let the user edit a text in `$VISUAL`, else `$EDITOR`, else the first known editor on the PATH.

    The final line break that editors add is removed.
    """
    hint, unchanged = "set $VISUAL or $EDITOR", "message unchanged"
    chosen = (os.environ.get(variable, "").strip() for variable in ("VISUAL", "EDITOR"))
    command = shlex.split(next(filter(None, (*chosen, *filter(shutil.which, _EDITORS))), ""))
    if not command:
        raise UsageError("no editor found", hint)
    with tempfile.TemporaryDirectory(prefix="exl-") as folder:
        file = Path(folder) / "message.md"
        file.write_text(text, encoding="utf-8")
        with os_errors(f"cannot start the editor {command[0]}", hint, UsageError):
            # stdout is for answers, and may be a pipe.
            status = subprocess.run([*command, str(file)], stdout=2).returncode  # noqa: S603
        if status:
            raise UsageError(f"the editor {command[0]} exited with status {status}", unchanged)
        try:
            return read_text(file).removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the edited message: {error}", unchanged) from error


def _fill_clipboard(text: str) -> bool:
    """Copy a text with the clipboard program of the local display; returns whether there is one.

    Not over ssh, where it would fill the clipboard of the remote machine.
    """
    commands = (command.split() for variable, command in _CLIPBOARDS if not variable or os.environ.get(variable))
    command = next((command for command in commands if shutil.which(command[0])), None)
    if command is None or os.environ.get("SSH_CONNECTION"):
        return False
    try:
        null = subprocess.DEVNULL
        subprocess.run(command, input=text.encode(), check=True, timeout=10, stdout=null, stderr=null)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{command[0]} failed: {error}", "/export PATH writes the conversation to a file") from error
    return True
