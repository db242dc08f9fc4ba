"""Saying something and getting an answer, in all the ways there are: anew, once more, otherwise, going on.

Whatever happens, nothing that was said is lost. The session is saved before and after each answer, an answer that is
interrupted keeps what came, and a message that got no answer at all comes back as the draft of the next one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from exl_cli.api import records
from exl_cli.chat.composer import Encoded
from exl_cli.chat.partner import Partner
from exl_cli.chat.prompting import compose
from exl_cli.chat.session import Session, Turn
from exl_cli.chat.settings import Settings
from exl_cli.chat.tools import Attachment, with_attachments
from exl_cli.chat.view import ChatView
from exl_cli.engines.base import Request, Summary
from exl_cli.errors import PromptError, UsageError
from exl_cli.structured.reasoning import Splitter, split
from exl_cli.system.interrupts import cancel_on_interrupt


class Conversation:
    """A session and the model that it is with.

    Args:
        partner: the model.
        session: the turns so far.
        settings: what is set.
        view: what is seen.
        save: saves the session; called before and after whatever changes it.

    Attributes:
        partner, session, settings: these, to be exchanged at any time between answers.
        draft: what the user may want to send again, changed; empty for nothing.
        attachments: files that go with the next message.
        answering: whether an answer is being made.
    """

    def __init__(
        self, partner: Partner, session: Session, settings: Settings, view: ChatView, save: Callable[[], object]
    ) -> None:
        self.partner = partner
        self.session = session
        self.settings = settings
        self.draft = ""
        self.attachments: list[Attachment] = []
        self.answering = False
        self._view = view
        self._save = save
        self._redoing = False

    def send(self, text: str) -> None:
        """Say something and get an answer.

        Raises:
            PromptError: there is no room for it, or the model's template refuses; it is not said then.
            ExlError: the engine failed; what came until then is kept.
        """
        if not text.strip():
            raise PromptError("the message is empty", "write something")
        attachments, self.attachments = self.attachments, []
        self.session.turns.append(Turn("user", with_attachments(attachments, text)))
        try:
            self._answer()
        finally:
            if self.withdraw(text):
                self.attachments = attachments
            if not self._redoing:
                self._save()

    def retry(self) -> None:
        """Answer the last message once more; the old answer stays where no new one comes.

        Raises:
            UsageError: nothing was said yet. And as `send`.
        """
        self._redo(self._last_message() + 1, self._answer)

    def revise(self, text: str) -> None:
        """Say something else instead of the last message; the old exchange stays where that gets no answer.

        Raises:
            UsageError: nothing was said yet. And as `send`.
        """
        self._redo(self._last_message(), lambda: self.send(text))

    def resume(self) -> None:
        """Let a cut-off answer go on.

        Raises:
            UsageError: there is none.
            PromptError: the context has no room left. And as `send`.
        """
        turn = self.last_answer()
        if turn.finish_reason == "stop":
            raise UsageError("the last answer came to its own end", "/retry makes another")
        try:
            self._answer(turn)
        finally:
            self._save()

    def undo(self) -> str:
        """Take back the last message and its answer; returns the message.

        Raises:
            UsageError: nothing was said yet.
        """
        message = self.session.cut(self._last_message())[0].content
        self._save()
        return message

    def last_answer(self) -> Turn:
        """The last answer.

        Raises:
            UsageError: there is none.
        """
        if self.session.last is None:
            raise UsageError("there is no answer yet", "say something first")
        return self.session.last

    def last_message(self) -> str:
        """The last message.

        Raises:
            UsageError: there is none.
        """
        return self.session.turns[self._last_message()].content

    def withdraw(self, draft: str | None = None) -> bool:
        """Take back a last message without an answer, if there is one; it, or `draft`, is the draft of the next."""
        last = self.session.last
        if last is None or last.role != "user":
            return False
        self.session.cut(len(self.session.turns) - 1)
        self.draft = last.content if draft is None else draft
        return True

    def _last_message(self) -> int:
        index = self.session.last_user()
        if index is None:
            raise UsageError("nothing was said yet", "say something first")
        return index

    def _redo(self, count: int, action: Callable[[], None]) -> None:
        """Do something from the first `count` turns on; put the others back if it adds none."""
        dropped, old = self.session.dropped, self.session.cut(count)
        self._redoing = True
        try:
            action()
        finally:
            self._redoing = False
            if len(self.session.turns) <= count:
                self.session.turns += old
                self.session.dropped = dropped
            self._save()

    def _answer(self, unfinished: Turn | None = None) -> None:
        """Get an answer to the last message, or more of the unfinished one, and keep it, whatever happens."""
        prompt = compose(self.session, self.partner, self.settings, unfinished)
        if prompt.dropped:
            self._view.dropped(prompt.dropped, prompt.freed)
        if not self._redoing:  # the file still holds what is to be replaced
            self._save()
        turn = unfinished or Turn("assistant", "")
        self.answering = True
        try:
            summary = self._generate(prompt.encoded, turn)
        finally:
            self.answering = False
        self._view.turn(summary, self.partner.engine.context_length, answered=self.session.last is turn)

    def _generate(self, prompt: Encoded, turn: Turn) -> Summary:
        before = turn.generated
        opening = prompt.text[: len(prompt.text) - len(before)]
        text, ids, summary = "", list[int](), None
        tags = self.partner.composer.tag_ids
        splitter = Splitter(opening)
        splitter.push(before)
        request = self._request(prompt)
        answering = self._view.answering(thinking=self.settings.thinking, markdown=self.settings.markdown)
        try:
            with cancel_on_interrupt(request.cancel), answering as show:
                for chunk in self.partner.engine.stream(request):
                    piece = chunk.text + "".join(tags.get(id_, "") for id_ in chunk.token_ids)
                    text += piece
                    ids += chunk.token_ids
                    summary = chunk.summary or summary
                    show(splitter.push(piece))
                show(splitter.flush())
        finally:
            self.partner.composer.computed(prompt, ids, text)
            self._keep(turn, before + text, opening, summary)
        if summary is None:
            raise RuntimeError("the engine ended without a summary")
        return summary

    def _request(self, prompt: Encoded) -> Request:
        model, settings = self.partner.model, self.settings
        seed = secrets.randbits(31) if settings.seed is None else settings.seed + self.session.totals.answers
        return Request(
            ids=prompt.ids,
            sampling=settings.sampling(model.info.generation_config),
            max_new_tokens=settings.max_new_tokens,
            seed=seed,
            stop_strings=(*model.format.stops, *settings.stop),
            stop_ids=model.tokenizer.eos_ids,
        )

    def _keep(self, turn: Turn, text: str, opening: str, summary: Summary | None) -> None:
        """Put what came into the session. An answer of nothing counts only if the model meant it so."""
        if summary is not None:
            self.session.totals.add(summary)
        if not text and (summary is None or summary.finish_reason != "stop"):
            return
        turn.reasoning, turn.content = split(text, opening)
        turn.raw = "" if turn.content == text else text
        turn.model = self.partner.model.info.name
        turn.finish_reason = "cancelled" if summary is None else summary.finish_reason
        numbers = {} if summary is None else records.summarized(summary)
        turn.timings = {name: value for name, value in numbers.items() if not isinstance(value, str)}
        if self.session.last is not turn:
            self.session.turns.append(turn)
