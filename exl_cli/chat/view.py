"""The interface of what shows a chat."""

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
    """Where a chat shows answers, notes, numbers and the progress of loading."""

    def loading(self, what: str) -> AbstractContextManager[Observer]:
        """Show that a model is being loaded."""

    def answering(self, *, thinking: bool, markdown: bool) -> AbstractContextManager[Callable[[Iterable[Piece]], None]]:
        """Show an answer piece by piece; keys pressed meanwhile stay unseen."""

    def turn(self, summary: Summary, context_length: int, *, answered: bool) -> None:
        """Show the numbers of an answer."""

    def dropped(self, turns: Sequence[Turn], tokens: int) -> None:
        """Say which turns the model no longer sees, and by how many tokens the prompt is shorter for it."""

    def note(self, message: str) -> None:
        """Show a line on progress, unless only answers are wanted."""

    def say(self, message: str) -> None:
        """Say what a command did."""

    def block(self, text: str) -> None:
        """Show a text as it is."""

    def message(self, text: str) -> None:
        """Show a message that was not typed here, as if it had been."""

    def error(self, error: Exception) -> None:
        """Show an error and the next step; of one that should not happen, how to report it."""

    def traceback(self, error: BaseException) -> None:
        """Show where an error came from."""

    def commands(self, commands: Iterable[Command]) -> None:
        """List commands."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """List settings and their values."""

    def changes(self, changed: Mapping[str, tuple[Any, Any]], unchanged: str) -> None:
        """Show old and new values of settings; `unchanged` names the setting where none changed."""

    def model(self, model: ChatModel) -> None:
        """Describe the model in use."""

    def stats(self, session: Session, gpus: Sequence[GpuReading], host: HostReading) -> None:
        """Show the totals of a conversation, and the memory in use."""

    def sessions(self, overviews: Iterable[tuple[str, datetime, Session | str]], current: str) -> None:
        """List the saved sessions; see `SessionStore.overviews`."""

    def resumed(self, session: Session) -> None:
        """Say where a saved conversation stands."""

    def copy(self, text: str) -> bool:
        """Put a text into the terminal's clipboard; returns whether there is such a terminal."""
