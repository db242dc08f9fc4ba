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

    def loading(self, what: str) -> AbstractContextManager[Observer]:
        """Show that a model is being loaded."""

    def answering(self, *, thinking: bool, markdown: bool) -> AbstractContextManager[Callable[[Iterable[Piece]], None]]:
        """Show a response as it streams in, without echoing keys."""

    def turn(self, summary: Summary, context_length: int, *, answered: bool) -> None:
        """Show a response's statistics."""

    def dropped(self, turns: Sequence[Turn], tokens: int) -> None:
        """Say which turns the model no longer sees, and how many tokens that saves."""

    def note(self, message: str) -> None:
        """Show a status line, unless only responses are wanted."""

    def say(self, message: str) -> None:
        """Say what a command did."""

    def block(self, text: str) -> None:
        """Show text verbatim."""

    def message(self, text: str) -> None:
        """Show a message that was not typed at the prompt as if it had been."""

    def error(self, error: Exception) -> None:
        """Show an error with the next step; for a bug in exl, how to report it."""

    def traceback(self, error: BaseException) -> None:
        """Show where an error came from."""

    def commands(self, commands: Iterable[Command]) -> None:
        """List commands."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """List settings and their values."""

    def changes(self, changed: Mapping[str, tuple[Any, Any]], unchanged: str) -> None:
        """Show old and new values of settings; if there are none, say that `unchanged` is as before."""

    def model(self, model: ChatModel) -> None:
        """Describe the model in use."""

    def stats(self, session: Session, gpus: Sequence[GpuReading], host: HostReading) -> None:
        """Show a conversation's totals and the memory in use."""

    def sessions(self, overviews: Iterable[tuple[str, datetime, Session | str]], current: str) -> None:
        """List the saved sessions; see `SessionStore.overviews`."""

    def resumed(self, session: Session) -> None:
        """Say which saved conversation is resumed."""

    def copy(self, text: str) -> bool:
        """Copy a text through the terminal; returns whether there is one."""
