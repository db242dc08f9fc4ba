"""Embeddings of prompts: looked up on the CPU, where exllamav2 leaves them, and copied to the GPU meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Of a prompt, looked up before they are copied: so little that it stays in the processor's cache.
_ROWS = 256


def plain_weights(embedding: Any) -> npt.NDArray[np.int16] | None:
    """The table of exllamav2's embedding module, two bytes a number, where a token's embedding is just a row of it.

    A lookup in NumPy takes two microseconds, in torch forty, and the GPU waits for it.

    Returns:
        Shape (vocabulary, hidden), or None where more is done to embeddings.
    """
    params, weight = embedding.archparams, embedding.embedding.weight
    if params.residual_stream_fp32 or params.normalize_embeddings:
        return None
    if weight.device.type != "cpu" or weight.dtype != torch.half or not weight.is_contiguous():
        return None
    plain: npt.NDArray[np.int16] = weight.detach().view(torch.int16).numpy()
    return plain


class Embeddings:
    """Gives the embeddings of prompts.

    exllamav2 0.3.2 looks up all of them, into memory that is new each time, and copies that through the driver's own
    buffer: on an H100's host the first layer of 2,048 tokens began after six milliseconds, and begins after four now.

    Args:
        embedding: exllamav2's embedding module.
        device: where its embeddings are wanted.
    """

    def __init__(self, embedding: Any, device: torch.device) -> None:
        self._embedding, self._device = embedding, device
        self._table = plain_weights(embedding)
        # Two, each with the event of its last copy: while one is copied, the other is written.
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        if self._table is not None:
            for _ in range(2):
                on_gpu = device.type == "cuda"
                buffer = torch.empty((_ROWS, self._table.shape[1]), dtype=torch.half, pin_memory=on_gpu)
                event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
                self._buffers.append((buffer, event))

    def of(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """The embeddings of some tokens, in order with what the current stream does.

        Args:
            ids: shape (tokens,).

        Returns:
            Shape (1, tokens, hidden), on the device.
        """
        if self._table is None:
            found: torch.Tensor = self._embedding.forward(torch.from_numpy(ids)[None]).to(self._device)
            return found
        states = torch.empty((len(ids), self._table.shape[1]), dtype=torch.half, device=self._device)
        for index, target in enumerate(torch.split(states, _ROWS)):
            buffer, copied = self._buffers[index % len(self._buffers)]
            if copied is not None:
                copied.synchronize()
            source, some = buffer[: len(target)], ids[index * _ROWS : index * _ROWS + len(target)]
            # Without a mode that forgives, it would write to memory of its own first.
            self._table.take(some, axis=0, out=source.view(torch.int16).numpy(), mode="clip")
            target.copy_(source, non_blocking=True)
            if copied is not None:
                copied.record()
        return states[None]
