"""What a pass reads besides the weights, where CUDA graphs can find it: at addresses that never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from exl_cli.engines.exllamav2.embeddings import plain_weights
from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens

# Bytes: no kernel asks for more.
_ALIGNMENT = 256
_NOBODY = ScheduledTokens((), 0, [])


class Inputs:
    """Lengths, tables and embeddings of a pass's rows, filled on the CPU and copied to the device in one go.

    Args:
        embedding: exllamav2's embedding module; it stays on the CPU.
        hidden: numbers of an embedding.
        dtype: of the stream of hidden states.
        most_rows, most_tokens: sequences, and tokens of all of them together, of one pass.
        table_width: pages of the longest sequence, and one more for tokens that only fill up a pass.
        spare_page: a page that is nobody's.
        device: where the pass runs.

    Attributes:
        hidden: on the device, shape (most_tokens, hidden).
        lengths: int32 on the device, shape (most_rows,): positions in the cache before the pass.
        table: int32 on the device, shape (most_rows, table_width).
    """

    def __init__(
        self,
        embedding: Any,
        hidden: int,
        dtype: torch.dtype,
        most_rows: int,
        most_tokens: int,
        table_width: int,
        spare_page: int,
        device: torch.device,
    ) -> None:
        self._embedding = embedding
        weights = plain_weights(embedding)
        self._spare_page = spare_page
        self._state_bytes = hidden * dtype.itemsize
        # The numbers come first, all of them: a few bytes too many take less time than a second copy.
        numbers = most_rows * (1 + table_width)
        self._states_at = -(-4 * numbers // _ALIGNMENT) * _ALIGNMENT
        size = self._states_at + most_tokens * self._state_bytes
        self._here = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self._there = torch.empty(size, dtype=torch.uint8, device=device)

        def parts(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            whole = memory[: 4 * numbers].view(torch.int32)
            states = memory[self._states_at :].view(dtype).view(most_tokens, hidden)
            return whole[:most_rows], whole[most_rows:].view(most_rows, table_width), states

        lengths, table, self._states = parts(self._here)
        self._lengths, self._table = lengths.numpy(), table.numpy()
        self._plain = None if weights is None else (weights, self._states.view(torch.int16).numpy())
        # What each row of the table was written from.
        self._written: list[list[int] | None] = [None] * most_rows
        self.lengths, self.table, self.hidden = parts(self._there)

    def fill(self, rows: Sequence[ScheduledTokens], batch: int, tokens: int) -> None:
        """Write rows where `send` will find them.

        Args:
            rows: at most `batch`.
            batch: sequences of the pass; those that are not there have no past and live on the spare page.
            tokens: of each; behind the end of a row's table its tokens live on the spare page, too.
        """
        count = batch * tokens
        ids = np.zeros(count, dtype=np.int64)
        for index in range(batch):
            row = rows[index] if index < len(rows) else _NOBODY
            begin = index * tokens
            ids[begin : begin + len(row.ids)] = row.ids
            self._lengths[index] = row.start
            # As a rule it is what it was for the pass before.
            if self._written[index] != row.block_table:
                self._written[index] = None  # until it is whole: an interruption may come
                self._table[index] = self._spare_page
                self._table[index, : len(row.block_table)] = row.block_table
                self._written[index] = [*row.block_table]
        if self._plain is not None:
            weights, states = self._plain
            weights.take(ids, axis=0, out=states[:count], mode="clip")
        else:
            with torch.inference_mode():
                embeddings = self._embedding.forward(torch.from_numpy(ids).view(batch, tokens))
                self._states[:count].copy_(embeddings.view(count, -1))

    def send(self, batch: int, tokens: int) -> None:
        """Copy to the device what `fill` wrote, in order with what runs there. May be captured in a graph."""
        used = self._states_at + batch * tokens * self._state_bytes
        self._there[:used].copy_(self._here[:used], non_blocking=True)
