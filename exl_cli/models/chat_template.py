"""From a conversation to text: a model's own chat template, or plain turns for a model that has none.

Templates are looked for where transformers looks, and render as in transformers, in a process of their own: see
`template_worker`. This module knows the files, the special tokens and the shape of a conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from exl_cli.errors import DamagedModelError, PromptError, param
from exl_cli.models.config import read_json, refuse_pointer
from exl_cli.models.template_helper import Helper, Reply
from exl_cli.models.template_worker import BROKEN, REFUSED, STOPPED, TEXT
from exl_cli.system.files import read_file, read_text

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_WITHOUT = f"use {param('raw')} or {param('template')} to write the prompt yourself"
_DROP_SYSTEM = f"drop {param('system')}, or say it in the prompt"
_MAX_REPORT = 300


class RefusedError(PromptError):
    """The template does not take this conversation; it may take another."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template.

    Args:
        source: the Jinja text.
        origin: the file it came from, for messages.
        special_tokens: `bos_token`, `eos_token` and so on, as the template sees them.
        variant: which of the model's templates this is.
        helper: the process that it renders in; a model's own unless several are known to be harmless to each other.

    Attributes:
        name: the format in words.
        stops: texts that end an answer.
        add_special_tokens: whether the tokenizer adds its own, such as BOS; a chat template writes them itself.
    """

    source: str
    origin: str = "chat_template.jinja"
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    variant: str = "default"
    helper: Helper = field(default_factory=Helper, repr=False, compare=False)

    stops: ClassVar[tuple[str, ...]] = ()
    add_special_tokens: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"chat template ({self.origin})"

    def start(self) -> ChatTemplate:
        """Start the process that it renders in, which takes a tenth of a second, while the caller does other things."""
        self.helper.start()
        return self

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a conversation as the model was trained to read it.

        Args:
            messages: the turns, each with at least `role` and `content`.
            add_generation_prompt: end with the header of an assistant turn; not done when `continue_final` is set.
            continue_final: leave the last turn open for the model to go on writing it.
            extra: more variables for the template, such as `tools` or `enable_thinking`.

        Raises:
            PromptError: the template refuses the conversation, is broken, or does what it is not allowed to do.
        """
        if not messages:
            raise PromptError("there is no message to send to the model", "give a prompt")
        turns = [_plain_turn(message) for message in messages]
        final = self._open_final_turn(turns) if continue_final else None
        variables = {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **_plain(extra or {}),
            "messages": turns,
            "add_generation_prompt": add_generation_prompt and not continue_final,
        }
        reply = self.helper.render(self.source, variables)
        if reply.kind != TEXT:
            raise self._explain(reply, turns)
        return reply.text if final is None else _cut_after(reply.text, final)

    def problem(self) -> str:
        """What keeps it from rendering any conversation; empty where nothing does."""
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except PromptError as error:
            return "" if isinstance(error, RefusedError) else error.message
        return ""

    def _explain(self, reply: Reply, turns: list[dict[str, Any]]) -> PromptError:
        reason = _one_line(reply.text)
        if reply.kind == REFUSED:
            message = f"the model's chat template refuses this conversation: {reason}"
            return RefusedError(message, _refusal_hint(reason, turns))
        verb = {BROKEN: "is broken", STOPPED: "was stopped"}.get(reply.kind, "failed")
        place = f"{self.origin}, line {reply.line}" if reply.line else self.origin
        return PromptError(f"the model's chat template {verb}: {reason} ({place})", _WITHOUT)

    def _open_final_turn(self, turns: list[dict[str, Any]]) -> str:
        """Mark the end of the last turn's text, so that what the template writes after it can be cut off."""
        content = turns[-1].get("content")
        if isinstance(content, list):
            block = next((block for block in reversed(content) if isinstance(block, dict) and "text" in block), {})
        else:
            block = turns[-1]
        key = "text" if isinstance(content, list) else "content"
        text = block.get(key)
        if not isinstance(text, str) or "content" not in self.source:
            raise PromptError("the last message has no text to continue", "end with an assistant message")
        block[key] = text + _CONTINUE_TAG
        return text


def _cut_after(text: str, final: str) -> str:
    if final.strip() not in text or _CONTINUE_TAG.strip() not in text:
        raise PromptError("the model's chat template leaves out the message to continue", _WITHOUT)
    end = text.rindex(_CONTINUE_TAG.strip())
    # A template that trims its messages has trimmed the tag; then the text before it is trimmed too.
    return text[:end] if text[end:].startswith(_CONTINUE_TAG) else text[:end].rstrip()


