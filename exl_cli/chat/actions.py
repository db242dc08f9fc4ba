"""What the slash commands do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exl_cli.chat import tools
from exl_cli.chat.export import export as export_session
from exl_cli.chat.lines import unquote
from exl_cli.chat.prompting import LEAST_ROOM
from exl_cli.chat.session import Session, excerpt
from exl_cli.chat.settings import resolve
from exl_cli.errors import PromptError, UsageError
from exl_cli.sampling import PRESETS
from exl_cli.system import readings

if TYPE_CHECKING:
    from exl_cli.chat.loop import Chat

TOPICS = ("settings", "model", "prompt", "template")


def leave(chat: Chat, text: str) -> None:
    """Leave."""
    chat.leave()


def system(chat: Chat, text: str) -> None:
    """Show or set the system message; a template that refuses one says so now."""
    session = chat.talk.session
    if not text:
        chat.view.block(session.system if session.system is not None else "there is no system message")
        return
    old, session.system = session.system, None if text == "none" else unquote(text)
    try:
        chat.talk.partner.model.format.render([*session.messages(0, 0), {"role": "user", "content": "Hello"}])
    except PromptError:
        session.system = old
        raise
    chat.save()
    chat.view.say("the system message is taken away" if session.system is None else "the system message is set")


def change(chat: Chat, text: str) -> None:
    """Show or change settings."""
    name, _, value = text.partition(" ")
    if not name:
        chat.view.settings(chat.talk.settings.values(chat.generation_config))
    elif not value:
        key = resolve(name)
        chat.view.settings({key: chat.talk.settings.values(chat.generation_config)[key]})
    else:
        changed = chat.change(chat.talk.settings.with_value(name, value.strip()))
        chat.view.changes(changed, unchanged=resolve(name))


def preset(chat: Chat, text: str) -> None:
    """Use named sampler settings, or list the names."""
    if not text:
        chat.view.block("\n".join(f"{name}: {values}" for name, values in PRESETS.items()))
        return
    chat.view.changes(chat.change(chat.talk.settings.with_value("preset", text)), unchanged="preset")


def show(chat: Chat, text: str) -> None:
    """Show what is in use."""
    talk = chat.talk
    if text not in ("", *TOPICS):
        raise UsageError(f"/show does not know {text!r}", f"it shows {', '.join(TOPICS)}")
    if text in ("", "model"):
        chat.view.model(talk.partner)
    if text == "settings":
        chat.view.settings(talk.settings.values(chat.generation_config))
    if text == "prompt":
        messages = talk.session.messages()
        if not messages:
            raise UsageError("there is no prompt yet", "say something first")
        prompt = talk.partner.model.format.render(messages, answer=False)
        chat.view.block(prompt)
        chat.view.say(f"{talk.partner.composer.count(prompt):,} tokens")
    if text == "template":
        chat.view.block(talk.partner.model.format.source)
    if not text:
        rest = [f"sampling: {talk.settings.sampling(chat.generation_config).brief()}"]
        rest += [f"session: {talk.session.name or 'not saved yet'}, {len(talk.session.turns)} turns"]
        rest += [f"goes with the next message: {file.name}" for file in talk.attachments]
        chat.view.block("\n".join(rest))


def stats(chat: Chat, text: str) -> None:
    """What this conversation took, and the memory in use."""
    chat.view.totals(chat.talk.session)
    memory = chat.talk.partner.engine.memory()
    chat.view.memory_now(readings.read_gpus(memory), readings.read_host())


def retry(chat: Chat, text: str) -> None:
    """Answer the last message once more."""
    chat.talk.retry()


def undo(chat: Chat, text: str) -> None:
    """Take back what was done last."""
    if chat.talk.attachments:
        chat.view.say(f"{chat.talk.attachments.pop().name} no longer goes with the next message")
    else:
        chat.view.say(f"took back “{excerpt(chat.talk.undo())}”")


def edit(chat: Chat, text: str) -> None:
    """Change the last message in the user's editor and send it again."""
    before = chat.talk.last_message()
    after = tools.edit(before)
    if after == before or not after.strip():
        chat.view.say("the message is as it was")
        return
    chat.view.message(after)
    chat.talk.revise(after)


