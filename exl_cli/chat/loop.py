"""The chat's loop: lines go in, the conversation goes on, and whatever fails leaves it intact.

A line is a message or a command. /quit and the end of input leave; so does a second Ctrl-C in a row at the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exl_cli.chat import commands
from exl_cli.chat.conversation import Conversation
from exl_cli.chat.model import ModelLoader
from exl_cli.chat.view import ChatView
from exl_cli.errors import ExitCode, ExlError, param

# Given the draft (what the user may want to send again, changed), the next message or command, of one line or several;
# None at the end of input. KeyboardInterrupt is Ctrl-C; after an ExlError the next call goes on behind what it refused.
ReadLine = Callable[[str], str | None]


class Chat:
    """One conversation at a time with one model at a time.

    Args:
        conversation: the one to begin with.
        loader: finds and loads models.
        view: shows everything.
        interactive: a person is there, who can act on a hint; else the first error decides `exit_code`.
        debug: show tracebacks.

    Attributes:
        conversation, loader, view: these.
        over: whether it has ended.
        exit_code: what the command returns once it has.
        exported: files that this chat has written, and may write again.
    """

    def __init__(
        self,
        conversation: Conversation,
        loader: ModelLoader,
        view: ChatView,
        *,
        interactive: bool = True,
        debug: bool = False,
    ) -> None:
        self.conversation = conversation
        self.loader = loader
        self.view = view
        self.over = False
        self.exit_code = ExitCode.OK
        self.exported: set[Path] = set()
        self._interactive = interactive
        self._debug = debug
        self._warned = self._warned_before = ""

    def run(self, read: ReadLine) -> None:
        """Read lines until it is over. A Ctrl-C that nothing else takes counts as one at the prompt."""
        while not self.over:
            try:
                self.enter(read(self.conversation.draft))
            except ExlError as error:
                self._failed(error)
            except KeyboardInterrupt:
                self.interrupt()

    def enter(self, line: str | None) -> None:
        """Do all that follows from a line, or from the end of input. Nothing that fails there ends the conversation."""
        self._warned_before, self._warned = self._warned, ""
        if line is None:
            self.leave()
        elif line.strip():
            self.conversation.draft = ""
            try:
                if commands.is_command(line):
                    commands.run(self, line)
                else:
                    self.conversation.send(commands.unquote(line))
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except Exception as error:
                self._failed(error)

    def interrupt(self) -> None:
        """Take a Ctrl-C at the prompt: a person has to press it twice to leave."""
        self._warned_before, self._warned = self._warned, ""
        if not self._interactive:
            self.conversation.save()
            self.over, self.exit_code = True, ExitCode.INTERRUPTED
        elif self._warned_before:
            self.leave()
        else:
            self._warned = "interrupt"
            self.view.note("Ctrl-C again leaves, as Ctrl-D does; while an answer comes, Ctrl-C stops it")

    def leave(self) -> None:
        """End it; where the conversation cannot be saved, only if a person insists or none is there."""
        saved, session = self.conversation.save(), self.conversation.session
        if not saved and self._interactive and self._warned_before != "unsaved":
            self._warned = "unsaved"
            self.view.note("not saved yet: /export PATH writes it elsewhere, leaving once more gives it up")
            return
        if not saved:
            self.exit_code = self.exit_code or ExitCode.DISK
        elif self.conversation.saving and session.turns:
            self.view.note(f"saved as {session.name}; exl chat {param('continue')} goes on with it")
        self.over = True

    def switch(self, name: str) -> None:
        """Go on with another model.

        Raises:
            ExlError: it cannot be loaded; the old one stays, loaded again.
        """
        old, new = self.conversation.model, self.loader.find(name)
        old.engine.close()
        try:
            self.loader.load(new)
        except BaseException as error:
            self.view.note(f"going back to {old.info.name}")
            try:
                self.loader.load(old)
            except BaseException:
                # Without a model there is nothing to go on with.
                self.conversation.save()
                self.over = True
                raise error from None
            raise
        self.conversation.model = new

    def _failed(self, error: Exception) -> None:
        """Say that something went wrong; a bug of ours too is no reason to lose a conversation."""
        if self._debug:
            self.view.traceback(error)
        elif isinstance(error, ExlError):
            self.view.error(error)
        else:
            self.view.bug(error)
        if not self._interactive or self.over:
            self.exit_code = self.exit_code or (error.exit_code if isinstance(error, ExlError) else ExitCode.INTERNAL)
