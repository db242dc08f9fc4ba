"""Collect a generation's chunks for the text APIs: text, reasoning, log-probabilities, usage, finish reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from exl_cli.engines.base import Chunk, Request, Summary, TokenLogprobs
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.structured.reasoning import Splitter

# OpenAI's log-probability of a banned token; JSON has no infinity.
_LEAST = -9999.0


@dataclass
class Delta:
    """What a chunk adds to a choice."""

    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.logprobs)


class Choice:
    """One of a response's choices.

    Args:
        request: the engine request behind it.
        special: special tokens to include in its text, by id.
        splitter: separates reasoning from text; None if all is text.
        is_wanted: False if only the prompt matters (max_tokens 0): generated tokens are discarded.

    Attributes:
        text, reasoning: everything so far.
        logprobs, prompt_logprobs: of its tokens and of the prompt's.
        completion_tokens, reasoning_tokens: counts so far.
        summary: set at the end.
    """

    def __init__(
        self,
        request: Request,
        special: Mapping[int, str],
        splitter: Splitter | None = None,
        *,
        is_wanted: bool = True,
    ) -> None:
        self._special = {id_: text for id_, text in special.items() if id_ not in request.stop_ids}
        self._splitter = splitter
        self._is_wanted = is_wanted
        self.request = request
        self.text = self.reasoning = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: Sequence[TokenLogprobs] = ()
        self.reasoning_tokens = 0
        self.summary: Summary | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache; 0 before the end."""
        return self.summary.reused_tokens if self.summary else 0

    @property
    def finish_reason(self) -> str | None:
        """ "stop" or "length"; None before the end."""
        if self.summary is None:
            return None
        return self.summary.finish_reason if self._is_wanted else "length"

    def push(self, chunk: Chunk) -> Delta:
        """Add the next chunk."""
        self.summary = chunk.summary or self.summary
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        if not self._is_wanted:
            return Delta()
        delta = Delta(logprobs=list(chunk.logprobs))
        # A special token always ends its chunk, so appending its text keeps the order.
        text = chunk.text + "".join(self._special.get(id_, "") for id_ in chunk.token_ids)
        if self._splitter is None:
            delta.text = text
        else:
            pieces = self._splitter.push(text) + (self._splitter.flush() if chunk.summary else [])
            delta.text = "".join(piece.text for piece in pieces if piece.kind == "answer")
            delta.reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        self.token_ids += chunk.token_ids
        self.logprobs += delta.logprobs
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.reasoning_tokens += len(chunk.token_ids) if delta.reasoning else 0
        return delta


class Job(Protocol):
    """A parsed body: its engine requests, and the response built from their chunks."""

    requests: list[Request]

    def push(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Add a chunk of request `index`; returns the stream events it causes."""
        ...

    def end(self) -> list[dict[str, Any]]:
        """Stream events after the last chunk."""
        ...

    def result(self) -> dict[str, Any]:
        """The whole response, after the last chunk."""
        ...


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Log-probabilities in the shape of chat completions: each token with its alternatives, and their bytes."""

    def entry(id_: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(id_)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}

    return [
        {**entry(item.token_id, item.logprob), "top_logprobs": [entry(id_, logprob) for id_, logprob in item.top]}
        for item in logprobs
    ]


def text_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: Sequence[int]
) -> dict[str, Any]:
    """Log-probabilities in the format of completions; None for the first token of a text."""
    return {
        "tokens": [_token_text(tokenizer, id_) for id_ in token_ids],
        "token_logprobs": [None if item is None else max(item.logprob, _LEAST) for item in logprobs],
        "top_logprobs": [None if item is None else _by_text(tokenizer, item) for item in logprobs],
        "text_offset": list(offsets),
    }


def _by_text(tokenizer: Tokenizer, item: TokenLogprobs) -> dict[str, float]:
    values: dict[str, float] = {}
    for id_, logprob in (*item.top, (item.token_id, item.logprob)):
        values.setdefault(_token_text(tokenizer, id_), max(logprob, _LEAST))
    return values


def _token_text(tokenizer: Tokenizer, id_: int) -> str:
    """A token's text; for part of a character, its bytes in OpenAI's notation."""
    data = tokenizer.token_bytes(id_)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
