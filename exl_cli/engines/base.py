"""The interface of an engine: requests of token ids in, chunks of text out. No prompts, chats or terminals here.

An engine is stepped by one thread (`api.engine_thread`): requests are added, and each step gives some of them chunks.
`Request` and `Chunk` are plain data that can be pickled; a request is cancelled by its id.

Timing rules, the same for every engine, so that their numbers compare:

- *prompt* is the evaluation of all prompt tokens but the last, from the call to the moment the device has finished;
- *response* is one forward pass for each new token (the first of them evaluates the last prompt token), or for several
  where tokens are proposed and verified, with its sampling and its decoding to text;
- *time to first token* runs from the call to the moment the first new token has been decoded.

Loading the model, tokenizing and rendering the prompt are not part of any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from exl_cli.sampling import Sampling
from exl_cli.system.readings import DeviceMemory

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One generation to run.

    Attributes:
        ids: the prompt's token ids, at least one.
        sampling: how each next token is chosen.
        max_new_tokens: the most tokens to generate; with 0 the prompt is evaluated, and that is all.
        seed: fixes the random choices: the same request on the same engine gives the same tokens. Exceptions, where two
            tokens nearly tie: requests that share a forward pass with others, and models on the GPU that exl's own
            kernels do not take, since exllamav2's add up in an order that varies.
        stop_strings: text that ends the generation; it is not part of the output.
        stop_ids: token ids that end the generation; pass the model's own end-of-sequence ids here.
        min_new_tokens: until there are so many, no stop id is chosen and text that completes a stop string ends
            nothing, as in vLLM; such text stays in the output.
        logit_bias: what is added to the logits of tokens, -100 to 100, after the penalties and before DRY; minus
            infinity rules a token out.
        banned_strings: text that never comes, in upper or lower case, special tokens aside. Where it would, generation
            goes back to before it, and the token that began it is ruled out there. Tokens that may become such text are
            held back until that is settled.
        dry_sequence_breakers: text that DRY does not match across; None for exllamav2's (see `dry.dry_breakers`).
        logprobs: with each new token, its log-probability and those of so many of the likeliest, in the model's own
            distribution, before any setting; None for none.
        prompt_logprobs: the same for each token of the prompt but the first; nothing is taken from the prefix cache.
        cache_salt: prompts of different salts never share what the prefix cache holds.
    """

    ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    seed: int
    stop_strings: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_strings: tuple[str, ...] = ()
    dry_sequence_breakers: tuple[str, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability after what came before it, and those of the likeliest in its place.

    Attributes:
        token_id, logprob: the token's.
        top: the same of as many of the likeliest tokens as were asked for, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Summary:
    """How a generation ended and how long its parts took.

    Attributes:
        finish_reason: "stop" (a stop id or stop string), "length" (max_new_tokens) or "cancelled".
        prompt_tokens: tokens of the prompt.
        reused_tokens: how many of them were found in the KV cache and not computed again.
        new_tokens: tokens generated, an end-of-sequence token included.
        prompt_seconds, generation_seconds, first_token_seconds: see the module's timing rules; the last is 0.0
            where no token came.
        drafted_tokens: tokens that speculation proposed and a pass computed; 0 without speculation.
        accepted_tokens: how many of them were what the sampler chose.
        note: a remark for readers of the numbers, usually empty.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prompt_seconds: float
    generation_seconds: float
    first_token_seconds: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    note: str = ""

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, those reused left out; 0.0 where nothing was timed."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prompt_seconds)

    @property
    def generation_rate(self) -> float:
        """New tokens per second; 0.0 where nothing was timed."""
        return _rate(self.new_tokens, self.generation_seconds)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of a generation, in order.

    Attributes:
        text: whole characters only, possibly none; the chunks' texts joined are the output.
        token_ids: the new tokens since the last chunk; text may lag behind them by a held-back character.
        summary: on the last chunk, and only there.
        logprobs: of each of `token_ids`, where they were asked for.
        prompt_logprobs: on the first chunk, where they were asked for: of each token of the prompt but the first.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    summary: Summary | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


# A request's id with a chunk of its response, or with the exception that ended it.
Event = tuple[int, "Chunk | BaseException"]


class Engine(Protocol):
    """A loaded model. One thread at a time calls `add`, `step`, `logits` and `close`; the rest may be called from any.

    Attributes:
        name: "exllamav2", "cpu" or another engine's own name.
        context_length: the most tokens, prompt and response together, that it can hold.
        max_batch: the most requests that may be under way at once.
    """

    name: str
    context_length: int
    max_batch: int

    @property
    def facts(self) -> dict[str, str]:
        """Device, dtype, attention, cache and the like, in words, as things stand: for reports."""
        ...

    def check(self, request: Request) -> None:
        """Refuse a request that can never run.

        Raises:
            PromptError: it is empty, does not fit, or has a token that the model does not know.
            UsageError: another field that makes no sense, such as a bias of a token that the model does not know.
        """
        ...

    def add(self, request_id: int, request: Request) -> None:
        """Take up a request that `check` has passed; at most `max_batch` are under way.

        Raises:
            UsageError: for a sampling field that this engine does not have.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """End a request with finish reason "cancelled", in the step under way where that can be cut short, else in the
        next one. Does nothing for a request that has ended."""
        ...

    def step(self) -> Iterable[Event]:
        """Do the next piece of work for the requests under way. A request's last chunk carries its summary."""
        ...

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits of every position, on the CPU: shape (len(ids), vocabulary)."""
        ...

    def memory(self) -> list[DeviceMemory]:
        """The GPUs in use; empty where the engine uses none."""
        ...

    def close(self) -> None:
        """Give the memory back. The engine cannot be used afterwards; closing twice is fine."""
        ...


@runtime_checkable
class CachedScoring(Protocol):
    """An engine whose KV cache may be quantized, which changes the logits that are computed from it."""

    def cached_logits(self, ids: Sequence[int], step: int) -> torch.Tensor:
        """`Engine.logits`, `step` tokens a forward pass, so that earlier keys and values come from the cache."""
        ...


@runtime_checkable
class PagedCache(Protocol):
    """An engine whose KV cache consists of pages."""

    def pages(self) -> tuple[int, int]:
        """How many pages requests hold, and how many there are; may be called from any thread."""
        ...
