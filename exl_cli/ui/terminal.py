"""Line editing on a terminal: history, several lines, completion. prompt_toolkit draws it on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, get_common_complete_suffix
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from exl_cli.chat import commands
from exl_cli.chat.loop import Chat, Event, Signal
from exl_cli.models.prompt import check_text
from exl_cli.ui.chat import CONTINUATION, PROMPT

# A history file larger than this, in bytes, is cut to its last half.
_MOST_HISTORY = 1_000_000


class TerminalInput:
    """Reads what a person types. See `loop.LineInput`.

    Args:
        chat: whose commands, models, sessions and settings are completed.
        history: the file of earlier entries; None to keep none.
    """

    def __init__(self, chat: Chat, history: Path | None) -> None:
        completer = _Completer(chat)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=_history(history),
            completer=completer,
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            multiline=True,
            prompt_continuation=CONTINUATION,
            placeholder=_placeholder,
            key_bindings=_bindings(completer),
            enable_suspend=True,
            output=create_output(stdout=sys.stderr),
        )

    def read(self, draft: str) -> Event:
        """See `LineInput.read`; the draft stands in the line, to be changed."""
        try:
            text = self._session.prompt(default=draft)
        except KeyboardInterrupt:
            return Signal.INTERRUPT
        except EOFError:
            return Signal.END
        check_text(("the line", text))
        return text


def _placeholder() -> FormattedText:
    """What an empty line says; nothing once it has been entered, so that it does not stay on the screen."""
    return FormattedText([] if get_app().is_done else [("fg:ansibrightblack", "a message, or /help")])


class _History(FileHistory):
    """A history whose file may be missing, full or not ours: then it lasts as long as the process."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        try:
            path = Path(str(self.filename))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            super().store_string(string)
        except OSError:
            return


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        if path.stat().st_size > _MOST_HISTORY:
            from exl_cli.system.files import write_atomically

            text = path.read_text(encoding="utf-8", errors="replace")
            write_atomically(path, text[text.find("\n# ", len(text) // 2) :], private=True)
    except OSError:
        pass
    return _History(str(path))


class _Completer(Completer):
    """Completes commands and what follows them."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        length, found = commands.complete(self._chat, document.text_before_cursor)
        for text, remark in found:
            yield Completion(text, start_position=-length, display_meta=remark)


def _bindings(completer: Completer) -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            # The first Enter takes the completion, as in a shell's menu.
            buffer.complete_state = None
        elif commands.is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("tab")
    def _tab(event: KeyPressEvent) -> None:
        # At once, as shells do, and not in the background: an Enter may follow on its heels.
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_next()
            return
        found = list(completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
        if len(found) == 1:
            buffer.apply_completion(found[0])
        elif common := get_common_complete_suffix(buffer.document, found):
            buffer.insert_text(common)
        elif found:
            buffer.start_completion(select_first=True)

    @bindings.add("escape", "enter")
    def _alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _interrupt(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text:
            # What is thrown away can be had back with the up arrow.
            buffer.append_to_history()
            buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return bindings
