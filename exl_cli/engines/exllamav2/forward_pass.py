"""The interface between scheduler and model: forward passes over a paged KV cache.

The KV cache is a pool of pages of `page_size` positions. A sequence's block table lists its pages: position p is in
page `block_table[p // page_size]`, at offset `p % page_size`. Only the scheduler allocates pages; a forward pass reads
and writes where its block tables point.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from exl_cli.engines.base import Request, TokenLogprobs
from exl_cli.engines.sampling.sampler import Sampler

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScheduledTokens:
    """Consecutive tokens of one sequence, to be computed in a forward pass.

    Attributes:
        ids: at least one token, at positions start, start + 1, …; attention is causal.
        start: number of the sequence's positions already in the cache.
        block_table: the sequence's pages, enough for start + len(ids) positions.
        rope_table: number of `ModelRunner.rope_switches` that the sequence is longer than.
    """

    ids: tuple[int, ...]
    start: int
    block_table: Sequence[int]
    rope_table: int = 0


class Chosen(NamedTuple):
    """A token sampled on the device; `logprobs` is None unless requested."""

    token: int
    logprobs: TokenLogprobs | None


# A sequence's slot in the device's sampler.
Seat = Any


# Stands for the id of the token that the device sampled after the pass before, which has not reached the CPU yet.
PENDING = -1


class Draw(NamedTuple):
    """A token to sample after a forward pass.

    Attributes:
        seat: the sequence's.
        ids: its tokens so far, without a pending one.
        banned: ids not to choose.
        pending: whether the row's token is `PENDING`: then the sequence is `ids` plus that token.
    """

    seat: Seat
    ids: Sequence[int]
    banned: Collection[int]
    pending: bool = False


class TokenSampler(Protocol):
    """Samples on the device from the same distribution as the CPU's sampler."""

    def begin(self, sampler: Sampler, request: Request) -> Seat | None:
        """Assign a seat to a sequence that is about to decode; None if the CPU has to sample it."""
        ...

    def end(self, seat: Seat) -> None:
        """Release a seat."""
        ...


class ModelRunner(Protocol):
    """A model with its paged KV cache.

    Attributes:
        sampler: samples on the device; None if the CPU always samples.
        pends: whether `submit` accepts `PENDING` tokens.
        page_size: positions per page.
        pages: number of pages, numbered from 0.
        max_batch: most sequences per `submit`.
        max_tokens: most tokens per `submit` of one sequence. For several sequences, their number times the length of
            the longest is at most max(max_batch, max_tokens).
        prefill_block: `prefill` takes as long for fewer tokens of a sequence as for a multiple of this.
        vocab_size: logits per position.
        rope_switches: ascending lengths. When a sequence grows beyond one, its RoPE frequencies change, and all its
            keys and values must be computed again.
    """

    page_size: int
    pages: int
    max_batch: int
    max_tokens: int
    prefill_block: int
    vocab_size: int
    rope_switches: Sequence[int]

    @property
    def sampler(self) -> TokenSampler | None: ...

    @property
    def pends(self) -> bool: ...

    def prefill(self, *rows: ScheduledTokens) -> None:
        """Compute the keys and values of any number of tokens, of one sequence per row. Asynchronous."""
        ...

    def synchronize(self) -> None:
        """Wait for the device to finish all work."""
        ...

    def submit(self, rows: Sequence[ScheduledTokens], draws: Sequence[Draw | None] = ()) -> None:
        """Start a forward pass and return at once. `collect` returns its logits, and must precede the next `submit`.

        Exception: if `pends`, a pass whose tokens are all `PENDING` may be submitted before the one in flight is
        collected.

        Rows may differ in length. Positions after a row's last token, in its last page, may be overwritten with
        meaningless keys and values.

        Args:
            rows: one per sequence.
            draws: for rows of one token each: what to sample on the device for each row, None for nothing. `chosen`
                returns the tokens.
        """
        ...

    def collect(self) -> torch.Tensor:
        """Wait for the oldest pass in flight.

        Returns:
            Its logits: float32, on the CPU, shape (rows, longest row, vocabulary). Those after a shorter row's last
            token, and of rows sampled on the device, are meaningless. The next `submit` overwrites all.
        """
        ...

    def chosen(self) -> Sequence[Chosen | None]:
        """For each row of the pass collected last, the token sampled on the device; None if the CPU has to sample it.

        Empty if the pass had no `draws`.
        """
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page's keys and values into another page, in stream order."""
        ...
