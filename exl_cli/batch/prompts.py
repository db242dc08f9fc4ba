"""Turns rows of the input into requests, and their chunks into lines of the output.

Lines in OpenAI's batch format get the defaults of `exl serve`; `prompt`, `messages` and lines of text get those of
`exl run`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exl_cli.api.bodies import ALIASES, Body, BodyError
from exl_cli.api.openai import ChatBody, ChatJob, CompletionBody, CompletionJob
from exl_cli.batch.output import line_of
from exl_cli.batch.rows import Row, hashed
from exl_cli.engines.base import Chunk, Request
from exl_cli.errors import (
    ContextLengthError,
    DamagedModelError,
    ExlError,
    OutOfMemoryError,
    PromptError,
    UnsupportedModelError,
    UsageError,
    brief,
    param,
    spell,
)
from exl_cli.models.chat_template import Format, PlainFormat
from exl_cli.models.info import ModelInfo
from exl_cli.models.prompt import fill, placeholders
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import PRESETS, build

# Default of `exl run`.
_MAX_NEW_TOKENS = 512
# Names of ignored fields to remember: each row may have others.
_MOST_IGNORED = 1024

_CODES: dict[type[BaseException], str] = {
    ContextLengthError: "context_length_exceeded",
    PromptError: "invalid_prompt",
    UsageError: "invalid_value",
    UnsupportedModelError: "model_unusable",
    DamagedModelError: "model_unusable",
    OutOfMemoryError: "out_of_memory",
    MemoryError: "out_of_memory",
}

_URLS = ("/v1/chat/completions", "/v1/completions")


@dataclass
class BatchModel:
    """What preparing requests needs to know of a model; see `api.prompts.TextModel`."""

    name: str
    info: ModelInfo
    tokenizer: Tokenizer
    chat_format: Format
    context_length: int


@dataclass(frozen=True)
class Settings:
    """Defaults for what rows do not set.

    Attributes:
        sampling: fields of `Sampling` by name.
        preset: a key of `PRESETS`; `sampling` overrides it.
        max_new_tokens: None for the defaults of `exl run` and `exl serve`.
        seed: a row's seed is derived from this and the row's key.
        stop: stop strings.
        system: system message before each prompt.
        raw: continue prompts as they are, without the chat template.
        template: template that makes a prompt from a row's fields.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    system: str | None = None
    raw: bool = False
    template: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for the manifest."""
        return {
            "sampling": dict(self.sampling),
            "preset": self.preset,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "stop": list(self.stop),
            "system": self.system,
            "raw": self.raw,
            "template": self.template,
        }


def text_of(value: Any) -> str:
    """A field's value as text: strings as they are, None as an empty string, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


class Task:
    """A row that has become requests.

    Attributes:
        row: the row.
        requests: to the engine, at least one.
    """

    def __init__(self, row: Row, job: ChatJob | CompletionJob) -> None:
        self.row, self._job = row, job
        self.requests: Sequence[Request] = job.requests

    def line(self, chunks: Sequence[Sequence[Chunk]], *, flat: bool) -> bytes:
        """Encode the answer as a line of the output.

        Args:
            chunks: all chunks, by request.
            flat: write the texts instead of a response object.
        """
        for index, some in enumerate(chunks):
            for chunk in some:
                self._job.push(index, chunk)
        row, body = self.row, self._job.result()
        if flat:
            return line_of(row.key, row.custom_id, error=None, **_flat(body))
        response = {"status_code": 200, "request_id": f"req_{row.key:016x}", "body": body}
        return line_of(row.key, row.custom_id, error=None, response=response)


def _flat(body: Mapping[str, Any]) -> dict[str, Any]:
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in body["choices"]]
    reasons = [choice["finish_reason"] for choice in body["choices"]]
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    if len(texts) == 1:
        return {"text": texts[0], "finish_reason": reasons[0], **usage}
    return {"texts": texts, "finish_reasons": reasons, **usage}


def error_line(row: Row, error: BaseException, *, flat: bool) -> bytes:
    """Encode a row's error as a line of the output."""
    message = spell(error.message) if isinstance(error, ExlError) else f"unexpected {type(error).__name__}: {error}"
    code = error.code if isinstance(error, BodyError) else _CODES.get(type(error), "engine_failed")
    told = {"code": code, "message": f"line {row.number}: {message}", "line": row.number}
    return line_of(row.key, row.custom_id, error=told, **({"text": None} if flat else {"response": None}))


