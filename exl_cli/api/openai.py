"""OpenAI's chat completions and completions: parse bodies into engine requests, format chunks as responses and events.

Wire formats: https://platform.openai.com/docs/api-reference/chat and /completions; `echo` with `logprobs` as the
local-completions model of lm-evaluation-harness reads it; `reasoning_content` and `reasoning` as vLLM writes them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from exl_cli.api.bodies import BodyError, GenerationBody, Positive, Strict, TokenId
from exl_cli.api.choices import Choice, Delta, chat_logprobs, text_logprobs
from exl_cli.api.model import encode
from exl_cli.api.prompts import MAX_MESSAGES, ChatPrompt, Message, TextModel, chat_prompt, turns
from exl_cli.engines.base import Chunk, Request, TokenLogprobs
from exl_cli.engines.response import check_fits
from exl_cli.structured.reasoning import Splitter, tag_ids
from exl_cli.system.version import installed_version

# What OpenAI's completions generate where a body does not say.
_COMPLETION_TOKENS = 16
# Generations that one body may come to.
_MAX_CHOICES = 256

Prompts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=1 << 20)]


class StreamOptions(Strict):
    """What a stream contains besides text."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = Field(default=False, description="Send the usage at the end.")
    continuous_usage_stats: bool = Field(default=False, description="Send the usage so far in every event.")


class OpenAIBody(GenerationBody):
    """Fields of chat completions and completions."""

    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    @property
    def options(self) -> StreamOptions:
        """The stream options.

        Raises:
            BodyError: they are given without `stream`, or the response format is not text.
        """
        if self.stream_options is not None and not self.stream:
            raise BodyError("stream_options needs stream", "set stream, or remove it", field="stream_options")
        refuse_format(self.response_format, "response_format")
        return self.stream_options or StreamOptions()


def refuse_format(response_format: dict[str, Any] | None, field: str) -> None:
    """Raise BodyError for a response format other than text."""
    if response_format and response_format.get("type") != "text":
        kind = str(response_format.get("type"))[:64]
        raise BodyError(f"{field} {kind!r} is not supported", "leave it out", field=field, code="unsupported_value")


class ConversationBody(GenerationBody):
    """Fields of chat completions and responses."""

    max_tokens: Positive | None = Field(
        None, description="Maximum number of tokens; by default the rest of the context."
    )
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[dict[str, Any]] = Field([], max_length=1024)
    tool_choice: str | dict[str, Any] = "auto"
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables for the model's chat template.")

    def prompt(self, model: TextModel, messages: Iterable[Message], effort: str | None, **options: bool) -> ChatPrompt:
        """Render messages; see `prompts.chat_prompt`."""
        variables = {"reasoning_effort": effort, **self.chat_template_kwargs} if effort else self.chat_template_kwargs
        tools = self.tools if wants_tools(self.tool_choice) else ()
        return chat_prompt(model, turns(messages), tools=tools, variables=variables, **options)


def wants_tools(choice: Any) -> bool:
    """Whether to show the tools to the model; BodyError if a tool call is required."""
    if choice not in ("auto", "none"):
        raise BodyError("a tool call cannot be required", "set tool_choice to auto or none", field="tool_choice")
    return bool(choice == "auto")


def chat_requests(
    body: GenerationBody, model: TextModel, prompt: ChatPrompt, logprobs: int | None = None
) -> list[Request]:
    """Engine requests for a conversation."""
    most = model.context_length - len(prompt.ids) if body.max_tokens is None else body.max_tokens
    return body.requests(
        [prompt.ids],
        model.info,
        model.tokenizer,
        max_new_tokens=[most],
        stops=model.chat_format.stops,
        logprobs=logprobs,
    )


def answer(model: TextModel, request: Request, prompt: ChatPrompt, *, is_wanted: bool = True) -> Choice:
    """A choice for a conversation, with reasoning separated."""
    splitter = Splitter(prompt.opening)
    splitter.push(prompt.prefill)
    return Choice(request, tag_ids(model.tokenizer), splitter, is_wanted=is_wanted)


class ChatBody(ConversationBody, OpenAIBody):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool = False
    reasoning_effort: str | None = Field(None, max_length=32)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = Field(False, description="Continue the last message, which must be the assistant's.")

    @property
    def count(self) -> int:
        """Number of generations."""
        return self.n


class CompletionBody(OpenAIBody):
    """The body of `POST /v1/completions`."""

    prompt: str | Prompts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)
    add_bos_token: bool = Field(True, description="Add special tokens such as BOS, as the tokenizer does by default.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a string or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # all of them are
        return self.prompt  # type: ignore[return-value]

    @property
    def count(self) -> int:
        """Number of generations."""
        return self.n * len(self.prompts)


class _Job:
    """Common part of both jobs."""

    _object: str
    _chunk_object: str

    def __init__(self, body: OpenAIBody, model: TextModel, prefix: str, requests: list[Request]) -> None:
        self.requests = requests
        self._body, self._model, self._options = body, model, body.options
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"exl-{installed_version()}",
        }
        self.choices: list[Choice] = []

    def end(self) -> list[dict[str, Any]]:
        return [self._event([], usage=self._usage())] if self._options.include_usage else []

    def result(self) -> dict[str, Any]:
        choices = [self._choice(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._head, "object": self._object, "choices": choices, "usage": self._usage()}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        event = {**self._head, "object": self._chunk_object, "choices": choices}
        if self._options.continuous_usage_stats:
            usage = self._usage()
        return {**event, "usage": usage} if usage or self._options.include_usage else event

    def _usage(self) -> dict[str, Any]:
        """Usage; a prompt with several choices counts once."""
        first = self.choices[:: self._body.n]
        prompt = sum(len(choice.request.ids) for choice in first)
        completion = sum(choice.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in first)},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in self.choices)},
        }


