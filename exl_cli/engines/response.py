"""Turn an engine's tokens into a response: detokenization, stop conditions, timings."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from exl_cli.engines.base import Chunk, Event, FinishReason, Request, Summary, TokenLogprobs
from exl_cli.errors import ContextLengthError, PromptError, UsageError, param
from exl_cli.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    """Result of one forward pass for a request.

    Attributes:
        token_ids: new tokens; none during prefill.
        prompt_seconds: set once, on the first step after prefill.
        reused_tokens: set with prompt_seconds: prompt tokens taken from the KV cache.
        drafted_tokens, accepted_tokens: of this pass; see `base.Summary`.
        note: replaces the summary's note; None keeps it.
        logprobs: for each token, if requested.
        prompt_logprobs: set with prompt_seconds, if requested: for each prompt token but the first.
    """

    token_ids: tuple[int, ...] = ()
    prompt_seconds: float | None = None
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    note: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Decoder(Protocol):
    """Incremental detokenizer; holds incomplete characters back."""

    def push(self, token_id: int) -> str:
        """The text this token completes; empty for special tokens."""
        ...

    def special(self, token_id: int) -> str:
        """A special token's text; empty for any other token."""
        ...


class StopScanner:
    """Finds the earliest stop string in streamed text; holds back text that may begin one.

    Special tokens are pushed as hidden text: never output, but searched, since a stop string may contain them.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._hidden: list[bool] = []  # for each held character
        self._ignored = 0  # a stop string may not end within the first so many held characters

    def push(self, text: str, *, hidden: bool = False, ignored: bool = False) -> tuple[str, bool]:
        """Add text; return what can be output now, and whether a stop string ends in it (never in `ignored` text)."""
        if not self._stops:
            return "" if hidden else text, False
        self._held += text
        self._hidden += [hidden] * len(text)
        if ignored:
            self._ignored = len(self._held)
        begins = ((stop, max(self._ignored + 1 - len(stop), 0)) for stop in self._stops)
        starts = [start for stop, begin in begins if (start := self._held.find(stop, begin)) >= 0]
        if starts:
            out = self._release(min(starts))
            self._held, self._hidden = "", []
            return out, True
        return self._release(len(self._held) - max(self._overlap(stop) for stop in self._stops)), False

    def flush(self) -> str:
        """Output what is held back, at the end of the text."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        """Remove the first `count` held characters and return those not hidden."""
        text, hidden = self._held[:count], self._hidden[:count]
        self._held, self._hidden = self._held[count:], self._hidden[count:]
        self._ignored = max(self._ignored - count, 0)
        return "".join(char for char, is_hidden in zip(text, hidden, strict=True) if not is_hidden)

    def _overlap(self, stop: str) -> int:
        """Length of the longest proper prefix of `stop` that the held text ends with."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0


def check_can_fit(
    least_tokens: int, context_length: int, most: int | None = None, *, counted: str = " or more"
) -> None:
    """Refuse a text that cannot fit, before tokenizing it; see `Tokenizer.least_tokens`.

    Args:
        least_tokens: the text's.
        context_length: the allocated context, in tokens.
        most: the longest context that the model supports; None if unknown.

    Raises:
        ContextLengthError: with both numbers.
    """
    if least_tokens >= context_length:
        raised = f", or raise {param('max_seq_len')}, up to {most:,}" if context_length < (most or 0) else ""
        raise ContextLengthError(
            f"the prompt has {least_tokens:,} tokens{counted}, but the context holds {context_length:,}, "
            "including the response",
            f"shorten the prompt{raised}",
        )


def check_fits(prompt_tokens: int, context_length: int, most: int | None = None) -> None:
    """Refuse a prompt without tokens, or one that leaves no room for a new token; see `check_can_fit`."""
    if prompt_tokens == 0:
        raise PromptError("the prompt is empty", f"pass some text with {param('prompt')}")
    check_can_fit(prompt_tokens, context_length, most, counted="")


def check_known(ids: Sequence[int], rows: int, tokenizer: Tokenizer) -> None:
    """Refuse token ids without an embedding; some tokenizers define more tokens than the model has.

    Args:
        ids: the prompt.
        rows: number of the model's embeddings.
        tokenizer: for the token's name.

    Raises:
        PromptError: naming the first such token.
    """
    if max(ids, default=0) >= rows:
        first = next(id_ for id_ in ids if id_ >= rows)
        raise PromptError(
            f"the prompt has the token {tokenizer.token(first)!r} (id {first:,}), "
            f"but the model only has ids below {rows:,}",
            "remove it; the tokenizer has more tokens than the model",
        )


def check_settings(request: Request, rows: int) -> None:
    """Validate logit_bias, min_new_tokens, logprobs and banned_strings; `rows` is the number of logits.

    Raises:
        UsageError: naming the field.
    """
    for id_, bias in request.logit_bias.items():
        if not 0 <= id_ < rows:
            raise UsageError(f"{param('logit_bias')} names the token {id_:,}, but the model only has 0 to {rows - 1:,}")
        if not (abs(bias) <= 100 or bias == -math.inf):
            raise UsageError(f"{param('logit_bias')} of token {id_:,} must be between -100 and 100, got {bias:g}")
    counts = {"min_new_tokens": request.min_new_tokens, "logprobs": request.logprobs or 0}
    for name, count in {**counts, "prompt_logprobs": request.prompt_logprobs or 0}.items():
        if count < 0:
            raise UsageError(f"{param(name)} must be at least 0, got {count}")
    if request.min_new_tokens > request.max_new_tokens:
        raise UsageError(
            f"{param('min_new_tokens')} is {request.min_new_tokens:,}, "
            f"{param('max_new_tokens')} {request.max_new_tokens:,}",
            f"lower {param('min_new_tokens')} or raise {param('max_new_tokens')}",
        )
    if not all(request.banned_strings):
        raise UsageError(f"{param('banned_strings')} contains an empty string", "remove it")


