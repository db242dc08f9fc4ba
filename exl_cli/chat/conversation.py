"""A conversation with a model: lines in, answers out, everything saved.

Nothing is lost: the session is saved before and after each answer, an interrupted answer keeps the text generated so
far, and a message that got no answer becomes the draft of the next.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl_cli.api import records
from exl_cli.chat import commands
from exl_cli.chat.model import ChatModel, ModelLoader
from exl_cli.chat.prompt_encoder import Encoded
from exl_cli.chat.session import Session, SessionStore, Turn
from exl_cli.chat.settings import Settings, from_dict
from exl_cli.chat.view import ChatView
from exl_cli.engines.base import Request, Summary
from exl_cli.errors import DiskError, ExitCode, ExlError, PromptError, UsageError, param
from exl_cli.structured.reasoning import Splitter, split
from exl_cli.system.interrupts import cancel_on_interrupt

# Reads the next message or command, possibly of several lines; None at the end of input. Its argument is the draft to
# start from. Raises KeyboardInterrupt on Ctrl-C, and ExlError for unusable input, which the next call skips.
ReadLine = Callable[[str], str | None]

# An answer is started only if the context has at least this many tokens left for it.
LEAST_ROOM = 16


@dataclass(eq=False)
class Conversation:
    """A session with its model and settings, driven by input lines.

    Its methods raise ExlError: UsageError if there is no message yet, PromptError if the context is full or the chat
    template rejects the conversation, DiskError if the session cannot be saved, and the engine's errors. Text generated
    before the error is kept; otherwise nothing changes. `enter` shows these errors.

    Attributes:
        session: the turns so far; a last message without an answer becomes the draft.
        saving: keep this session in `store`.
        interactive: a person is at the prompt and can react to errors; otherwise the first error sets `exit_code`.
        debug: show tracebacks.
        draft: a message to offer for editing and sending; empty for none.
        attachments: (name, text) of files that go with the next message.
        exported: files that this conversation has been exported to; only these may be overwritten.
        over: whether the conversation has ended.
        exit_code: exit code of the command.
    """

    model: ChatModel
    session: Session
    settings: Settings
    loader: ModelLoader
    view: ChatView
    store: SessionStore
    saving: bool = True
    interactive: bool = True
    debug: bool = False
    draft: str = ""
    attachments: list[tuple[str, str]] = field(default_factory=list)
    exported: set[Path] = field(default_factory=set)
    over: bool = False
    exit_code: ExitCode = ExitCode.OK

    def __post_init__(self) -> None:
        # The warning that this input and the one before led to, "interrupt" or "unsaved": leaving takes two in a row.
        self._warned = self._warned_before = ""
        self._redoing = False
        self._generated_name = ""  # the session's name if the user did not choose it
        self._save_error = ""  # of the last attempt to save
        self._withdraw()

    # --- lines --------------------------------------------------------------------------------------------------------

    def run(self, read: ReadLine) -> None:
        """Read and handle lines until the conversation ends. A Ctrl-C not handled elsewhere counts as one at the
        prompt."""
        while not self.over:
            try:
                self.enter(read(self.draft))
            except ExlError as error:
                self._failed(error)
            except KeyboardInterrupt:
                self.interrupt()

    def enter(self, line: str | None) -> None:
        """Handle a line, or None at the end of input. Errors are shown and do not end the conversation."""
        self._warned_before, self._warned = self._warned, ""
        if line is None:
            self.leave()
        elif line.strip():
            self.draft = ""
            try:
                if commands.is_command(line):
                    commands.run(self, line)
                else:
                    self.send(commands.unquote(line))
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except Exception as error:
                self._failed(error)

    def interrupt(self) -> None:
        """Handle Ctrl-C at the prompt: an interactive user has to press it twice to leave."""
        self._warned_before, self._warned = self._warned, ""
        if not self.interactive:
            self.save()
            self.over, self.exit_code = True, ExitCode.INTERRUPTED
        elif self._warned_before:
            self.leave()
        else:
            self._warned = "interrupt"
            self.view.note("press Ctrl-C again or Ctrl-D to exit")

    def leave(self) -> None:
        """Save and end the conversation. If saving fails, an interactive user has to ask a second time."""
        saved, session = self.save(), self.session
        if not saved and self.interactive and self._warned_before != "unsaved":
            self._warned = "unsaved"
            self.view.note("not saved: /export PATH writes it elsewhere; exit again to discard it")
            return
        if not saved:
            self.view.note("not saved")
            self.exit_code = self.exit_code or ExitCode.DISK
        elif self.saving and session.turns:
            self.view.note(f"saved; resume with exl chat {param('session')} {session.name}")
        self.over = True

    def _failed(self, error: Exception) -> None:
        """Show an error. Even a bug in exl must not end the conversation."""
        (self.view.traceback if self.debug else self.view.error)(error)
        if not self.interactive or self.over:
            self.exit_code = self.exit_code or (error.exit_code if isinstance(error, ExlError) else ExitCode.INTERNAL)

    # --- saying and answering -----------------------------------------------------------------------------------------

    def send(self, text: str) -> None:
        if not text.strip():
            raise PromptError("the message is empty", "type some text")
        attachments, self.attachments = self.attachments, []
        message = "\n\n".join([*(file for _, file in attachments), text])
        self.say_spelled("message", self.model.tokenizer.hidden(self.model.tokenizer.as_text(message)))
        self.session.turns.append(Turn("user", message))
        try:
            self._answer()
        finally:
            if self._withdraw(text):
                self.attachments = attachments
            if not self._redoing:
                self.save()

    def say_spelled(self, where: str, names: list[str]) -> None:
        """Note that special tokens spelled out in a message are read as text."""
        if names:
            self.view.note(f"{', '.join(names)} in the {where} is treated as text, not as a special token")

    def retry(self) -> None:
        """Answer the last message again; the old answer stays unless there is a new one."""
        self._redo(self.session.last_user() + 1, self._answer)

    def revise(self, text: str) -> None:
        """Replace the last message; the old exchange stays unless the new one gets an answer."""
        self._redo(self.session.last_user(), lambda: self.send(text))

    def resume(self) -> None:
        """Continue an answer that was cut off."""
        turn = self.last_answer()
        if turn.finish_reason == "stop":
            raise UsageError("the last response is complete", "/retry regenerates it")
        try:
            self._answer(turn)
        finally:
            self.save()

    def undo(self) -> str:
        """Remove the last exchange and return its message."""
        message = self.session.cut(self.session.last_user())[0].content
        self.save()
        return message

    def attach(self, name: str, text: str) -> int:
        """Attach a file to the next message; returns its number of tokens."""
        context = self.model.engine.context_length
        size = self.model.tokenizer.least_tokens(text)
        size = size if size > context else self.model.encoder.count(text)
        if size > context - LEAST_ROOM:
            raise PromptError(
                f"{name} has {size:,} tokens, but the context holds {context:,}, including the response",
                f"attach part of it{_or_restart(self.model)}",
            )
        self.attachments.append((name, text))
        return size

    def last_answer(self) -> Turn:
        if self.session.last is None:
            raise UsageError("no response yet", "send a message first")
        return self.session.last

    def _withdraw(self, draft: str | None = None) -> bool:
        """Remove a last message without an answer; it, or `draft`, becomes the draft. Returns whether there was one."""
        last = self.session.last
        if last is None or last.role != "user":
            return False
        self.session.cut(len(self.session.turns) - 1)
        self.draft = last.content if draft is None else draft
        return True

    def _redo(self, count: int, action: Callable[[], None]) -> None:
        """Run an action with only the first `count` turns in the session; restore the others if it adds no turn."""
        dropped, old = self.session.dropped, self.session.cut(count)
        self._redoing = True
        try:
            action()
        finally:
            self._redoing = False
            if len(self.session.turns) <= count:
                self.session.turns += old
                self.session.dropped = dropped
            self.save()

    def _answer(self, unfinished: Turn | None = None) -> None:
        """Answer the last message, or continue an unfinished answer. Generated text is kept even on an error."""
        prompt = self._prompt(unfinished)
        if not self._redoing:  # the file still holds the turns to be replaced
            self.save()
        turn = unfinished or Turn("assistant", "")
        summary = self._generate(prompt, turn)
        self.view.turn(summary, self.model.engine.context_length, answered=self.session.last is turn)

    def _generate(self, prompt: Encoded, turn: Turn) -> Summary:
        """Generate into a turn, and show it.

        The reasoning splitter sees the prompt without the part of the answer that exists, which may open a reasoning
        block, then that part, then the new text. Tags that are special tokens are added back to the text.
        """
        before = turn.generated
        opening = prompt.text.removesuffix(before)
        text, ids, summary = "", list[int](), None
        tags = self.model.encoder.tag_ids
        splitter = Splitter(opening)
        splitter.push(before)
        request = self._request(prompt)
        answering = self.view.answering(thinking=self.settings.thinking, markdown=self.settings.markdown)
        try:
            stream = self.model.engine.stream(request)
            with cancel_on_interrupt(stream.cancel), answering as show:
                for chunk in stream:
                    piece = chunk.text + "".join(tags.get(id_, "") for id_ in chunk.token_ids)
                    text += piece
                    ids += chunk.token_ids
                    summary = chunk.summary or summary
                    show(splitter.push(piece))
                show(splitter.flush())
        finally:
            self.model.encoder.computed(prompt, ids, text)
            self._keep(turn, before + text, opening, summary)
        if summary is None:
            raise RuntimeError("the engine ended without a summary")
        return summary

    def _request(self, prompt: Encoded) -> Request:
        settings = self.settings
        return Request(
            ids=prompt.ids,
            sampling=settings.sampling(self.model.info.generation_config),
            max_new_tokens=settings.max_new_tokens,
            seed=secrets.randbits(31) if settings.seed is None else settings.seed + self.session.totals.answers,
            stop_strings=(*self.model.format.stops, *settings.stop),
            stop_ids=self.model.tokenizer.eos_ids,
        )

    def _keep(self, turn: Turn, text: str, opening: str, summary: Summary | None) -> None:
        """Store generated text in the session. An empty answer is kept only if the model ended it."""
        if summary is not None:
            self.session.totals.add(summary)
        if not text and (summary is None or summary.finish_reason != "stop"):
            return
        turn.reasoning, turn.content = split(text, opening)
        turn.raw = "" if turn.content == text else text
        turn.model = self.model.info.name
        turn.finish_reason = "cancelled" if summary is None else summary.finish_reason
        numbers = {} if summary is None else records.summarized(summary)
        turn.timings = {name: value for name, value in numbers.items() if not isinstance(value, str)}
        if self.session.last is not turn:
            self.session.turns.append(turn)

    # --- the prompt, and room for the answer --------------------------------------------------------------------------

    def _prompt(self, unfinished: Turn | None) -> Encoded:
        """Encode the prompt for an answer to the last message, or for the rest of an unfinished answer.

        A quarter of the context, or `max_new_tokens` if less, is reserved for the answer. When the prompt outgrows the
        rest, the oldest exchanges are dropped until it takes at most three quarters of that; the system message stays.
        """
        session, settings, context = self.session, self.settings, self.model.engine.context_length
        encoded: dict[int, Encoded] = {}

        def size(start: int) -> int:
            """Tokens of the prompt if it begins with this turn."""
            if start not in encoded:
                text = self.model.render(session.messages(start, None if unfinished is None else -1))
                least = self.model.tokenizer.least_tokens(text)
                if least > context:  # will be dropped or rejected: do not tokenize it
                    return least
                encoded[start] = self.model.encoder.encode(text if unfinished is None else text + unfinished.generated)
            return len(encoded[start].ids)

        before, last = size(session.dropped), session.last_user()
        if before > context - LEAST_ROOM:
            if size(last) > context - LEAST_ROOM:
                raise _too_large(size(last), self.model, unfinished)
            if settings.on_overflow == "stop":
                raise PromptError(
                    f"with this message, the conversation has {before:,} tokens, but the context holds {context:,}, "
                    "including the response",
                    "make room with /undo or /clear, or drop the oldest turns with /set on_overflow trim",
                )
        if settings.on_overflow == "trim":
            limit = context - min(settings.max_new_tokens, context // 4)
            if dropped := session.trim(size, limit, limit * 3 // 4):
                self.view.dropped(dropped, before - size(session.dropped))
        return encoded[session.dropped]

    # --- saving, and switching session, model and settings ------------------------------------------------------------

    def save(self) -> bool:
        """Save the session if saving is on. Returns False if that failed; shows the same error in a row only once."""
        try:
            self.save_or_fail()
        except DiskError as error:
            if str(error) != self._save_error:
                self.view.error(error)
            self._save_error = str(error)
            return False
        self._save_error = ""
        return True

    def save_or_fail(self) -> None:
        """Save the session if saving is on. Raises DiskError."""
        session = self.session
        if self.saving and not session.turns and session.name and session.name == self._generated_name:
            # All turns were undone: the next message gives it a new name.
            self.store.remove(session.name)
            session.name = self._generated_name = ""
        if not self.saving or not (session.turns or (session.name and self.store.exists(session.name))):
            return
        unnamed = not session.name
        session.model = self.model.name
        session.settings = self.settings.to_dict(self.model.info.generation_config)
        if before := self.store.save(session):
            self.view.note(
                f"{before} was changed by another exl process; this conversation continues as {session.name}"
            )
        if unnamed:
            self._generated_name = session.name

    def rename(self, name: str) -> None:
        """Save under another name, and remove the old file if its name was generated."""
        before, saving = self.session.name, self.saving
        self.session.name, self.saving = name, True
        try:
            self.save_or_fail()
        except DiskError:
            self.session.name, self.saving = before, saving
            raise
        if before and before == self._generated_name:
            self.store.remove(before)

    def adopt(self, session: Session) -> None:
        """Save this session and continue another."""
        self.save_or_fail()
        self.session = session
        if session.settings:
            self.settings = from_dict(session.settings)
        self._withdraw()

    def switch(self, name: str) -> None:
        """Switch to another model; if it cannot be loaded, load the old one again."""
        old, new = self.model, self.loader.find(name)
        old.engine.close()
        try:
            self.loader.load(new)
        except BaseException as error:
            self.view.note(f"going back to {old.info.name}")
            try:
                self.loader.load(old)
            except BaseException:
                # Without a model the chat cannot continue.
                self.save()
                self.over = True
                raise error from None
            raise
        self.model = new

    def values(self) -> dict[str, Any]:
        return self.settings.values(self.model.info.generation_config)

    def change(self, settings: Settings) -> dict[str, tuple[Any, Any]]:
        """Change the settings; returns (old, new) of each value that differs, by name."""
        old, new = self.values(), settings.values(self.model.info.generation_config)
        self.settings = settings
        return {name: (old[name], new[name]) for name in new if old[name] != new[name]}


def _or_restart(model: ChatModel) -> str:
    """The end of a hint: how to get a longer context, if the model supports one."""
    most = model.info.extended_length
    longer = f", or restart with a larger {param('max_seq_len')}, up to {most:,}"
    return longer if model.engine.context_length < most else ""


def _too_large(size: int, model: ChatModel, unfinished: Turn | None) -> PromptError:
    context = model.engine.context_length
    if unfinished is not None:
        return PromptError(
            f"the message and its response so far have {size:,} tokens, but the context holds {context:,}",
            "the response cannot be continued",
        )
    return PromptError(
        f"the message makes a prompt of {size:,} tokens, but the context holds {context:,}, including the response",
        f"shorten it{_or_restart(model)}",
    )
