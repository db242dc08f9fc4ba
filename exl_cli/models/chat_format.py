"""From turns to text: the model's own chat template, or a plain turn format for a base model that has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from exl_cli.models.chat_template import ChatTemplate, load_chat_template


class Format(Protocol):
    """How a conversation is written for a model.

    Attributes:
        name: in words.
        source: what it is, in full, for people.
        stops: texts that end an answer.
        add_special_tokens: whether the tokenizer adds its own, such as BOS; a chat template writes them itself.
    """

    name: str
    source: str
    stops: tuple[str, ...]
    add_special_tokens: bool

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """The conversation as text; where `answer`, up to the point where the model's answer begins.

        Raises:
            PromptError: the format cannot express it.
        """
        ...


class TemplateFormat:
    """A chat template. See `Format`."""

    stops: tuple[str, ...] = ()
    add_special_tokens = False

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self.name = f"chat template ({template.origin})"
        self.source = template.source

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """See `Format.render`."""
        return self._template.render(messages, add_generation_prompt=answer)


_PLAIN = """\
{system message, and an empty line, where there is one}
User: {message}
Assistant: {answer}
User: {message}
Assistant:
"""


class PlainFormat:
    """A plain turn format, for models without a chat template. See `Format`.

    The system message comes first, then an empty line. Each turn is "User:" or "Assistant:", a space, its text and a
    line break; the prompt ends with "Assistant:", without a space, because tokens begin with one. The answer ends where
    the model would begin another turn.
    """

    name = "plain turns, as the model has no chat template"
    source = _PLAIN
    stops: tuple[str, ...] = ("\nUser:", "\nAssistant:")
    add_special_tokens = True

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """See `Format.render`."""
        return "".join(_plain_turn(message) for message in messages) + ("Assistant:" if answer else "")


def _plain_turn(message: Mapping[str, Any]) -> str:
    text = str(message["content"])
    if message["role"] == "system":
        return f"{text}\n\n"
    # A generated answer begins with the space that the model put there.
    space = "" if text[:1].isspace() else " "
    return f"{'User' if message['role'] == 'user' else 'Assistant'}:{space}{text}\n"


def load_format(model_dir: Path) -> Format:
    """The format of the model in a folder.

    Raises:
        PromptError, DamagedModelError: see `chat_template.load_chat_template`.
    """
    template = load_chat_template(model_dir)
    return PlainFormat() if template is None else TemplateFormat(template)
