"""The chat as a state machine: events in, a conversation and what is seen of it out.

READY --a message--> ANSWERING --its end, Ctrl-C or an error--> READY
READY --a command--> READY; OVER with /quit
READY --Ctrl-C, and again--> OVER
READY --the end of input--> OVER
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

from exl_cli.chat import commands
from exl_cli.chat.conversation import Conversation
from exl_cli.chat.lines import unquote
from exl_cli.chat.partner import Host, Partner
from exl_cli.chat.session import Session
from exl_cli.chat.settings import Settings, from_dict
from exl_cli.chat.store import SessionStore
from exl_cli.chat.view import ChatView
from exl_cli.errors import DiskError, ExitCode, ExlError


class Phase(Enum):
    """Where the chat stands."""

    READY = auto()
    ANSWERING = auto()
    OVER = auto()


class Signal(Enum):
    """What comes from a keyboard besides lines."""

    INTERRUPT = auto()
    END = auto()


@dataclass(frozen=True)
class Line:
    """What the user entered: a message or a command, of one line or several."""

    text: str


Event = Line | Signal


class Source(Protocol):
    """Where events come from."""

    def read(self, draft: str) -> Event:
        """The next one.

        Args:
            draft: what the user may want to send again, changed.

        Raises:
            ExlError: what came cannot be read; the next call goes on behind it.
        """
        ...


class Chat:
    """One conversation at a time with one model at a time.

    Args:
        host: finds and loads models.
        partner: the model to begin with.
        session: the conversation to go on with.
        settings: what is set at the beginning.
        view: what is seen.
        store: the saved sessions.
        saving: write this conversation to the store.
        interactive: a person is there, who can answer to a hint; else the first error decides `exit_code`.
        debug: show where errors come from.

    Attributes:
        host, view, store, saving: these.
        talk: the conversation.
        exit_code: what the command returns once this is over.
        exported: files that this chat has written, and may write again.
    """

    def __init__(
        self,
        host: Host,
        partner: Partner,
        session: Session,
        settings: Settings,
        view: ChatView,
        store: SessionStore,
        *,
        saving: bool = True,
        interactive: bool = True,
        debug: bool = False,
    ) -> None:
        self.host = host
        self.view = view
        self.store = store
        self.saving = saving
        self.talk = Conversation(partner, session, settings, view, self.save)
        self.talk.withdraw()
        self.exit_code = ExitCode.OK
        self._debug = debug
        self.exported: set[str] = set()
        self._interactive = interactive
        self._warned = self._warned_before = ""
        self._named_by_us = ""
        self._over = False

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        if self._over:
            return Phase.OVER
        return Phase.ANSWERING if self.talk.answering else Phase.READY

    # --- events ---------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Take one event, to the end of all that follows from it. Nothing that fails there ends the conversation."""
        self._warned_before, self._warned = self._warned, ""
        if event is Signal.INTERRUPT:
            self._interrupted()
        elif event is Signal.END:
            self.leave()
        elif isinstance(event, Line) and event.text.strip():
            self.talk.draft = ""
            try:
                self._enter(event.text)
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except Exception as error:
                self.failed(error)

    def failed(self, error: Exception) -> None:
        """Say that something went wrong; a bug of ours too is no reason to lose a conversation."""
        if self._debug:
            self.view.traceback(error)
        elif isinstance(error, ExlError):
            self.view.error(error)
        else:
            self.view.bug(error)
        if not self._interactive or self._over:
            self.exit_code = self.exit_code or (error.exit_code if isinstance(error, ExlError) else ExitCode.INTERNAL)

    def leave(self) -> None:
        """End it; where the conversation cannot be saved, only if a person insists or none is there."""
        saved, session = self.save(), self.talk.session
        if not saved and self._interactive and self._warned_before != "unsaved":
            self._warned = "unsaved"
            self.view.note("not saved yet: /export PATH writes it elsewhere, leaving once more gives it up")
            return
        if not saved:
            self.exit_code = self.exit_code or ExitCode.DISK
        elif self.saving and session.turns:
            self.view.note(f"saved as {session.name}; exl chat --continue goes on with it")
        self._over = True

    def _interrupted(self) -> None:
        if not self._interactive:
            self.save()
            self._over, self.exit_code = True, ExitCode.INTERRUPTED
        elif self._warned_before:
            self.leave()
        else:
            self._warned = "interrupt"
            self.view.note("Ctrl-C again leaves, as Ctrl-D does; while an answer comes, Ctrl-C stops it")

    def _enter(self, text: str) -> None:
        if commands.is_command(text):
            commands.run(self, text)
        else:
            self.talk.send(unquote(text))

    # --- sessions -------------------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Save the conversation, if it is to be saved; whether nothing is lost without it now. A failure is said."""
        try:
            self.save_or_fail()
        except DiskError as error:
            self.view.error(error)
            return False
        return True

    def save_or_fail(self) -> None:
        """Save the conversation, if it is to be saved.

        Raises:
            DiskError: it cannot be written.
        """
        session, model = self.talk.session, self.talk.partner.model
        if self.saving and not session.turns and session.name and session.name == self._named_by_us:
            # All of it was taken back: it is as if it had not begun, and what it begins with next names it.
            self.store.remove(session.name)
            session.name = self._named_by_us = ""
        if not self.saving or not (session.turns or (session.name and self.store.exists(session.name))):
            return
        unnamed = not session.name
        session.model = model.name
        session.settings = self.talk.settings.to_dict(model.info.generation_config)
        if before := self.store.save(session):
            self.view.note(f"{before} was changed by another exl: this conversation goes on as {session.name}")
        if unnamed:
            self._named_by_us = session.name

    def rename(self, name: str) -> None:
        """Save the conversation under another name; a name that it had only been given by itself is given up.

        Raises:
            DiskError: it cannot be written.
        """
        session = self.talk.session
        before, session.name = session.name, name
        saving, self.saving = self.saving, True
        try:
            self.save_or_fail()
        except DiskError:
            session.name, self.saving = before, saving
            raise
        if before and before == self._named_by_us:
            self.store.remove(before)

    def adopt(self, session: Session) -> None:
        """Go on with another conversation, saving the one so far.

        Raises:
            DiskError: that cannot be saved; nothing changes then.
        """
        self.save_or_fail()
        self.talk.session = session
        if session.settings:
            self.talk.settings = from_dict(session.settings)
        self.talk.withdraw()

    # --- settings and models --------------------------------------------------------------------------------------

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The model's own settings."""
        return self.talk.partner.model.info.generation_config

    def change(self, settings: Settings) -> dict[str, tuple[Any, Any]]:
        """Change settings; returns those that are other than before, old and new, by name."""
        old, new = (one.values(self.generation_config) for one in (self.talk.settings, settings))
        self.talk.settings = settings
        return {name: (old[name], new[name]) for name in new if old[name] != new[name]}

    def switch(self, name: str) -> None:
        """Go on with another model.

        Raises:
            ExlError: it cannot be had; the old one stays, loaded anew where that was needed.
        """
        old, model = self.talk.partner, self.host.find(name)
        old.engine.close()
        try:
            self.talk.partner = self.host.load(model)
        except BaseException as error:
            self.view.note(f"going back to {old.model.info.name}")
            try:
                self.talk.partner = self.host.load(old.model)
            except BaseException:
                # Without a model there is nothing to go on with.
                self.save()
                self._over = True
                raise error from None
            raise


def converse(chat: Chat, source: Source) -> None:
    """Feed a chat until it is over. A Ctrl-C that nobody else takes counts as one at the prompt."""
    while chat.phase is not Phase.OVER:
        try:
            chat.feed(source.read(chat.talk.draft))
        except ExlError as error:
            chat.failed(error)
        except KeyboardInterrupt:
            chat.feed(Signal.INTERRUPT)