class Preparer:
    """Turns rows into tasks.

    Args:
        model: the model.
        settings: defaults for what rows do not set.

    Raises:
        UsageError, PromptError: the settings are invalid for this model.

    Attributes:
        has_chat_template: the model has one.
        ignored: names of fields in rows that were ignored as unknown, a thousand of them at most.
    """

    def __init__(self, model: BatchModel, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self.has_chat_template = not isinstance(model.chat_format, PlainFormat)
        self._is_plain = settings.raw or not self.has_chat_template
        if settings.system and self._is_plain:
            why = param("raw") if settings.raw else f"{model.name} has no chat template"
            raise UsageError(f"{param('system')} needs a chat template: {why}", "put it into the prompts")
        as_run = build(settings.sampling, settings.preset, model.info.generation_config).to_dict()
        preset = PRESETS[settings.preset] if settings.preset else {}
        common: dict[str, Any] = {"stop": list(settings.stop)} if settings.stop else {}
        if settings.max_new_tokens is not None:
            common["max_tokens"] = settings.max_new_tokens
        self._as_served = {**preset, **settings.sampling, **common}
        self._as_run = {**as_run, "max_tokens": _MAX_NEW_TOKENS, **common}
        self._placeholders = [] if settings.template is None else placeholders(settings.template)
        self.ignored: set[str] = set()

    def check_columns(self, columns: Sequence[str]) -> None:
        """Reject a table none of whose rows can make a prompt.

        Raises:
            UsageError: it lacks the prompt column, or a column that the template needs.
        """
        needed = ["prompt"] if self._settings.template is None else self._placeholders
        if missing := next((name for name in needed if name not in columns), None):
            has = f"there is no column {missing!r}, only {', '.join(map(repr, columns))}"
            raise UsageError(brief(has, 400), f"name columns in {param('template')}, e.g. 'Translate: {{text}}'")

    def prepare(self, row: Row) -> Task:
        """Turn a row into a task.

        Raises:
            ExlError: the row is unusable.
        """
        if row.error is not None:
            raise row.error
        record = dict(row.record)
        record.pop("custom_id", None)
        if self._settings.template is not None:
            record = {"prompt": self._filled(self._settings.template, record)}
        elif row.is_table:
            record = {"prompt": record.get("prompt")}
        if "body" in record or "url" in record:
            return self._served(row, record)
        if "messages" in record:
            return Task(row, ChatJob(self._body(ChatBody, row, record, self._as_run), self._model))
        prompt = record.get("prompt")
        if prompt in ("", []):
            raise BodyError("the prompt is empty", field="prompt")
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise BodyError(f"prompt must be text or token ids, got {brief(json.dumps(prompt))}", field="prompt")
        if prompt is None:
            raise BodyError('no prompt: the line has neither "prompt" nor "messages" nor "body"')
        if self._is_plain or not isinstance(prompt, str):
            return Task(row, CompletionJob(self._body(CompletionBody, row, record, self._as_run), self._model))
        del record["prompt"]
        record["messages"] = [{"role": "user", "content": prompt}]
        if self._settings.system:
            record["messages"].insert(0, {"role": "system", "content": self._settings.system})
        return Task(row, ChatJob(self._body(ChatBody, row, record, self._as_run), self._model))

    def _filled(self, template: str, record: Mapping[str, Any]) -> str:
        if missing := next((name for name in self._placeholders if name not in record), None):
            raise BodyError(f"the template needs a field {missing!r}, which is missing")
        values = {name: text_of(record[name]) for name in self._placeholders}
        if self._is_plain:  # elsewhere the chat's messages see to it
            values = {name: self._model.tokenizer.as_text(value) for name, value in values.items()}
        return fill(template, values)

    def _served(self, row: Row, record: Mapping[str, Any]) -> Task:
        url, body = record.get("url"), record.get("body")
        if record.get("method", "POST") != "POST":
            raise BodyError("method must be POST")
        if url not in _URLS:
            raise BodyError(f"url must be one of {', '.join(_URLS)}")
        if not isinstance(body, dict):
            raise BodyError("body must be a JSON object")
        if url == _URLS[0]:
            return Task(row, ChatJob(self._body(ChatBody, row, body, self._as_served), self._model))
        return Task(row, CompletionJob(self._body(CompletionBody, row, body, self._as_served), self._model))

    def _body(self, kind: type[Any], row: Row, record: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
        sent = {name: value for name, value in record.items() if name not in ("stream", "stream_options", "model")}
        sent = {name: value for name, value in sent.items() if ALIASES.get(name, name) != "seed" or value != -1}
        # Readers of JSON that use doubles represent integers of up to 53 bits exactly.
        seed = hashed("seed", str(self._settings.seed), f"{row.key:016x}") >> 11
        body: Body = kind.parse(sent, {**defaults, "seed": seed})
        if len(self.ignored) < _MOST_IGNORED:
            self.ignored.update(body.ignored)
        return body
