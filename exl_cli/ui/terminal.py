"""Line editing on a terminal with prompt_toolkit, on stderr: history, multiple lines, completion."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, get_common_complete_suffix
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from exl_cli.chat import commands
from exl_cli.chat.conversation import Conversation, ReadLine
from exl_cli.models.prompt import check_text
from exl_cli.system.files import write_atomically
from exl_cli.ui.chat import CONTINUATION, PROMPT
from exl_cli.ui.text import harmless

# A history file larger than this, in bytes, is cut to its last half.
_MOST_HISTORY = 1_000_000


def terminal_reader(chat: Conversation, history: Path | None) -> ReadLine:
    """A reader with line editing, the chat's completions and a history file, if any; a draft is prefilled."""
    session: PromptSession[str] = PromptSession(
        PROMPT,
        history=InMemoryHistory() if history is None else _History(history),
        completer=_Completer(chat),
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
        multiline=True,
        prompt_continuation=CONTINUATION,
        placeholder=_placeholder,
        key_bindings=_KEYS,
        enable_suspend=True,
        output=create_output(stdout=sys.stderr),
    )

    def read(draft: str) -> str | None:
        try:
            text = session.prompt(default=draft)
        except EOFError:
            return None
        check_text(("the line", text))
        return text

    return read


def _placeholder() -> FormattedText:
    """Shown in an empty line; empty once the line is accepted, or it would stay on the screen."""
    return FormattedText([] if get_app().is_done else [("fg:ansibrightblack", "a message, or /help")])


class _History(FileHistory):
    """A file history that tolerates a missing or unwritable file, and then lasts as long as the process."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        with contextlib.suppress(OSError):
            if path.stat().st_size > _MOST_HISTORY:
                text = path.read_text(encoding="utf-8", errors="replace")
                write_atomically(path, text[text.find("\n# ", len(text) // 2) :], private=True)

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            super().store_string(string)


class _Completer(Completer):
    """Completes slash commands and their arguments."""

    def __init__(self, chat: Conversation) -> None:
        self._chat = chat

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        length, endings = commands.complete(self._chat, document.text_before_cursor)
        for text, remark in endings:
            yield Completion(text, -length, display=harmless(text), display_meta=harmless(remark))


_KEYS = KeyBindings()


def _choosing(buffer: Buffer) -> bool:
    """Whether a completion in the menu is selected."""
    return buffer.complete_state is not None and buffer.complete_state.current_completion is not None


@_KEYS.add("enter")
def _enter(event: KeyPressEvent) -> None:
    buffer = event.current_buffer
    if _choosing(buffer):
        # The first Enter takes the completion, as in a shell's menu.
        buffer.complete_state = None
    elif commands.is_open(buffer.text):
        buffer.insert_text("\n")
    else:
        buffer.validate_and_handle()


@_KEYS.add("tab")
def _tab(event: KeyPressEvent) -> None:
    # Complete synchronously, as shells do: an Enter may follow immediately.
    buffer = event.current_buffer
    if _choosing(buffer):
        buffer.complete_next()
        return
    endings = list(buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
    if len(endings) == 1:
        buffer.apply_completion(endings[0])
    elif common := get_common_complete_suffix(buffer.document, endings):
        buffer.insert_text(common)
    elif endings:
        buffer.start_completion(select_first=True)


@_KEYS.add("escape", "enter")
def _alt_enter(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")


@_KEYS.add("c-c")
def _interrupt(event: KeyPressEvent) -> None:
    buffer = event.current_buffer
    if buffer.text:
        # The up arrow recalls the discarded text.
        buffer.append_to_history()
        buffer.reset()
    else:
        event.app.exit(exception=KeyboardInterrupt)
