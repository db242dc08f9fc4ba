"""Turn clients' messages into a prompt's token ids.

Clients send many variants. Chat templates get one: string contents, tool call arguments as objects, `developer` as
`system`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import ConfigDict, Field

from exl_cli.api.bodies import BodyError, Strict
from exl_cli.api.model import encode
from exl_cli.models.chat_template import Format, RefusedError
from exl_cli.models.info import ModelInfo
from exl_cli.models.tokenizer import Tokenizer

MAX_MESSAGES = 10_000
# Of a text that is tokenized whatever the context holds, which takes some 200 bytes of memory for each character.
MAX_CHARACTERS = 1_000_000
# Size limit of `chat_template_kwargs` as JSON, and names it must not set.
_MAX_VARIABLES = 64 << 10
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}

_TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text", "refusal")


class TextModel(Protocol):
    """What is needed of a model to build requests; no engine."""

    name: str
    info: ModelInfo
    tokenizer: Tokenizer
    chat_format: Format
    context_length: int


class Part(Strict):
    """A part of a message's content."""

    model_config = ConfigDict(extra="ignore")
    type: str = Field(max_length=64)
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[list[Part], Field(max_length=MAX_MESSAGES)]


class Function(Strict):
    """Name and arguments of a call; the arguments are whatever JSON text the model wrote."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(max_length=256)
    arguments: str | dict[str, Any] = ""


class ToolCall(Strict):
    """A tool call in an assistant message."""

    model_config = ConfigDict(extra="ignore")
    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class Message(Strict):
    """A message of a conversation; fields that templates do not read are ignored."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Function | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered and encoded conversation.

    Attributes:
        ids: token ids.
        opening: its text up to the response.
        prefill: the beginning of the response, if the conversation contains one.
    """

    ids: tuple[int, ...]
    opening: str
    prefill: str = ""


def content_text(content: str | Sequence[Part] | None) -> str:
    """A message's content as text, one line per part; BodyError for parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in _TEXT_PARTS:
            raise not_text(part.type)
    return "\n".join(part.text or part.refusal or "" for part in content)


def not_text(kind: str) -> BodyError:
    """The error for content that is not text."""
    what = "images are" if "image" in kind else f"content of type {kind!r} is"
    return BodyError(f"{what} not supported; models only accept text", "send text", field="messages")


def turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates read them."""
    return [_turn(message) for message in messages]


def _turn(message: Message) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    turn: dict[str, Any] = {"role": role, "content": content_text(message.content)}
    calls = message.tool_calls or ([] if message.function_call is None else [ToolCall(function=message.function_call)])
    if calls:
        turn["tool_calls"] = [{"id": c.id, "type": "function", "function": _function(c.function)} for c in calls]
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content or message.reasoning,
    }
    return turn | {key: value for key, value in optional.items() if value}


def _function(function: Function) -> dict[str, Any]:
    arguments: Any = function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = function.arguments  # models sometimes write invalid JSON
    return {"name": function.name, "arguments": arguments}


def chat_prompt(
    model: TextModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    continue_final: bool = False,
    add_generation_prompt: bool = True,
    check: bool = True,
) -> ChatPrompt:
    """Render and encode a conversation.

    If the template rejects or drops repeated system messages or consecutive messages of one role, they are merged.

    Args:
        model: provides template and tokenizer.
        messages: from `turns`.
        tools: in OpenAI's format.
        variables: more template variables.
        continue_final: continue the last message, an assistant's.
        add_generation_prompt: end with the header of the response.
        check: require it to fit the context.

    Raises:
        BodyError: the template does not support tools, or the variables are too large or reserved.
        PromptError: the template rejects the conversation, or it does not fit.
    """
    source, final = model.chat_format.source, messages[-1] if messages else {}
    extra = _variables(variables or {})
    has_tools = bool(tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
    if has_tools and "tool" not in source:
        raise BodyError("the model's chat template does not support tools", "leave them out", field="tools")
    if tools:
        extra["tools"] = list(tools)
    if continue_final and final.get("role") != "assistant":
        raise BodyError("no assistant message to continue", "end with an assistant message", field="messages")
    extra = _as_text(model.tokenizer, extra)

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return model.chat_format.render(
            messages, add_generation_prompt=add_generation_prompt, continue_final=continue_final, extra=extra
        )

    shown = model.tokenizer.as_text_messages(messages)
    merged = _merged(shown)
    try:
        text = render(shown)
        # Some templates silently drop a second system message.
        if merged != shown and not all(m["content"].strip() in text for m in shown if m["role"] == "system"):
            text = render(merged)
    except RefusedError:
        if merged == shown:
            raise
        text = render(merged)
    if not check and len(text) > MAX_CHARACTERS:
        raise BodyError(f"the conversation has {len(text):,} characters; the limit is {MAX_CHARACTERS:,}")
    ids = encode(
        model.tokenizer,
        text,
        model.context_length if check else None,
        model.info.extended_length,
        add_special_tokens=model.chat_format.add_special_tokens,
    )
    prefill = final["content"] if continue_final else ""
    prefill = prefill if text.endswith(prefill) else prefill.strip()
    return ChatPrompt(tuple(ids), text.removesuffix(prefill), prefill)


def _variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(variables, allow_nan=False))
    except (ValueError, RecursionError):
        size = _MAX_VARIABLES + 1
    if size > _MAX_VARIABLES:
        raise BodyError("chat_template_kwargs is too large", "shorten it", field="chat_template_kwargs")
    if taken := next((name for name in variables if name in _RESERVED or name.endswith("_token")), None):
        raise BodyError(f"chat_template_kwargs cannot set {taken}", "leave it out", field="chat_template_kwargs")
    return dict(variables)


def _as_text(tokenizer: Tokenizer, value: Any) -> Any:
    """Escape special tokens in all strings of a JSON value; see `Tokenizer.as_text`."""
    if isinstance(value, str):
        return tokenizer.as_text(value)
    if isinstance(value, Mapping):
        return {key: _as_text(tokenizer, item) for key, item in value.items()}
    return [_as_text(tokenizer, item) for item in value] if isinstance(value, (list, tuple)) else value


def _merged(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge system messages into one at the front, and consecutive messages of one role."""
    systems = [turn for turn in turns if turn["role"] == "system"]
    merged: list[dict[str, Any]] = []
    for turn in [*systems, *(turn for turn in turns if turn["role"] != "system")]:
        last = merged[-1] if merged else {"role": ""}
        if turn["role"] == last["role"] and turn["role"] in ("system", "user", "assistant"):
            calls = [*last.get("tool_calls", ()), *turn.get("tool_calls", ())]
            content = "\n\n".join(filter(None, (last["content"], turn["content"])))
            merged[-1] = {**last, **turn, "content": content, **({"tool_calls": calls} if calls else {})}
        else:
            merged.append(turn)
    return merged
