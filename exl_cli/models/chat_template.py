"""Turn a conversation into text with the model's chat template, or with a plain format if it has none.

Templates are found and rendered as in transformers (`apply_chat_template`). They are untrusted code, so rendering
happens in a sandboxed helper process; see `template_worker`.
"""

from __future__ import annotations

import functools
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
_DROP_SYSTEM = f"drop {param('system')}, or put it into the prompt"
_MAX_REPORT = 300


class RefusedError(PromptError):
    """The template rejects this conversation (`raise_exception`), for example for its order of roles."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template.

    Args:
        source: the Jinja source.
        origin: the file it came from, for error messages.
        special_tokens: `bos_token`, `eos_token` and so on, passed to the template as variables.
        variant: its name, if the model has several templates.
        helper: the process it renders in. Different templates should not share one.

    Attributes:
        name: the format in words.
        stops: strings that end a response.
        add_special_tokens: False: the template writes BOS and the like itself.
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
        """Start the helper process without waiting for it; it takes about 0.1 s. Returns self."""
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
        """Render a conversation in the format the model was trained on.

        Args:
            messages: each with at least `role` and `content`.
            add_generation_prompt: end with the header of an assistant turn; ignored with `continue_final`.
            continue_final: leave the last message open for the model to continue.
            extra: more template variables, such as `tools` or `enable_thinking`.

        Raises:
            PromptError: the template rejects the conversation, has an error, or was stopped by the sandbox.
        """
        if not messages:
            raise PromptError("no message to send to the model", "pass a prompt")
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
        """Why the template fails on even a one-message conversation; empty if it does not."""
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except PromptError as error:
            return "" if isinstance(error, RefusedError) else error.message
        return ""

    def _explain(self, reply: Reply, turns: list[dict[str, Any]]) -> PromptError:
        reason = _one_line(reply.text)
        if reply.kind == REFUSED:
            message = f"the model's chat template rejects this conversation: {reason}"
            return RefusedError(message, _refusal_hint(reason, turns))
        verb = {BROKEN: "is broken", STOPPED: "was stopped"}.get(reply.kind, "failed")
        place = f"{self.origin}, line {reply.line}" if reply.line else self.origin
        return PromptError(f"the model's chat template {verb}: {reason} ({place})", _WITHOUT)

    def _open_final_turn(self, turns: list[dict[str, Any]]) -> str:
        """Append a marker to the last message and return its original text; `_cut_after` cuts the output there."""
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
        raise PromptError("the model's chat template drops the message to continue", _WITHOUT)
    end = text.rindex(_CONTINUE_TAG.strip())
    # If the template stripped the marker's trailing space, it strips messages: strip the cut text as well.
    return text[:end] if text[end:].startswith(_CONTINUE_TAG) else text[:end].rstrip()


def _plain(value: Any) -> Any:
    """Copy a value into plain JSON types, to be sent to the helper process."""
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
    """Drop None fields, and store reasoning under both names that templates use: `thinking`, `reasoning_content`."""
    turn = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((turn[name] for name in _REASONING_FIELDS if name in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def _one_line(error: object) -> str:
    """Make a template's error message printable on one line."""
    text = "".join(char if char.isprintable() else " " for char in str(error)[: 4 * _MAX_REPORT])
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REPORT else text[: _MAX_REPORT - 1] + "…"


def _refusal_hint(message: str, turns: list[dict[str, Any]]) -> str:
    if turns[0].get("role") == "system" and "system" in message.lower():
        return _DROP_SYSTEM
    if "alternate" in message.lower():
        has_system = any(turn.get("role") == "system" for turn in turns)
        return _DROP_SYSTEM if has_system else "alternate user and assistant messages"
    return _WITHOUT


_PLAIN = """\
{system message, and an empty line, where there is one}
User: {message}
Assistant: {answer}
User: {message}
Assistant:
"""


class PlainFormat:
    """User/Assistant format for models without a chat template. Same interface as `ChatTemplate`.

    The system message, an empty line, then one "User: …" or "Assistant: …" line per message. The prompt ends with
    "Assistant:" and no space, since the first token of a word includes its leading space. "\\nUser:" and
    "\\nAssistant:" are stop strings.
    """

    name = "plain turns (the model has no chat template)"
    note = "the model has no chat template; messages are sent as User: and Assistant: lines"
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
        """See `ChatTemplate.render`."""
        text = "".join(map(self._turn, messages))
        if continue_final:
            return text.removesuffix("\n")
        return text + ("Assistant:" if add_generation_prompt else "")

    def _turn(self, message: Mapping[str, Any]) -> str:
        text = str(message["content"])
        if message["role"] == "system":
            return f"{text}\n\n"
        # A generated response already starts with a space.
        space = "" if text[:1].isspace() else " "
        return f"{'User' if message['role'] == 'user' else 'Assistant'}:{space}{text}\n"


Format = ChatTemplate | PlainFormat


def load_format(model_dir: Path) -> Format:
    """Load a model's chat format and start the helper process of its template, if it has one.

    Raises:
        PromptError, DamagedModelError: see `load_chat_template`.
    """
    template = load_chat_template(model_dir)
    return PlainFormat() if template is None else template.start()


def load_chat_template(model_dir: Path, name: str | None = None) -> ChatTemplate | None:
    """Find a model's chat template, in transformers' order: *.jinja files, chat_template.json, tokenizer_config.json.

    Args:
        model_dir: the model's folder.
        name: one of several named templates; None for the default.

    Returns:
        The template, or None if the model has none.

    Raises:
        PromptError: no template of that name, or several without a default.
        DamagedModelError: a template file cannot be read or parsed.
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
            raise PromptError(f"the model has no chat templates, so none named {name!r}", _WITHOUT)
        return None
    wanted = "default" if name is None else name
    if wanted not in templates:
        names = ", ".join(sorted(templates))
        if name is not None:
            raise PromptError(f"the model has no chat template named {name!r}", f"it has: {names}")
        raise PromptError(
            f"the model has several chat templates and none of them is the default: {names}",
            f"choose one with exl run {param('chat_template')} NAME",
        )
    origin, source = templates[wanted]
    return ChatTemplate(source, origin, _special_tokens(model_dir, config), wanted, _helper(source))


@functools.lru_cache(maxsize=1)
def _helper(source: str) -> Helper:
    """The helper process of a template. A model loaded again, or another with the same template, finds it running."""
    return Helper()


def _from_jinja_files(model_dir: Path) -> dict[str, tuple[str, str]]:
    """Template name to (file, source)."""
    files = {path.stem: path for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja"))}
    if (model_dir / "chat_template.jinja").is_file():
        files = {"default": model_dir / "chat_template.jinja", **files}
    return {name: (path.relative_to(model_dir).as_posix(), _read_text(path)) for name, path in files.items()}


def _named(file: str, value: Any) -> dict[str, tuple[str, str]]:
    """Template name to (file, source), from a JSON value: None, a string, or a list of {name, template}."""
    if value is None:
        return {}
    try:
        pairs = {"default": value} if isinstance(value, str) else {item["name"]: item["template"] for item in value}
    except (TypeError, KeyError):
        pairs = {}
    if not pairs or not all(isinstance(text, str) for pair in pairs.items() for text in pair):
        raise DamagedModelError(
            f"the chat template in {file} is neither a string nor a list of named templates", _WITHOUT
        )
    return {name: (file, text) for name, text in pairs.items()}


def _special_tokens(model_dir: Path, config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name. In older models, without added_tokens_decoder, special_tokens_map.json wins."""
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
        raise DamagedModelError(f"cannot read {path.name}: {error}", "download the model again") from error
