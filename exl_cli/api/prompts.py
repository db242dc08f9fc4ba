"""From what a client sends to a prompt's token ids: plain text, or messages in the many shapes that clients use.

A chat template sees one shape: texts as contents, the arguments of tool calls as objects, `developer` as `system`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import ConfigDict, Field

from exl_cli.api.bodies import BodyError, Strict
from exl_cli.api.model import encode
from exl_cli.models.chat_template import Format, RefusedError
from exl_cli.models.info import ModelInfo
from exl_cli.models.tokenizer import Tokenizer

MAX_MESSAGES = 10_000
# What `chat_template_kwargs` may come to as JSON, and what it must leave alone.
_MAX_VARIABLES = 64 << 10
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}

_TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text", "refusal")


class TextModel(Protocol):
    """What turning bodies into requests takes of a model; no engine."""

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


class Function(Strict):
    """A call's name and arguments; the latter as JSON, whatever the model wrote."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(max_length=256)
    arguments: str | dict[str, Any] = ""


class ToolCall(Strict):
    """A tool call that an assistant message holds."""

    model_config = ConfigDict(extra="ignore")
    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class Message(Strict):
    """A message of a conversation; fields that templates do not read are ignored."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Function | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation ready for the engine.

    Attributes:
        ids: its tokens.
        opening: its text up to where the answer begins.
        prefill: the beginning of the answer, where the conversation gives it.
    """

    ids: tuple[int, ...]
    opening: str
    prefill: str = ""


def content_text(content: str | Sequence[Part] | None) -> str:
    """A content as text, its parts a line each.

    Raises:
        BodyError: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in _TEXT_PARTS:
            raise not_text(part.type)
    return "\n".join(part.text or part.refusal or "" for part in content)


def not_text(kind: str) -> BodyError:
    """The error for a part that no model here can read."""
    what = "images are" if "image" in kind else f"content of type {kind!r} is"
    return BodyError(f"{what} not supported: models read text only", "send text", field="messages")


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
            arguments = function.arguments  # what a model wrote need not be JSON
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
    """Render a conversation and encode it.

    Several system messages are merged into one where the template takes only one, as are turns of one role.

    Args:
        model: whose template and tokenizer.
        messages: see `turns`.
        tools: as OpenAI writes them.
        variables: more of the template's variables.
        continue_final: the last message is the beginning of the answer.
        add_generation_prompt: end with the header of the answer.
        check: whether it has to fit the context.

    Raises:
        BodyError: tools that the template has no use for, or variables that are too much or not the client's to set.
        PromptError: the template refuses the conversation, or it does not fit.
    """
    source, final = model.chat_format.source, messages[-1] if messages else {}
    extra = _variables(variables or {})
    has_tools = bool(tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
    if has_tools and "tool" not in source:
        raise BodyError("the model's chat template has no place for tools", "leave them out", field="tools")
    if tools:
        extra["tools"] = list(tools)
    if continue_final and final.get("role") != "assistant":
        raise BodyError("there is no answer to continue", "end with an assistant message", field="messages")
    extra = _as_text(model.tokenizer, extra)

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return model.chat_format.render(
            messages, add_generation_prompt=add_generation_prompt, continue_final=continue_final, extra=extra
        )

    shown = model.tokenizer.as_text_messages(messages)
    merged = _merged(shown)
    try:
        text = render(shown)
        # A template may as well leave a second system message out without a word.
        if merged != shown and not all(m["content"].strip() in text for m in shown if m["role"] == "system"):
            text = render(merged)
    except RefusedError:
        if merged == shown:
            raise
        text = render(merged)
    ids = encode(
        model.tokenizer,
        text,
        model.context_length if check else None,
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
    """A value with the special tokens in its texts hidden; see `Tokenizer.as_text`."""
    if isinstance(value, str):
        return tokenizer.as_text(value)
    if isinstance(value, Mapping):
        return {key: _as_text(tokenizer, item) for key, item in value.items()}
    return [_as_text(tokenizer, item) for item in value] if isinstance(value, (list, tuple)) else value


def _merged(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One system message in front, and one turn where several of one role follow each other."""
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
