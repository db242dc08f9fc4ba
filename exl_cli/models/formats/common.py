"""Dequantization shared by EXL2 and GPTQ.

Both store a weight of K inputs and N outputs as a [K, N] matrix of small integer codes. The codes of a column are
packed into that column's 32-bit words, lowest bits first. The words are unsigned but stored as int32, so a right shift
needs masking. Rows form groups with one scale per column, and a weight is `(code - zero) * scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl_cli.models.formats.quantized_layers import damaged

# Weights dequantized at a time, chosen to keep five 4-byte intermediates in or near the CPU's cache.
BLOCK_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class Layout:
    """Where to find the codes of each of K rows; tensors of shape [K].

    Attributes:
        word: index of the packed row with the code's first bit, int64.
        shift: that bit's position in the word, int32, 0 to 31; a code may continue in the next word.
        bits: width of the code, int32.
        group: index into zeros and scales, int64.
    """

    word: Tensor
    shift: Tensor
    bits: Tensor
    group: Tensor


def require_finite(tensor: Tensor, key: str, name: str) -> None:
    """Raise DamagedModelError for infinities and NaNs."""
    if not bool(torch.isfinite(tensor).all()):
        raise damaged(name, key, "contains values that are not finite")


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack the eight 4-bit fields of each int32, lowest first: [G, C] to [G, 8 * C], int32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return (packed.unsqueeze(2) >> shifts).bitwise_and_(15).flatten(1)


def dequantize(words: Tensor, layout: Layout, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize to a weight [N, K], a block of rows at a time.

    Args:
        words: packed codes, int32 [packed rows, N].
        layout: position and width of each row's code.
        zeros: zero points, float32 [groups, N] or [groups, 1].
        scales: float32 [groups, N].
        dtype: dtype of the result.
    """
    rows, columns = len(layout.word), words.shape[1]
    out = torch.empty((columns, rows), dtype=dtype, device=words.device)
    height = max(32, BLOCK_WEIGHTS // columns)
    with torch.no_grad():
        for start in range(0, rows, height):
            block = slice(start, start + height)
            group = layout.group[block]
            weight = _codes(words, layout, block).to(torch.float32)
            weight.sub_(zeros.index_select(0, group)).mul_(scales.index_select(0, group))
            out[:, block].copy_(weight.t())
    return out


def _codes(words: Tensor, layout: Layout, block: slice) -> Tensor:
    """Unpack the codes of a block of rows, int32 [rows, N]."""
    word, shift, bits = layout.word[block], layout.shift[block], layout.bits[block]
    low_bits = torch.minimum(bits, 32 - shift)  # bits in the first word
    codes = words.index_select(0, word)
    # The shift is arithmetic; the mask removes the copies of the sign bit.
    codes.bitwise_right_shift_(shift[:, None]).bitwise_and_(_mask(low_bits)[:, None])
    # Add the high bits of codes that continue in the next word.
    split = (low_bits < bits).nonzero().squeeze(1)
    if len(split):
        high = words.index_select(0, word[split] + 1).bitwise_and_(_mask(bits - low_bits)[split][:, None])
        codes.index_add_(0, split, high.bitwise_left_shift_(low_bits[split][:, None]))
    return codes


def _mask(bits: Tensor) -> Tensor:
    return (1 << bits) - 1
