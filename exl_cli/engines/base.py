"""What every engine is: token ids in, a stream of chunks out. Nothing here knows of prompts, chats or terminals.

Timing rules, the same for every engine, so that their numbers compare:

- *prompt* is the evaluation of all prompt tokens but the last, from the call to the moment the device has finished;
- *response* is one forward pass for each new token (the first of them evaluates the last prompt token), or for several
  where tokens are proposed and verified, with its sampling and its decoding to text;
- *time to first token* runs from the call to the moment the first new token has been decoded.

Loading the model, tokenizing and rendering the prompt are not part of any of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
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
        max_new_tokens: the most tokens to generate.
        seed: fixes the random choices: the same request on the same engine gives the same tokens. Exceptions, where two
            tokens nearly tie: requests that share a pass with others, and models on the GPU that exl's own kernels do
            not take, for exllamav2's add up in an order that varies.
        stop_strings: text that ends the generation; it is not part of the output.
        stop_ids: token ids that end the generation, besides none; pass the model's own end-of-sequence ids here.
        cancel: set it from anywhere to end the generation at the next opportunity with reason "cancelled".
    """

    ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    seed: int
    stop_strings: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    cancel: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)


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
        note: what else whoever reads the numbers should know, as a rule nothing.
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
    """

    text: str
    token_ids: tuple[int, ...] = ()
    summary: Summary | None = None


@runtime_checkable
class Engine(Protocol):
    """A loaded model.

    Attributes:
        name: "exllamav2", "cpu" or another engine's own name.
        context_length: the most tokens, prompt and response together, that it can hold.
    """

    name: str
    context_length: int

    @property
    def facts(self) -> dict[str, str]:
        """What a report should say of it, as things stand: device, dtype, attention, cache and the like, in words."""
        ...

    def stream(self, request: Request) -> Iterator[Chunk]:
        """Generate. The last chunk carries the summary; closing the iterator early cancels the job.

        Raises:
            UsageError: before the first token, for a sampling field that this engine does not have.
            OutOfMemoryError: when the device runs out of memory on the way.
        """
        ...

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits of every position, on the CPU: shape (len(ids), vocabulary). For code inside `engines/`."""
        ...

    def memory(self) -> list[DeviceMemory]:
        """The GPUs in use; empty where the engine uses none."""
        ...

    def close(self) -> None:
        """Give the memory back. The engine cannot be used afterwards; closing twice is fine."""
        ...


@runtime_checkable
class BatchingEngine(Engine, Protocol):
    """An engine that computes several requests in one pass: those whose streams are iterated over at the same time.

    Attributes:
        max_batch: the most requests in one pass.
    """

    max_batch: int


@runtime_checkable
class CachedScoring(Protocol):
    """An engine whose KV cache may be quantized, so that reading it back changes what is computed."""

    def cached_logits(self, ids: Sequence[int], step: int) -> torch.Tensor:
        """`Engine.logits`, `step` tokens a pass, so that keys and values of all earlier ones come from the cache."""
        ...
