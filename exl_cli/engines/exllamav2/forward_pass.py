"""What the scheduler asks of a model: forward passes over tokens whose keys and values live in pages.

The KV cache is a pool of pages of `page_size` positions each. A sequence owns a list of them, its block table: position
p lies in page `block_table[p // page_size]`, at `p % page_size`. The scheduler alone decides who owns which page; a
forward pass reads and writes where its block tables say.
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
    """Consecutive tokens of one sequence.

    Attributes:
        ids: the tokens to evaluate, at least one, at positions start, start + 1, …; each sees all positions before it.
        start: positions of the sequence that are in the cache already.
        block_table: the sequence's pages, enough for start + len(ids) positions.
        rope_table: how many of `ModelRunner.rope_switches` the sequence has passed.
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
        pends: whether a pass may take tokens that the CPU has not seen.
        page_size: positions in a page.
        pages: pages that a scheduler may use, numbered from 0.
        max_batch: the most sequences of one `submit`.
        max_tokens: the most tokens of a `submit` of one sequence. With several, their number times the longest one's
            tokens stays within `max_batch` or `max_tokens`, whichever is larger.
        vocab_size: logits of a position.
        rope_switches: lengths, ascending; a sequence of more tokens than one of them has other keys and values, from
            the first token on.
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
        """Put the keys and values of any number of tokens into the cache. Returns once that is under way."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done everything asked of it."""
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
        """Copy all keys and values of one page into another, in order with the forward passes."""
        ...