class ChatJob(_Job):
    """A `/v1/chat/completions` request; see `choices.Job`.

    Raises:
        ExlError: an invalid body or prompt.
    """

    _object, _chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody, model: TextModel) -> None:
        if body.top_logprobs and not body.logprobs:
            raise BodyError("top_logprobs needs logprobs", "set logprobs to true", field="top_logprobs")
        if body.continue_final_message and body.add_generation_prompt:
            raise BodyError("add_generation_prompt cannot be combined with continue_final_message", "give one")
        prompt = body.prompt(
            model,
            body.messages,
            body.reasoning_effort,
            continue_final=body.continue_final_message,
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        requests = chat_requests(body, model, prompt, body.top_logprobs if body.logprobs else None)
        super().__init__(body, model, "chatcmpl", requests)
        self._begun: set[int] = set()
        self._with_logprobs = body.logprobs
        self.choices = [answer(model, request, prompt) for request in requests]

    def push(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        choice = self.choices[index]
        events = [] if index in self._begun else [self._delta(index, {"role": "assistant", "content": ""})]
        self._begun.add(index)
        if delta := choice.push(chunk):
            parts = {"content": delta.text} if delta.text or not delta.reasoning else {}
            events.append(self._delta(index, parts | _reasoning(delta.reasoning), self._logprobs(delta.logprobs)))
        if choice.summary:
            events.append(self._delta(index, {}, finish_reason=choice.finish_reason))
        return events

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._event([choice])

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None, **_reasoning(choice.reasoning)}
        logprobs = self._logprobs(choice.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": chat_logprobs(self._model.tokenizer, logprobs), "refusal": None}


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning_content": text, "reasoning": text} if text else {}


class CompletionJob(_Job):
    """A `/v1/completions` request; see `choices.Job`.

    Raises:
        ExlError: an invalid body or prompt.
    """

    _object = _chunk_object = "text_completion"

    def __init__(self, body: CompletionBody, model: TextModel) -> None:
        if not 1 <= body.count <= _MAX_CHOICES:
            raise BodyError(
                f"the prompts and n amount to {body.count} completions", f"at most {_MAX_CHOICES} are allowed"
            )
        if body.best_of not in (None, 1, body.n):
            raise BodyError("best_of is not supported", "leave it out", field="best_of", code="unsupported_parameter")
        tokenizer, limits = model.tokenizer, (model.context_length, model.info.extended_length)
        prompts = [
            encode(tokenizer, prompt, *limits, add_special_tokens=body.add_bos_token)
            if isinstance(prompt, str)
            else _known(prompt, model)
            for prompt in body.prompts
        ]
        most = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        requests = body.requests(
            prompts,
            model.info,
            tokenizer,
            max_new_tokens=[most] * len(prompts),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        super().__init__(body, model, "cmpl", requests)
        special = {} if body.skip_special_tokens else tokenizer.special_tokens
        self.choices = [Choice(request, special, is_wanted=most > 0) for request in requests]
        self._texts = [_Text(body, model, r, body.prompts[i // body.n]) for i, r in enumerate(requests)]

    def push(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        choice = self.choices[index]
        text, logprobs = self._texts[index].push(choice, choice.push(chunk))
        if not text and not logprobs and not choice.summary:
            return []
        return [self._event([self._shape(index, choice, text, logprobs)])]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        written = self._texts[index]
        return self._shape(index, choice, written.text, written.logprobs)

    def _shape(self, index: int, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _known(ids: list[int], model: TextModel) -> list[int]:
    check_fits(len(ids), model.context_length, model.info.extended_length)
    if strange := next((id_ for id_ in ids if id_ >= model.tokenizer.vocab_size), None):
        raise BodyError(
            f"the model has no token {strange}", f"use ids up to {model.tokenizer.vocab_size - 1}", field="prompt"
        )
    return ids


class _Text:
    """A completion's text, log-probabilities and token offsets, starting with the prompt if `echo` is set.

    Attributes:
        text, logprobs: everything so far.
    """

    def __init__(self, body: CompletionBody, model: TextModel, request: Request, prompt: str | Sequence[int]) -> None:
        self._tokenizer, self._body, self._prompt = model.tokenizer, body, prompt
        self._stream = model.tokenizer.decode_stream(() if body.echo else request.ids)
        self._offset = 0
        self._begun = not body.echo
        self.text = ""
        self.logprobs: dict[str, list[Any]] | None = None

    def push(self, choice: Choice, delta: Delta) -> tuple[str, dict[str, Any] | None]:
        """Add a delta; returns the text and log-probabilities to send."""
        text = delta.text
        ids = [item.token_id for item in delta.logprobs]
        logprobs: list[TokenLogprobs | None] = list(delta.logprobs)
        if not self._begun:
            self._begun = True
            text = (self._prompt if isinstance(self._prompt, str) else self._tokenizer.decode(self._prompt)) + text
            ids, logprobs = [*choice.request.ids, *ids], [None, *choice.prompt_logprobs, *logprobs]
        self.text += text
        if self._body.logprobs is None or not ids:
            return text, None
        shown = text_logprobs(self._tokenizer, ids, logprobs, [self._place(id_) for id_ in ids])
        if self.logprobs is None:
            self.logprobs = {name: [] for name in shown}
        for name, values in shown.items():
            self.logprobs[name] += values
        return text, shown

    def _place(self, id_: int) -> int:
        """Offset of the next token in the text."""
        offset = self._offset
        self._offset += len(self._stream.push(id_))
        return offset
