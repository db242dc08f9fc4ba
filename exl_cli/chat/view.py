"""The interface through which a chat shows things; `ui.chat` implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from exl_cli.engines.base import Summary
from exl_cli.loader import Observer
from exl_cli.structured.reasoning import Piece
from exl_cli.system.readings import GpuReading, HostReading

if TYPE_CHECKING:
    from exl_cli.chat.commands import Command
    from exl_cli.chat.model import ChatModel
    from exl_cli.chat.session import Session, Turn


class ChatView(Protocol):
    """Shows a chat's answers, notes, statistics and loading progress."""

    def loading(self, what: str) -> AbstractContextManager[Observer]: ...

    # An answer as it streams in, without echoing keys; and its statistics.
    def answering(
        self, *, thinking: bool, markdown: bool
    ) -> AbstractContextManager[Callable[[Iterable[Piece]], None]]: ...
    def turn(self, summary: Summary, context_length: int, *, answered: bool) -> None: ...

    # Turns that the model no longer sees, and how many tokens that saves.
    def dropped(self, turns: Sequence[Turn], tokens: int) -> None: ...

    def note(self, message: str) -> None: ...  # unless only answers are wanted
    def say(self, message: str) -> None: ...  # what a command did
    def block(self, text: str) -> None: ...  # verbatim
    def message(self, text: str) -> None: ...  # not typed at the prompt, but as if
    def error(self, error: Exception) -> None: ...  # with the next step; for a bug in exl, how to report it
    def traceback(self, error: BaseException) -> None: ...

    def commands(self, commands: Iterable[Command]) -> None: ...
    def settings(self, values: Mapping[str, Any]) -> None: ...
    def changes(self, changed: Mapping[str, tuple[Any, Any]], unchanged: str) -> None: ...  # old and new values
    def model(self, model: ChatModel) -> None: ...
    def stats(self, session: Session, gpus: Sequence[GpuReading], host: HostReading) -> None: ...
    def sessions(self, overviews: Iterable[tuple[str, datetime, Session | str]], current: str) -> None: ...
    def resumed(self, session: Session) -> None: ...
    def copy(self, text: str) -> bool: ...  # through the terminal; False where there is none
