"""What a pass reads besides the weights, where CUDA graphs can find it: at addresses that never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exl_cli.engines.exllamav2.passes import Row


def _plain_weights(embedding: Any) -> npt.NDArray[np.int16] | None:
    """The embeddings, two bytes a number, where a token's are just a row of them; None where more is done to them.

    A lookup in NumPy takes two microseconds, in torch forty, and the GPU waits for it.
    """
    params, weight = embedding.archparams, embedding.embedding.weight
    if params.residual_stream_fp32 or params.normalize_embeddings:
        return None
    if weight.device.type != "cpu" or weight.dtype != torch.half or not weight.is_contiguous():
        return None
    plain: npt.NDArray[np.int16] = weight.detach().view(torch.int16).numpy()
    return plain


class Inputs:
    """Lengths, tables and embeddings of a pass's rows, filled on the CPU and copied to the device in one go each.

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
        self._weights = _plain_weights(embedding)
        self._most_rows = most_rows
        self._spare_page = spare_page
        size = most_rows * (1 + table_width)
        self._numbers = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self._numbers_there = torch.empty(size, dtype=torch.int32, device=device)
        self._lengths = self._numbers[:most_rows].numpy()
        self._table = self._numbers[most_rows:].view(most_rows, table_width).numpy()
        self._states = torch.empty((most_tokens, hidden), dtype=dtype, pin_memory=True)
        self.hidden = torch.empty((most_tokens, hidden), dtype=dtype, device=device)
        self.lengths = self._numbers_there[:most_rows]
        self.table = self._numbers_there[most_rows:].view(most_rows, table_width)

    def fill(self, rows: Sequence[Row], batch: int, tokens: int) -> None:
        """Write rows where `send` will find them.

        Args:
            rows: at most `batch`.
            batch: sequences of the pass; those that are not there have no past and live on the spare page.
            tokens: of each; behind the end of a row's table its tokens live on the spare page, too.
        """
        ids = np.zeros((batch, tokens), dtype=np.int64)
        self._table[:batch] = self._spare_page
        self._lengths[:batch] = 0
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = row.ids
            self._lengths[index] = row.start
            self._table[index, : len(row.table)] = row.table
        states = self._states[: batch * tokens]
        if self._weights is None:
            states.copy_(self._embedding.forward(torch.from_numpy(ids)).view(batch * tokens, -1))
        else:
            np.take(self._weights, ids.ravel(), axis=0, out=states.view(torch.int16).numpy(), mode="clip")

    def send(self, batch: int, tokens: int) -> None:
        """Copy to the device what `fill` wrote, in order with what runs there. May be captured in a graph."""
        used = self._most_rows + batch * self.table.shape[1]
        self._numbers_there[:used].copy_(self._numbers[:used], non_blocking=True)
        count = batch * tokens
        self.hidden[:count].copy_(self._states[:count], non_blocking=True)
