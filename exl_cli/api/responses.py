"""OpenAI's Responses API, stateless: parse bodies into engine requests, format chunks as responses and events.

Wire format: https://platform.openai.com/docs/api-reference/responses and /responses-streaming.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from pydantic import ConfigDict, Field

from exl_cli.api.bodies import BodyError, Strict
from exl_cli.api.choices import Delta, chat_logprobs
from exl_cli.api.openai import ConversationBody, answer, chat_requests, refuse_format
from exl_cli.api.prompts import (
    MAX_MESSAGES,
    Function,
    Message,
    Parts,
    TextModel,
    ToolCall,
    content_text,
    not_text,
)
from exl_cli.engines.base import Chunk

_WITH_LOGPROBS = "message.output_text.logprobs"


class Item(Strict):
    """An input item: a message, a tool call, its output, or reasoning."""

    model_config = ConfigDict(extra="ignore")
    type: str = Field("message", max_length=64)
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Parts | None = None
    summary: Parts = Field([])
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | Parts = ""


class TextOptions(Strict):
    """The response format."""

    model_config = ConfigDict(extra="ignore")
    format: dict[str, Any] | None = None


class ReasoningOptions(Strict):
    """Reasoning effort, for chat templates that support it."""

    model_config = ConfigDict(extra="ignore")
    effort: str | None = Field(default=None, max_length=32)


class ResponsesBody(ConversationBody):
    """The body of `POST /v1/responses`."""

    input: str | list[Item] = Field(max_length=2**31)
    instructions: str | None = None
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    include: list[str] = Field([], max_length=16)
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    previous_response_id: None = Field(None, description="Responses are not stored; send the whole conversation.")
    conversation: None = Field(None, description="Responses are not stored; send the whole conversation.")
    n: Literal[1] = 1

    @property
    def count(self) -> int:
        """Number of generations."""
        return 1

    def messages(self) -> list[Message]:
        """Convert the input to chat-completion messages.

        Raises:
            BodyError: an unsupported kind of item.
        """
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        if len(self.input) > MAX_MESSAGES:
            raise BodyError(f"input has more than {MAX_MESSAGES:,} items", field="input")
        reasoning = ""
        for item in self.input:
            if item.type == "reasoning":
                reasoning += content_text(item.content) or content_text(item.summary)
                continue
            message = _message(item)
            if message.role == "assistant" and reasoning:
                message.reasoning_content, reasoning = reasoning, ""
            messages.append(message)
        return messages


def _message(item: Item) -> Message:
    if item.type == "message" and item.role is not None:
        return Message(role=item.role, content=item.content)
    if item.type == "function_call":
        call = ToolCall(id=item.call_id, function=Function(name=item.name, arguments=item.arguments))
        return Message(role="assistant", tool_calls=[call])
    if item.type == "function_call_output":
        return Message(role="tool", content=item.output, tool_call_id=item.call_id)
    if item.type == "item_reference":
        raise BodyError("responses are not stored", "send the item itself", field="input")
    raise not_text(item.type)


class ResponsesJob:
    """A `/v1/responses` request; see `choices.Job`.

    Raises:
        ExlError: an invalid body or prompt.
    """

    def __init__(self, body: ResponsesBody, model: TextModel) -> None:
        refuse_format(body.text.format, "text.format")
        tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in body.tools]
        prompt = body.model_copy(update={"tools": tools}).prompt(model, body.messages(), body.reasoning.effort)
        self._with_logprobs = bool(body.top_logprobs) or _WITH_LOGPROBS in body.include
        self.requests = chat_requests(body, model, prompt, body.top_logprobs if self._with_logprobs else None)
        self._choice = answer(model, self.requests[0], prompt)
        self._body, self._model = body, model
        self._id, self._created = f"resp_{secrets.token_hex(24)}", int(time.time())
        self._ids = {"reasoning": f"rs_{secrets.token_hex(24)}", "message": f"msg_{secrets.token_hex(24)}"}
        self._open = ""
        self._kinds: list[str] = []
        self._number = 0

    def push(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        events = []
        if not self._number:
            events += [
                self._event(f"response.{name}", response=self._response()) for name in ("created", "in_progress")
            ]
        delta = self._choice.push(chunk)
        if delta.reasoning:
            events += self._begin("reasoning")
            events.append(self._part_event("response.reasoning_text.delta", delta=delta.reasoning))
        if delta.text or (delta.logprobs and self._open == "message"):
            events += self._begin("message")
            logprobs = self._logprobs(delta)
            events.append(self._part_event("response.output_text.delta", delta=delta.text, logprobs=logprobs))
        return events

    def end(self) -> list[dict[str, Any]]:
        events = [] if self._kinds else self._begin("message")
        events += self._close()
        response = self._response()
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def result(self) -> dict[str, Any]:
        self._kinds = self._kinds or ["message"]
        return self._response()

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        event = {"type": type, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _part_event(self, type: str, **fields: Any) -> dict[str, Any]:
        place = {"item_id": self._ids[self._open], "output_index": len(self._kinds) - 1, "content_index": 0}
        return self._event(type, **place, **fields)

    def _begin(self, kind: str) -> list[dict[str, Any]]:
        """Open an output item of this kind unless it is already open, closing the previous one."""
        if self._open == kind:
            return []
        events = self._close()
        self._open = kind
        self._kinds.append(kind)
        item = {**self._item(kind, "in_progress"), "content": []}
        return [
            *events,
            self._event("response.output_item.added", output_index=len(self._kinds) - 1, item=item),
            self._part_event("response.content_part.added", part=self._part(kind, "")),
        ]

    def _close(self) -> list[dict[str, Any]]:
        """Close the open item, if any."""
        kind = self._open
        if not kind:
            return []
        choice = self._choice
        if kind == "message":
            logprobs = self._logprobs(Delta(logprobs=choice.logprobs))
            done = self._part_event("response.output_text.done", text=choice.text, logprobs=logprobs)
        else:
            done = self._part_event("response.reasoning_text.done", text=choice.reasoning)
        part = self._part(kind, choice.text if kind == "message" else choice.reasoning)
        events = [
            done,
            self._part_event("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=len(self._kinds) - 1, item=self._item(kind)),
        ]
        self._open = ""
        return events

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs(Delta(logprobs=self._choice.logprobs if text else []))
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item(self, kind: str, status: str = "") -> dict[str, Any]:
        choice = self._choice
        is_cut = choice.finish_reason == "length" and kind == (self._kinds or [""])[-1]
        item = {"id": self._ids[kind], "type": kind, "status": status or ("incomplete" if is_cut else "completed")}
        if kind == "reasoning":
            return {**item, "summary": [], "content": [self._part(kind, choice.reasoning)]}
        return {**item, "role": "assistant", "content": [self._part(kind, choice.text)]}

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        return chat_logprobs(self._model.tokenizer, delta.logprobs) if self._with_logprobs else []

    def _response(self) -> dict[str, Any]:
        body, choice, sampling = self._body, self._choice, self.requests[0].sampling
        is_cut = choice.finish_reason == "length"
        status = "in_progress" if choice.finish_reason is None else "incomplete" if is_cut else "completed"
        ended = choice.finish_reason is not None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if ended else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_tokens,
            "model": self._model.name,
            "output": [self._item(kind) for kind in self._kinds] if ended else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_logprobs": body.top_logprobs,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "metadata": {},
        }

    def _usage(self) -> dict[str, Any]:
        choice = self._choice
        prompt, completion = len(choice.request.ids), choice.completion_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": choice.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
            "total_tokens": prompt + completion,
        }
