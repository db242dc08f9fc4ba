"""From the tokens that an engine computes to a response: decoding, stop strings, the end, the timings."""

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
    """What one pass of an engine gave.

    Attributes:
        token_ids: new tokens, in order; none while the prompt is being evaluated.
        prompt_seconds: set once, on the first step after the prompt was evaluated and the device had finished.
        reused_tokens: with prompt_seconds: prompt tokens whose keys and values were still in the cache.
        drafted_tokens, accepted_tokens: of this pass; see `base.Summary`.
        note: what the summary should say, as far as it can be told by now; None for what it said before.
        logprobs: of each token, where asked for.
        prompt_logprobs: with prompt_seconds, where asked for: of each token of the prompt but the first.
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
    """Turns tokens into text one at a time, holding back incomplete characters."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; special tokens have none."""
        ...

    def special(self, token_id: int) -> str:
        """A special token as it is written in text; empty for any other token."""
        ...


class StopScanner:
    """Finds the first stop string in a stream of text, holding back what may still become one.

    Of several stop strings the one that begins first wins; of those that begin together, the longest already complete.
    Hidden text, that of special tokens, is searched as well but never output: a stop string may be a special token, or
    hold some.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._hidden: list[bool] = []  # of each held character
        self._ignored = 0  # of the held characters the first so many complete no stop string

    def push(self, text: str, *, hidden: bool = False, ignored: bool = False) -> tuple[str, bool]:
        """Text that is certain to be output, and whether a stop string was met; ignored text completes none."""
        if not self._stops:
            return "" if hidden else text, False
        self._held += text
        self._hidden += [hidden] * len(text)
        if ignored:
            self._ignored = len(self._held)
        ends = ((stop, max(self._ignored + 1 - len(stop), 0)) for stop in self._stops)
        places = [at for stop, begin in ends if (at := self._held.find(stop, begin)) >= 0]
        if places:
            out = self._release(min(places))
            self._held, self._hidden = "", []
            return out, True
        return self._release(len(self._held) - max(self._overlap(stop) for stop in self._stops)), False

    def flush(self) -> str:
        """What was held back: no stop string came of it."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        """Output the first `count` held characters, those that are not hidden."""
        text, hidden = self._held[:count], self._hidden[:count]
        self._held, self._hidden = self._held[count:], self._hidden[count:]
        self._ignored = max(self._ignored - count, 0)
        return "".join(char for char, is_hidden in zip(text, hidden, strict=True) if not is_hidden)

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins this stop string."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0


def check_can_fit(least_tokens: int, context_length: int, *, counted: str = " or more") -> None:
    """Refuse a text that cannot fit before it is tokenized; see `Tokenizer.least_tokens`.

    Raises:
        ContextLengthError: with both numbers.
    """
    if least_tokens >= context_length:
        raise ContextLengthError(
            f"the prompt has {least_tokens:,} tokens{counted}, the context holds {context_length:,}, "
            "the response included",
            f"shorten the prompt, or raise {param('max_seq_len')} if the model allows it",
        )


def check_fits(prompt_tokens: int, context_length: int) -> None:
    """Refuse a prompt without tokens, or one that leaves no room for a single new token.

    Raises:
        PromptError: with both numbers.
    """
    if prompt_tokens == 0:
        raise PromptError("the prompt has no tokens", f"give some text with {param('prompt')}")
    check_can_fit(prompt_tokens, context_length, counted="")


def check_known(ids: Sequence[int], rows: int, tokenizer: Tokenizer) -> None:
    """Refuse a prompt with a token that the model has no embedding for, as a stray token added to a tokenizer is.

    Args:
        ids: the prompt.
        rows: embeddings of the model.
        tokenizer: what made the ids.

    Raises:
        PromptError: with the first such token.
    """
    if max(ids, default=0) >= rows:
        first = next(id_ for id_ in ids if id_ >= rows)
        raise PromptError(
            f"the prompt has the token {tokenizer.token(first)!r} (id {first:,}), the model knows ids below {rows:,}",
            "leave it out; the tokenizer has more tokens than the model",
        )


def check_settings(request: Request, rows: int) -> None:
    """Refuse what a request says of its new tokens if it makes no sense.

    Args:
        request: what was asked for.
        rows: logits that the model computes.

    Raises:
        UsageError: naming the field.
    """
    for id_, bias in request.logit_bias.items():
        if not 0 <= id_ < rows:
            raise UsageError(
                f"{param('logit_bias')} names the token {id_:,}, the model has those from 0 to {rows - 1:,}"
            )
        if not (abs(bias) <= 100 or bias == -math.inf):
            raise UsageError(f"{param('logit_bias')} of token {id_:,} must be -100 to 100, got {bias:g}")
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
        raise UsageError(f"{param('banned_strings')} has an empty text", "leave it out")


def new_token_limit(request: Request, context_length: int) -> int:
    """The most tokens that a request can get."""
    return min(request.max_new_tokens, context_length - len(request.ids))


class Response:
    """The response to one request: text in chunks, the end, and the timings (see `base` for their rules).

    Args:
        request: what to generate.
        decoder: decodes the new tokens.
        context_length: the most tokens that prompt and response may have together.

    Attributes:
        max_new_tokens: the most tokens that will be taken.
        ended: whether a stop id, a stop string or the limit was met.
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
        """The chunks that a step gives; the last of them has the summary once `ended` is true."""
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
        """The last chunk of a response that gets no further tokens."""
        if cancelled:
            self._reason = "cancelled"
        return self._end()

    def _decode(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> list[Chunk]:
        """Chunks of as many of these tokens as count. A special token ends its chunk: its place is known so."""
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
    """An engine that computes each request with a generator of steps; the requests under way take turns.

    A subclass gives `name`, `context_length` and what else `base.Engine` asks for.
    """

    context_length: int
    max_batch = 1

    def __init__(self) -> None:
        self._responses: dict[int, tuple[Response, Generator[Step, None, None]]] = {}
        self._cancelled: set[int] = set()

    @abstractmethod
    def _decoder(self, request: Request) -> Decoder:
        """Decodes the new tokens of a request."""

    @abstractmethod
    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        """Compute a request. The generator is closed once no more is wanted.

        Args:
            request: what to generate.
            is_cancelled: whether it has been cancelled; for work that can be cut short inside a step, by returning.
        """

    def check(self, request: Request) -> None:
        """See `base.Engine.check`."""
        check_fits(len(request.ids), self.context_length)

    def add(self, request_id: int, request: Request) -> None:
        """See `base.Engine.add`."""
        response = Response(request, self._decoder(request), self.context_length)
        steps = self._steps(request, lambda: request_id in self._cancelled)
        self._responses[request_id] = response, steps

    def cancel(self, request_id: int) -> None:
        """See `base.Engine.cancel`."""
        if request_id in self._responses:
            self._cancelled.add(request_id)

    def step(self) -> Iterable[Event]:
        """See `base.Engine.step`."""
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
