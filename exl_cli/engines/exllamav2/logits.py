"""Buffers for the logits of forward passes, on the device and in page-locked host memory.

CUDA graphs write to the former, so their addresses never change. A small set serves passes of few tokens, a large one
those of many; each is allocated on its first use.
"""

from __future__ import annotations

import torch

from exl_cli.engines.exllamav2.kernels import quantized_linear


class LogitsBuffers:
    """Logits of the passes in flight; float32, shape (tokens, vocabulary), each row's tokens one after another.

    Args:
        max_batch: most sequences in a pass.
        vocab_size: logits per token.
        device: where they are computed.
    """

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device) -> None:
        self._max_batch, self._vocab_size, self._device = max_batch, vocab_size, device
        # By their number of rows.
        self._device_buffers: dict[int, torch.Tensor] = {}
        self._host_buffers: dict[int, torch.Tensor] = {}
        # By the number of the part of a pass.
        self._kept: dict[int, torch.Tensor] = {}
        # Views of the host buffers, by the arguments of `view`.
        self._views: dict[tuple[int, int, int], torch.Tensor] = {}

    def on_device(self, tokens: int) -> torch.Tensor:
        """The device buffer for a pass of this many tokens; may have more rows."""
        most = self._rows(tokens)
        if most not in self._device_buffers:
            self._device_buffers[most] = torch.empty((most, self._vocab_size), dtype=torch.float32, device=self._device)
        return self._device_buffers[most]

    def on_host(self, tokens: int) -> torch.Tensor:
        """The page-locked buffer for the same."""
        most = 1 if tokens == 1 else self._rows(tokens)
        if most not in self._host_buffers:
            self._host_buffers[most] = torch.empty((most, self._vocab_size), dtype=torch.float32, pin_memory=True)
        return self._host_buffers[most]

    def _rows(self, tokens: int) -> int:
        few = quantized_linear.MOST_ROWS
        return few if tokens <= few else quantized_linear.most_rows(self._max_batch)

    @torch.inference_mode()
    def keep(self, part: int, rows: int) -> None:
        """Copy the logits of a part of a pass, of one token per row, on the device: the next part overwrites them."""
        logits = self.on_device(rows)
        kept = self._kept.get(part)
        if kept is None or len(kept) < rows:
            kept = self._kept[part] = torch.empty_like(logits)
        kept[:rows].copy_(logits[:rows])

    def kept(self, part: int) -> torch.Tensor:
        """The copy that `keep` made."""
        return self._kept[part]

    def view(self, rows: int, longest: int, tokens: int) -> torch.Tensor:
        """The host's logits of a pass, shape (rows, longest, vocabulary).

        Args:
            rows: number of sequences.
            longest: tokens of the longest row.
            tokens: tokens computed per row, padding included.
        """
        key = (rows, longest, tokens)
        view = self._views.get(key)
        if view is None:
            logits = self.on_host(rows * tokens)[: rows * tokens]
            view = self._views[key] = logits.view(rows, tokens, -1)[:, :longest]
        return view


def soft_cap(logits: torch.Tensor, cap: float | None) -> None:
    """Squash logits into ±cap, in place; without a cap, leave them."""
    if cap:
        logits.div_(cap).tanh_().mul_(cap)
