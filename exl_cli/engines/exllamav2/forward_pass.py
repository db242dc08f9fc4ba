"""What the scheduler asks of a model on the GPU: passes over tokens whose keys and values live in pages.

The KV cache is a pool of pages of `page_size` positions each. A sequence owns a list of pages, its table: position p
lies in page `table[p // page_size]`, at `p % page_size`. Who owns which page is the scheduler's business alone; a pass
reads and writes where its rows say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """Consecutive tokens of one sequence.

    Attributes:
        ids: the tokens to evaluate, at least one, at positions start, start + 1, …; each sees all positions before it.
        start: how many positions of the sequence are in the cache already.
        table: the sequence's pages, enough for start + len(ids) positions.
    """

    ids: tuple[int, ...]
    start: int
    table: Sequence[int]


class Forward(Protocol):
    """A model with its paged KV cache, on the GPU or pretending to be.

    Attributes:
        page_size: positions in a page.
        pages: pages that a scheduler may use, numbered from 0.
        max_batch: the most rows of one `submit`.
        max_tokens: the most tokens of one row of a `submit`, where it is the only row; less where there are several:
            rows times the longest row's tokens stay within `max_batch` or `max_tokens`, whichever is larger.
        vocab_size: logits of a position.
    """

    page_size: int
    pages: int
    max_batch: int
    max_tokens: int
    vocab_size: int

    def prefill(self, row: Row) -> None:
        """Put a row's keys and values, of any length, into the cache. Returns once that is under way."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        ...

    def submit(self, rows: Sequence[Row]) -> None:
        """Start one pass; returns at once. Its logits come from `collect`, which must follow before the next `submit`.

        Rows may differ in length. Positions behind a row's last token, in its own last page, may be overwritten with
        keys and values of no meaning.
        """
        ...

    def collect(self) -> torch.Tensor:
        """Wait for the pass and return its logits: float32, on the CPU, shape (rows, longest row, vocabulary).

        What lies behind a shorter row's last token has no meaning. The memory is used again by the next `submit`.
        """
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy all keys and values of one page into another, in order with the passes."""
        ...
