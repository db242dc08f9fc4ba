"""Anthropic's Messages API: parse bodies into engine requests, format chunks as messages and stream events.

Wire format: https://docs.anthropic.com/en/api/messages, /messages-streaming and /messages-count-tokens.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from exl_cli.api.bodies import Body, BodyError, Count, GenerationBody, Strict
from exl_cli.api.choices import Choice
from exl_cli.api.openai import answer, chat_requests, wants_tools
from exl_cli.api.prompts import (
    MAX_MESSAGES,
    ChatPrompt,
    Function,
    Message,
    TextModel,
    ToolCall,
    chat_prompt,
    not_text,
    turns,
)
from exl_cli.engines.base import Chunk


class Block(Strict):
    """A block of a message's content."""

    model_config = ConfigDict(extra="ignore")
    type: str = Field(max_length=64)
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = Field({})
    tool_use_id: str = ""
    content: str | Annotated[list[Block], Field(max_length=MAX_MESSAGES)] = ""


class Turn(Strict):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MAX_MESSAGES)]


class Thinking(Strict):
    """Turns reasoning on or off, if the chat template supports it; budgets are ignored."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["enabled", "disabled", "adaptive"]


class Conversation(Body):
    """Fields of `/v1/messages` and `/v1/messages/count_tokens`."""

    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | list[Block] = ""
    tools: list[dict[str, Any]] = Field([], max_length=1024)
    tool_choice: dict[str, Any] = Field({"type": "auto"})
    thinking: Thinking | None = None

    @property
    def count(self) -> int:
        """Number of generations."""
        return 1

    def prompt(self, model: TextModel, *, check: bool = True) -> ChatPrompt:
        """Render the prompt. A final assistant message is continued.

        Raises:
            BodyError, PromptError: see `prompts.chat_prompt`.
        """
        system = [Message(role="system", content=_text(self.system))] if self.system else []
        tools = [_tool(tool) for tool in self.tools] if wants_tools(self.tool_choice.get("type")) else []
        variables = {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        return chat_prompt(
            model,
            turns([*system, *(message for turn in self.messages for message in _messages(turn))]),
            tools=tools,
            variables=variables,
            continue_final=self.messages[-1].role == "assistant",
            check=check,
        )


class CountBody(Conversation):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str = Field("", max_length=1024)

    def tokens(self, model: TextModel) -> dict[str, int]:
        """The response body."""
        return {"input_tokens": len(self.prompt(model, check=False).ids)}


class MessagesBody(Conversation, GenerationBody):
    """The body of `POST /v1/messages`."""

    max_tokens: Count = Field(description="Maximum number of tokens; 0 only processes the prompt.")
    n: Literal[1] = 1


def _text(content: str | Sequence[Block]) -> str:
    if isinstance(content, str):
        return content
    if strange := next((block.type for block in content if block.type != "text"), None):
        raise not_text(strange)
    return "\n".join(block.text for block in content)


def _messages(turn: Turn) -> list[Message]:
    """Convert a turn to chat-completion messages, where each tool result is a message."""
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    results = [
        Message(role="tool", content=_text(block.content), tool_call_id=block.tool_use_id)
        for block in turn.content
        if block.type == "tool_result"
    ]
    calls = [
        ToolCall(id=block.id, function=Function(name=block.name, arguments=json.dumps(block.input)))
        for block in turn.content
        if block.type == "tool_use"
    ]
    thinking = "\n".join(block.thinking for block in turn.content if block.type == "thinking")
    known = ("tool_result", "tool_use", "thinking", "redacted_thinking")
    texts = [block for block in turn.content if block.type not in known]
    if not texts and results:
        return results
    message = Message(
        role=turn.role, content=_text(texts), tool_calls=calls or None, reasoning_content=thinking or None
    )
    return [*results, message]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Convert a tool definition to OpenAI's format."""
    if "input_schema" not in tool:
        raise BodyError("only tools with an input_schema are supported", "remove the others", field="tools")
    function = {"name": tool.get("name"), "description": tool.get("description", "")}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


class MessagesJob:
    """A `/v1/messages` request; see `choices.Job`.

    Raises:
        ExlError: an invalid body or prompt.
    """

    def __init__(self, body: MessagesBody, model: TextModel) -> None:
        prompt = body.prompt(model)
        self.requests = chat_requests(body, model, prompt)
        self._choice = answer(model, self.requests[0], prompt, is_wanted=body.max_tokens > 0)
        self._body, self._model = body, model
        self._id = f"msg_{secrets.token_hex(12)}"
        self._shows_thinking = body.thinking is None or body.thinking.type != "disabled"
        self._begun = False
        self._blocks: list[str] = []

    def push(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if not self._begun:
            self._begun = True
            events += [{"type": "message_start", "message": self._message()}, {"type": "ping"}]
        delta = self._choice.push(chunk)
        if delta.reasoning and self._shows_thinking:
            events += self._begin("thinking")
            events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.text:
            events += self._begin("text")
            events.append(self._delta({"type": "text_delta", "text": delta.text}))
        return events

    def end(self) -> list[dict[str, Any]]:
        return [
            *self._close(),
            {"type": "message_delta", "delta": self._stop(), "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def result(self) -> dict[str, Any]:
        choice = self._choice
        content: list[dict[str, Any]] = []
        if choice.reasoning and self._shows_thinking:
            content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
        if choice.text:
            content.append({"type": "text", "text": choice.text})
        return {**self._message(), "content": content, **self._stop()}

    def _begin(self, kind: str) -> list[dict[str, Any]]:
        """Open a content block of this kind unless it is already open, closing the previous one."""
        if self._blocks[-1:] == [kind]:
            return []
        events = self._close()
        self._blocks.append(kind)
        empty = {"thinking": {"thinking": "", "signature": ""}, "text": {"text": ""}}[kind]
        return [*events, self._event("content_block_start", content_block={"type": kind, **empty})]

    def _close(self) -> list[dict[str, Any]]:
        if not self._blocks:
            return []
        signature = {"type": "signature_delta", "signature": ""}
        signed = [self._delta(signature)] if self._blocks[-1] == "thinking" else []
        return [*signed, self._event("content_block_stop")]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return self._event("content_block_delta", delta=delta)

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        return {"type": type, "index": len(self._blocks) - 1, **fields}

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _stop(self) -> dict[str, Any]:
        """`stop_reason` and `stop_sequence`."""
        choice = self._choice
        if choice.finish_reason == "length":
            used = len(choice.request.ids) + choice.completion_tokens
            is_full = used >= self._model.context_length and choice.completion_tokens < self._body.max_tokens
            return {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None}
        if stop := _stop_sequence(choice, self._model):
            is_ours = stop in self._body.stops
            return {
                "stop_reason": "stop_sequence" if is_ours else "end_turn",
                "stop_sequence": stop if is_ours else None,
            }
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        choice = self._choice
        return {
            "input_tokens": len(choice.request.ids) - choice.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": choice.cached_tokens,
            "output_tokens": choice.completion_tokens,
        }


def _stop_sequence(choice: Choice, model: TextModel) -> str:
    """The stop string that ended the response, the earliest in the text if several match; empty if a token ended it."""
    request, ids = choice.request, choice.token_ids
    if not request.stop_strings or not ids or ids[-1] in request.stop_ids:
        return ""
    stream = model.tokenizer.decode_stream(request.ids)
    written = "".join(stream.push(id_) or stream.special(id_) for id_ in ids)
    met = [stop for stop in request.stop_strings if stop and stop in written]
    return min(met, key=lambda stop: (written.find(stop), -len(stop)), default="")
