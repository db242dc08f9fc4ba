"""What all engines do alike with the tokens they compute: decode them, watch for the end, keep the time."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from exl_cli.engines.base import Chunk, FinishReason, Request, Summary
from exl_cli.errors import PromptError, param
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
    """

    token_ids: tuple[int, ...] = ()
    prompt_seconds: float | None = None
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    note: str | None = None


class Decoder(Protocol):
    """Turns tokens into text one at a time, holding back incomplete characters."""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        ...


class StopScanner:
    """Finds the first stop string in a stream of text, holding back what may still become one.

    Of several stop strings the one that begins first wins; of those that begin together, the longest already complete.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain to be output, and whether a stop string was met."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            out, self._held = self._held[: min(found)], ""
            return out, True
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """What was held back: no stop string came of it."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins this stop string."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0


def check_fits(prompt_tokens: int, context_length: int) -> None:
    """Refuse a prompt that leaves no room for a single new token.

    Raises:
        PromptError: with both numbers.
    """
    if prompt_tokens == 0:
        raise PromptError("the prompt has no tokens", f"give some text with {param('prompt')}")
    if prompt_tokens >= context_length:
        raise PromptError(
            f"the prompt has {prompt_tokens:,} tokens, the context holds {context_length:,}, the response included",
            f"shorten the prompt, or raise {param('max_seq_len')} if the model allows it",
        )


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


def run(request: Request, decoder: Decoder, context_length: int, steps: Generator[Step, None, None]) -> Iterator[Chunk]:
    """Drive an engine's steps to the end of the request; closes `steps`, and so cancels the job, however it ends.

    Args:
        request: what to generate.
        decoder: decodes the new tokens.
        context_length: most tokens that prompt and response may have together.
        steps: the engine's passes, started by the first `next`.
    """
    limit = min(request.max_new_tokens, context_length - len(request.ids))
    scanner = StopScanner(request.stop_strings)
    start = time.perf_counter()
    prompt_seconds = first = 0.0
    reused = count = drafted = accepted = 0
    note = ""
    reason: FinishReason = "length"
    last = start
    try:
        if request.cancel.is_set():
            reason, limit = "cancelled", 0
        for step in steps if limit > 0 else ():
            if step.prompt_seconds is not None:
                prompt_seconds, reused = step.prompt_seconds, step.reused_tokens
            drafted, accepted = drafted + step.drafted_tokens, accepted + step.accepted_tokens
            note = note if step.note is None else step.note
            text, taken, ended = _take(step.token_ids, request, decoder, scanner, limit - count)
            count += taken
            if taken:
                last = time.perf_counter()
                first = first or last - start
            if ended:
                reason = "stop"
            elif request.cancel.is_set():
                reason = "cancelled"
            if text or taken:
                yield Chunk(text, step.token_ids[:taken])
            if ended or count >= limit or reason == "cancelled":
                break
    finally:
        steps.close()
    summary = Summary(
        finish_reason=reason,
        prompt_tokens=len(request.ids),
        reused_tokens=reused,
        new_tokens=count,
        prompt_seconds=prompt_seconds,
        generation_seconds=max(last - start - prompt_seconds, 0.0),
        first_token_seconds=first,
        drafted_tokens=drafted,
        accepted_tokens=accepted,
        note=note,
    )
    yield Chunk("" if reason == "stop" else scanner.flush(), (), summary)


def _take(
    token_ids: tuple[int, ...], request: Request, decoder: Decoder, scanner: StopScanner, room: int
) -> tuple[str, int, bool]:
    """Text of as many of these tokens as count, how many that is, and whether the end was met."""
    pieces = ""
    for index, token_id in enumerate(token_ids[:room]):
        if token_id in request.stop_ids:
            return pieces + scanner.flush(), index + 1, True
        text, ended = scanner.push(decoder.push(token_id))
        pieces += text
        if ended:
            return pieces, index + 1, True
    return pieces, len(token_ids[:room]), False