def _plain(value: Any) -> Any:
    """A copy made of JSON's own types, so that a template meets no method of anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TypeError(f"a chat template takes text, numbers, lists and dicts, not {type(value).__name__}")


def _plain_turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """One turn, without empty fields, and with its reasoning under each name that templates read it by."""
    turn = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((turn[name] for name in _REASONING_FIELDS if name in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def _one_line(error: object) -> str:
    """What a template says, fit for one line of a terminal: it may hold anything."""
    text = "".join(char if char.isprintable() else " " for char in str(error)[: 4 * _MAX_REPORT])
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REPORT else text[: _MAX_REPORT - 1] + "…"


def _refusal_hint(message: str, turns: list[dict[str, Any]]) -> str:
    if turns[0].get("role") == "system" and "system" in message.lower():
        return _DROP_SYSTEM
    if "alternate" in message.lower():
        has_system = any(turn.get("role") == "system" for turn in turns)
        return _DROP_SYSTEM if has_system else "let user and assistant take turns"
    return _WITHOUT


_PLAIN = """\
{system message, and an empty line, where there is one}
User: {message}
Assistant: {answer}
User: {message}
Assistant:
"""


class PlainFormat:
    """A plain turn format, for models without a chat template; its attributes are those of `ChatTemplate`.

    The system message comes first, then an empty line. Each turn is "User:" or "Assistant:", a space, its text and a
    line break; the prompt ends with "Assistant:", without a space, because tokens begin with one. The answer ends where
    the model would begin another turn.
    """

    name = "plain turns, as the model has no chat template"
    source = _PLAIN
    stops: tuple[str, ...] = ("\nUser:", "\nAssistant:")
    add_special_tokens = True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, up to where the model's answer begins; see `ChatTemplate.render`."""
        text = "".join(map(self._turn, messages))
        if continue_final:
            return text.removesuffix("\n")
        return text + ("Assistant:" if add_generation_prompt else "")

    def _turn(self, message: Mapping[str, Any]) -> str:
        text = str(message["content"])
        if message["role"] == "system":
            return f"{text}\n\n"
        # A generated answer begins with the space that the model put there.
        space = "" if text[:1].isspace() else " "
        return f"{'User' if message['role'] == 'user' else 'Assistant'}:{space}{text}\n"


Format = ChatTemplate | PlainFormat


def load_format(model_dir: Path) -> Format:
    """The format of the model in a folder; a chat template's process is on its way then.

    Raises:
        PromptError, DamagedModelError: see `load_chat_template`.
    """
    template = load_chat_template(model_dir)
    return PlainFormat() if template is None else template.start()


def load_chat_template(model_dir: Path, name: str | None = None) -> ChatTemplate | None:
    """Find a model's chat template.

    Args:
        model_dir: the model's folder.
        name: one of several templates; without it, the default one.

    Returns:
        The template, or None where the model has none.

    Raises:
        PromptError: there is no template of that name, or several and none is the default.
        DamagedModelError: a file that cannot be read as what its name says.
    """
    config = read_json(model_dir / "tokenizer_config.json")
    legacy = model_dir / "chat_template.json"
    templates = (
        _from_jinja_files(model_dir)
        or _named(legacy.name, read_json(legacy).get("chat_template"))
        or _named("tokenizer_config.json", config.get("chat_template"))
    )
    if not templates:
        if name is not None:
            raise PromptError(f"the model has no chat template, so none called {name!r}", _WITHOUT)
        return None
    wanted = "default" if name is None else name
    if wanted not in templates:
        names = ", ".join(sorted(templates))
        if name is not None:
            raise PromptError(f"the model has no chat template {name!r}", f"it has: {names}")
        raise PromptError(
            f"the model has several chat templates and none is the default: {names}",
            f"exl run {param('chat_template')} NAME takes one of them",
        )
    origin, source = templates[wanted]
    return ChatTemplate(source, origin, _special_tokens(model_dir, config), wanted)


def _from_jinja_files(model_dir: Path) -> dict[str, tuple[str, str]]:
    """Each template's file and text, by its name."""
    files = {path.stem: path for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja"))}
    if (model_dir / "chat_template.jinja").is_file():
        files = {"default": model_dir / "chat_template.jinja", **files}
    return {name: (path.relative_to(model_dir).as_posix(), _read_text(path)) for name, path in files.items()}


def _named(file: str, value: Any) -> dict[str, tuple[str, str]]:
    """The same from a JSON file's value: nothing, one text, or a list of names and texts."""
    if value is None:
        return {}
    try:
        pairs = {"default": value} if isinstance(value, str) else {item["name"]: item["template"] for item in value}
    except (TypeError, KeyError):
        pairs = {}
    if not pairs or not all(isinstance(text, str) for pair in pairs.items() for text in pair):
        raise DamagedModelError(f"the chat template in {file} is neither text nor a list of named texts", _WITHOUT)
    return {name: (file, text) for name, text in pairs.items()}


def _special_tokens(model_dir: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by name. `special_tokens_map.json` counts, and wins, only beside an older configuration."""
    values = dict(config)
    if "added_tokens_decoder" not in config:
        values |= read_json(model_dir / "special_tokens_map.json")
    named = [(key, value) for key, value in values.items() if key in _NAMED_TOKENS or key.endswith("_token")]
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(values.get(group), dict):
            named += values[group].items()
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in named}
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def _read_text(path: Path) -> str:
    try:
        refuse_pointer(path, read_file(path))
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedModelError(f"{path.name} cannot be read: {error}", "download the model again") from error
