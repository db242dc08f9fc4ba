"""The engine interface: token ids in, chunks of text out. Prompts, chats and terminals live elsewhere.

One thread steps an engine (`api.engine_thread`): it adds requests, and each step yields chunks for some of them.
`Request` and `Chunk` are plain, picklable data; a request is cancelled by its id.

All engines measure time alike:

- *prompt*: prefill of all prompt tokens but the last, from the call until the device has finished;
- *generation*: the forward passes after that, with sampling and detokenization. The first one takes the last prompt
  token; each gives one new token, or several when draft tokens are accepted;
- *time to first token*: from the call until the first new token is decoded.

Model loading, tokenization and prompt rendering are not included.
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
    """One generation request.

    Attributes:
        ids: the prompt's token ids, at least one.
        sampling: sampler settings.
        max_new_tokens: most tokens to generate; 0 only evaluates the prompt.
        seed: makes sampling reproducible: the same request on the same engine gives the same tokens. Near ties may
            still fall differently in two cases: when a request is batched with others, and for models that run on
            exllamav2's kernels, whose order of summation varies.
        stop_strings: strings that end the generation; not part of the output.
        stop_ids: token ids that end the generation; pass the model's EOS ids.
        min_new_tokens: as in vLLM, stop ids are masked until then, and stop strings are ignored and stay in the output.
        logit_bias: added to logits, -100 to 100, after the penalties and before DRY; -inf bans a token.
        banned_strings: strings that must not be generated, compared case-insensitively and without special tokens. When
            one is completed, generation rewinds to its first token, which is banned at that position. Tokens that could
            begin one are held back.
        dry_sequence_breakers: strings that DRY does not match across; None for exllamav2's (see `dry.dry_breakers`).
        logprobs: with each new token, return its log-probability and this many of the most likely ones, from the raw
            model distribution; None for no log-probabilities.
        prompt_logprobs: the same for each prompt token but the first; bypasses the prefix cache.
        cache_salt: requests with different salts never share prefix-cache entries.
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
    """A token's log-probability, and the most likely alternatives.

    Attributes:
        token_id, logprob: the token; natural logarithm.
        top: (token id, logprob) of the requested number of tokens, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Summary:
    """How a generation ended, token counts, and timings as the module docstring defines them.

    Attributes:
        finish_reason: "stop" (a stop id or stop string), "length" (max_new_tokens) or "cancelled".
        prompt_tokens: tokens of the prompt.
        reused_tokens: prompt tokens taken from the prefix cache.
        new_tokens: generated tokens, including EOS.
        prompt_seconds, generation_seconds, first_token_seconds: the last is 0.0 if no token was generated.
        drafted_tokens: draft tokens verified in forward passes; 0 without speculation.
        accepted_tokens: draft tokens that matched the sampler's choice.
        note: a remark on the numbers, usually empty.
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
        """Prefill speed in tokens per second, without reused tokens; 0.0 if nothing was timed."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prompt_seconds)

    @property
    def generation_rate(self) -> float:
        """Decode speed in tokens per second; 0.0 if nothing was timed."""
        return _rate(self.new_tokens, self.generation_seconds)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of a generation.

    Attributes:
        text: complete characters, possibly none. The output is the concatenation of all chunks' texts.
        token_ids: new tokens since the last chunk. The text may lag behind by an incomplete character.
        summary: set on the last chunk only.
        logprobs: for each of `token_ids`, if requested.
        prompt_logprobs: on the first chunk, if requested: for each prompt token but the first.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    summary: Summary | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


# A request's id, and a chunk of its response or the exception that ended it.
Event = tuple[int, "Chunk | BaseException"]


class Engine(Protocol):
    """A loaded model. `add`, `step`, `logits` and `close` belong to one thread at a time; the rest is thread-safe.

    Attributes:
        name: "exllamav2", "cpu", or another engine's name.
        context_length: most tokens per request, prompt plus response.
        max_batch: most requests in flight.
    """

    name: str
    context_length: int
    max_batch: int

    @property
    def facts(self) -> dict[str, str]:
        """Device, dtype, attention backend, cache and the like, for reports."""
        ...

    def check(self, request: Request) -> None:
        """Refuse a request that can never run.

        Raises:
            PromptError: the prompt is empty, does not fit, or has a token id outside the vocabulary.
            UsageError: another field is invalid.
        """
        ...

    def add(self, request_id: int, request: Request) -> None:
        """Start a request that `check` accepted, with at most `max_batch` in flight.

        Raises:
            UsageError: a sampler setting that this engine does not support.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """End a request with finish reason "cancelled", in this step if it can be interrupted, else in the next.

        Ignored for a request that has ended.
        """
        ...

    def step(self) -> Iterable[Event]:
        """Advance the requests in flight, usually by one forward pass. A request's last chunk carries its summary."""
        ...

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits of every position: float32 on the CPU, [len(ids), vocabulary]."""
        ...

    def memory(self) -> list[DeviceMemory]:
        """Memory reserved on each GPU in use; empty on the CPU."""
        ...

    def close(self) -> None:
        """Free the model's memory. Idempotent; the engine cannot be used afterwards."""
        ...


@runtime_checkable
class CachedScoring(Protocol):
    """An engine whose KV cache may be quantized, which affects its logits."""

    def cached_logits(self, ids: Sequence[int], step: int) -> torch.Tensor:
        """`Engine.logits` with `step` tokens per forward pass, reading earlier keys and values back from the cache."""
        ...


@runtime_checkable
class PagedCache(Protocol):
    """An engine with a paged KV cache."""

    def pages(self) -> tuple[int, int]:
        """Pages held by requests, and pages in total. Thread-safe."""
        ...