def new_token_limit(request: Request, context_length: int) -> int:
    """`max_new_tokens`, capped by the context."""
    return min(request.max_new_tokens, context_length - len(request.ids))


class Response:
    """Builds the chunks and the summary of one request from its steps.

    Args:
        request: the request.
        decoder: decoder for the new tokens.
        context_length: most tokens of prompt and response.

    Attributes:
        max_new_tokens: most tokens that will be taken.
        ended: whether a stop id, a stop string or the token limit was reached.
    """

    def __init__(self, request: Request, decoder: Decoder, context_length: int) -> None:
        self._request = request
        self._decoder = decoder
        self._scanner = StopScanner(request.stop_strings)
        self.max_new_tokens = new_token_limit(request, context_length)
        self.ended = False
        self._reason: FinishReason = "length"
        self._start = self._last = time.perf_counter()
        self._first = self._prompt_seconds = 0.0
        self._count = self._reused = self._drafted = self._accepted = 0
        self._note = ""

    def take(self, step: Step) -> list[Chunk]:
        """The chunks for a step; once `ended`, the last one carries the summary."""
        if step.prompt_seconds is not None:
            self._prompt_seconds, self._reused = step.prompt_seconds, step.reused_tokens
        self._drafted += step.drafted_tokens
        self._accepted += step.accepted_tokens
        self._note = self._note if step.note is None else step.note
        chunks = self._decode(step.token_ids, step.logprobs)
        if chunks:
            self._last = time.perf_counter()
            self._first = self._first or self._last - self._start
        if self._count >= self.max_new_tokens and (self._count or step.prompt_seconds is not None):
            self.ended = True
        if step.prompt_logprobs:
            chunks.insert(0, Chunk("", prompt_logprobs=step.prompt_logprobs))
        return [*chunks, self._end()] if self.ended else chunks

    def finish(self, *, cancelled: bool = False) -> Chunk:
        """The last chunk of a response that ends without reaching a stop condition."""
        if cancelled:
            self._reason = "cancelled"
        return self._end()

    def _decode(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> list[Chunk]:
        """Decode tokens up to the first stop condition. A special token ends its chunk, to show where it stands."""
        chunks: list[Chunk] = []
        token_ids = token_ids[: self.max_new_tokens - self._count]
        begin, text = 0, ""
        for end, token_id in enumerate(token_ids, 1):
            self._count += 1
            special = self._decoder.special(token_id)
            ignored = self._count <= self._request.min_new_tokens
            if token_id in self._request.stop_ids:
                more, self.ended = self._scanner.flush(), True
            else:
                more, self.ended = self._scanner.push(self._decoder.push(token_id), ignored=ignored)
                if special and not self.ended:
                    text += more
                    more, self.ended = self._scanner.push(special, hidden=True, ignored=ignored)
            text += more
            if special or self.ended or end == len(token_ids):
                chunks.append(Chunk(text, token_ids[begin:end], logprobs=logprobs[begin:end]))
                begin, text = end, ""
            if self.ended:
                self._reason = "stop"
                break
        return chunks

    def _end(self) -> Chunk:
        summary = Summary(
            finish_reason=self._reason,
            prompt_tokens=len(self._request.ids),
            reused_tokens=self._reused,
            new_tokens=self._count,
            prompt_seconds=self._prompt_seconds,
            generation_seconds=max(self._last - self._start - self._prompt_seconds, 0.0),
            first_token_seconds=self._first,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            note=self._note,
        )
        return Chunk("" if self._reason == "stop" else self._scanner.flush(), (), summary)


class GeneratorEngine(ABC):
    """An engine that runs each request as a generator of steps, round-robin.

    A subclass provides `name`, `context_length` and the rest of `base.Engine`.
    """

    context_length: int
    max_batch = 1

    def __init__(self) -> None:
        self._responses: dict[int, tuple[Response, Generator[Step, None, None]]] = {}
        self._cancelled: set[int] = set()

    @abstractmethod
    def _decoder(self, request: Request) -> Decoder:
        """A decoder for a request's new tokens."""

    @abstractmethod
    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        """Run a request. The generator is closed when the response has ended.

        Args:
            request: the request.
            is_cancelled: lets long steps check for cancellation and return early.
        """

    def check(self, request: Request) -> None:
        check_fits(len(request.ids), self.context_length)

    def add(self, request_id: int, request: Request) -> None:
        response = Response(request, self._decoder(request), self.context_length)
        steps = self._steps(request, lambda: request_id in self._cancelled)
        self._responses[request_id] = response, steps

    def cancel(self, request_id: int) -> None:
        if request_id in self._responses:
            self._cancelled.add(request_id)

    def step(self) -> Iterable[Event]:
        for request_id, (response, steps) in list(self._responses.items()):
            chunks: list[Chunk | BaseException] = []
            try:
                step = None if request_id in self._cancelled else next(steps, None)
                if step is not None:
                    chunks += response.take(step)
                cancelled = request_id in self._cancelled
                if not response.ended and (step is None or cancelled):
                    chunks.append(response.finish(cancelled=cancelled))
                ended = step is None or response.ended or cancelled
            except BaseException as error:
                chunks.append(error)
                ended = True
            if ended:
                del self._responses[request_id]
                self._cancelled.discard(request_id)
                steps.close()
            for chunk in chunks:
                yield request_id, chunk
