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
    """A token chosen on the device.

    Attributes:
        token: its id.
        logprobs: as far as they were asked for.
    """

    token: int
    logprobs: TokenLogprobs | None


# A sequence's place in the memory of the device's sampler.
Seat = Any


# In place of a token's id: the one that the device chose for the row's seat behind the pass before.
PENDING = -1


class Draw(NamedTuple):
    """What is to be chosen behind a pass: the token after `ids`, and none of `banned`.

    Attributes:
        pending: whether the row's token is `PENDING`, and so comes between.
    """

    seat: Seat
    ids: Sequence[int]
    banned: Collection[int]
    pending: bool = False


class TokenSampler(Protocol):
    """Chooses tokens on the device, as the CPU's sampler would."""

    def begin(self, sampler: Sampler, request: Request) -> Seat | None:
        """A seat for a sequence that is about to decode; None where the CPU has to sample it."""
        ...

    def end(self, seat: Seat) -> None:
        """Give a seat back."""
        ...


class ModelRunner(Protocol):
    """A model with its paged KV cache.

    Attributes:
        sampler: chooses tokens on the device; None where the CPU chooses all.
        pends: whether a pass may take tokens that have not reached the CPU yet.
        page_size: positions per page.
        pages: number of pages, numbered from 0.
        max_batch: most sequences per `submit`.
        max_tokens: most tokens per `submit` of one sequence. For several sequences, their number times the length of
            the longest is at most max(max_batch, max_tokens).
        vocab_size: logits per position.
        rope_switches: ascending lengths. When a sequence grows beyond one, its RoPE frequencies change, and all its
            keys and values must be computed again.
    """

    page_size: int
    pages: int
    max_batch: int
    max_tokens: int
    vocab_size: int
    rope_switches: Sequence[int]

    @property
    def sampler(self) -> TokenSampler | None: ...

    @property
    def pends(self) -> bool: ...

    def prefill(self, row: ScheduledTokens) -> None:
        """Compute the keys and values of any number of tokens. Asynchronous."""
        ...

    def synchronize(self) -> None:
        """Wait for the device to finish all work."""
        ...

    def submit(self, rows: Sequence[ScheduledTokens], draws: Sequence[Draw | None] = ()) -> None:
        """Start one forward pass; returns at once. `collect` gets its logits, and must precede the next `submit`.

        Where all its tokens are `PENDING`, it may follow another that has not been collected yet, if `pends`.

        With `draws`, one for each row, and rows of one token, the tokens that follow are chosen on the device, but for
        rows where it is None: `chosen` gets them.

        Rows may differ in length. Positions behind a row's last token, in its own last page, may be overwritten with
        meaningless keys and values.
        """
        ...

    def collect(self) -> torch.Tensor:
        """Wait for the first pass that has not been collected, and return its logits.

        They are float32, on the CPU, of the shape (rows, longest row, vocabulary).
        Logits behind a shorter row's last token are meaningless, as are those of rows whose token was chosen on the
        device. The next `submit` overwrites them all.
        """
        ...

    def chosen(self) -> Sequence[Chosen | None]:
        """For each row of the pass that was collected, the token chosen on the device; None where none was.

        Empty where the pass had no `draws`.
        """
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page's keys and values into another page, in stream order."""
        ...