def resume(chat: Chat, text: str) -> None:
    """Let a cut-off answer go on."""
    chat.talk.resume()


def clear(chat: Chat, text: str) -> None:
    """Begin a new conversation."""
    old = chat.talk.session
    chat.adopt(Session(system=old.system))
    kept = f"; the old one is saved as {old.name}" if chat.saving and old.name else ""
    chat.view.say(f"a new conversation{kept}")


def save(chat: Chat, text: str) -> None:
    """Save now, under another name where one is given."""
    session = chat.talk.session
    if not text and not chat.saving:
        raise UsageError("this chat runs with --no-save", "/save NAME keeps this conversation after all")
    if not session.turns:
        raise UsageError("there is nothing to save yet", "say something first")
    if text and text != session.name:
        if chat.store.exists(text):
            raise UsageError(f"there is a session named {text} already", "choose another name")
        chat.rename(text)
    chat.save_or_fail()
    chat.view.say(f"saved as {session.name} ({chat.store.path(session.name)})")


def load(chat: Chat, text: str) -> None:
    """Go on with a saved conversation, with the model in use."""
    if not text:
        raise UsageError("/load needs a name", "/sessions lists them")
    chat.adopt(chat.store.load(text))
    session = chat.talk.session
    chat.view.resumed(session)
    if session.model != chat.talk.partner.model.name:
        chat.view.say(f"it was with {session.model}; /model {session.model} goes back to that")


def list_sessions(chat: Chat, text: str) -> None:
    """List the saved conversations."""
    found = list(chat.store.overviews())
    if not found:
        chat.view.say(f"there are no saved sessions in {chat.store.folder}")
        return
    chat.view.sessions(found, chat.talk.session.name)


def export(chat: Chat, text: str) -> None:
    """Write the conversation to a file."""
    if not text:
        raise UsageError("/export needs a path", "its ending, .md or .json, chooses the format")
    if not chat.talk.session.turns:
        raise UsageError("there is nothing to export yet", "say something first")
    file = export_session(chat.talk.session, text, replace=str(Path(text).expanduser()) in chat.exported)
    chat.exported.add(str(file))
    chat.view.say(f"written to {file}")


def model(chat: Chat, text: str) -> None:
    """Go on with another model, or show this one and the others."""
    if not text:
        chat.view.model(chat.talk.partner)
        chat.view.say(f"models here: {', '.join(chat.host.names())}")
        return
    chat.switch(text)
    chat.view.model(chat.talk.partner)


def attach(chat: Chat, text: str) -> None:
    """Put a text file into the next message, if there is room for it."""
    if not text:
        raise UsageError("/file needs a path", "the file goes with the next message")
    file = tools.read_attachment(text)
    size, context = chat.talk.partner.composer.count(str(file)), chat.talk.partner.engine.context_length
    if size > context - LEAST_ROOM:
        raise PromptError(
            f"{file.name} has {size:,} tokens, the context holds {context:,}, the answer included",
            "take a part of it, or start exl with a larger --max-seq-len if the model allows it",
        )
    chat.talk.attachments.append(file)
    chat.view.say(f"{file.name} ({size:,} tokens) goes with the next message; /undo takes it out")


def copy(chat: Chat, text: str) -> None:
    """Copy the last answer: with a clipboard program, else through the terminal."""
    answer = chat.talk.last_answer().content.strip()
    command = tools.clipboard_command()
    if command is not None:
        tools.fill_clipboard(command, answer)
    elif not chat.view.copy(answer):
        raise UsageError("there is no clipboard: neither a terminal nor a program for it", "/export PATH writes a file")
    chat.view.say(f"copied {len(answer):,} characters")
