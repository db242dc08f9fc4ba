"""The prompt for the next answer, and what must go where the context has no room for all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from exl_cli.chat.composer import Encoded
from exl_cli.chat.partner import Partner
from exl_cli.chat.session import Session, Turn
from exl_cli.chat.settings import Settings
from exl_cli.errors import PromptError

# An answer is not begun with less room than this, in tokens.
LEAST_ROOM = 16


@dataclass(frozen=True)
class Prompt:
    """What the engine is given.

    Attributes:
        encoded: its text and ids.
        dropped: the turns that the model no longer sees, to make room.
        freed: tokens that the prompt is shorter by for it.
    """

    encoded: Encoded
    dropped: list[Turn] = field(default_factory=list)
    freed: int = 0


def render(session: Session, partner: Partner, start: int | None = None, unfinished: Turn | None = None) -> str:
    """The prompt's text from a turn on (those not dropped), up to where the answer begins, or has come so far."""
    stop = None if unfinished is None else -1
    text = partner.model.format.render(session.messages(start, stop))
    return text if unfinished is None else text + unfinished.generated


def compose(session: Session, partner: Partner, settings: Settings, unfinished: Turn | None = None) -> Prompt:
    """The prompt for an answer to the last message.

    A quarter of the context, or `max_new_tokens` where that is less, is kept free for the answer. Where the prompt
    grows into it, the oldest exchanges are dropped until it is down to three quarters of its room; the system message
    stays.

    Args:
        session: the conversation; its `dropped` moves on where something is dropped.
        partner: the model.
        settings: how much an answer may have, and what to do where there is no room.
        unfinished: the last answer, if that is to go on.

    Raises:
        PromptError: there is no room for the last message alone, or nothing may be dropped, or the model's template
            refuses the conversation. Nothing has changed then.
    """
    encoded: dict[int, Encoded] = {}

    def size(start: int) -> int:
        if start not in encoded:
            encoded[start] = partner.composer.encode(render(session, partner, start, unfinished))
        return len(encoded[start].ids)

    context, last = partner.engine.context_length, session.last_user() or 0
    before, first = size(session.dropped), session.dropped
    if before > context - LEAST_ROOM:
        if size(last) > context - LEAST_ROOM:
            raise _too_large(size(last), context, unfinished)
        if settings.on_overflow == "stop":
            raise PromptError(
                f"the conversation has {before:,} tokens with this, the context holds {context:,}, the answer included",
                "/undo or /clear makes room, /set on_overflow trim drops the oldest turns",
            )
    dropped: list[Turn] = []
    if settings.on_overflow == "trim":
        limit = context - min(settings.max_new_tokens, context // 4)
        dropped = session.trim(size, limit, limit * 3 // 4)
    after = size(session.dropped) if session.dropped != first else before
    return Prompt(encoded[session.dropped], dropped, before - after)


def _too_large(size: int, context: int, unfinished: Turn | None) -> PromptError:
    if unfinished is not None:
        return PromptError(
            f"the message and its answer so far have {size:,} tokens, the context holds {context:,}",
            "there is no room for the answer to go on",
        )
    return PromptError(
        f"the message makes a prompt of {size:,} tokens, the context holds {context:,}, the answer included",
        "shorten it, or start exl with a larger --max-seq-len if the model allows it",
    )
