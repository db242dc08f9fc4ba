"""The arithmetic from codes to weights, which both packed formats share.

Both keep a weight of `K` input and `N` output features with the inputs along the rows. A column's codes are little
numbers written one after another, lowest bits first, into the 32-bit words of that column; words are stored as int32
though they are bit patterns, so a shift to the right must not carry the sign along. Rows come in groups; a group has
one scale per column, and the weight is `(code - zero) * scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl_cli.models.formats.quantized_layers import damaged

# A block of this many weights keeps the intermediate tensors (five, of four bytes each) in or near the CPU's caches.
BLOCK_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class Layout:
    """Where the codes of the weight's K rows lie, row by row: four tensors [K].

    Attributes:
        word: index of the row of words in which the code begins, int64.
        shift: bit of that word at which it begins, int32, 0 to 31; what does not fit goes on in the next word.
        bits: width of the code, int32.
        group: index of the group whose scale and zero apply, int64.
    """

    word: Tensor
    shift: Tensor
    bits: Tensor
    group: Tensor


def require_finite(tensor: Tensor, key: str, name: str) -> None:
    """Raise DamagedModelError where the tensor holds an infinity or a NaN."""
    if not bool(torch.isfinite(tensor).all()):
        raise damaged(name, key, "holds values that are not finite")


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return the eight 4-bit fields of every int32, lowest first: int32 [G, C] becomes int32 [G, 8 * C]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return (packed.unsqueeze(2) >> shifts).bitwise_and_(15).flatten(1)


def dequantize(words: Tensor, layout: Layout, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the weight [N, K], a block of rows at a time.

    Args:
        words: packed codes, int32 [rows of words, N].
        layout: where the code of each of the K rows lies.
        zeros: code of the weight 0, float32 [groups, N], or [groups, 1] where the columns share it.
        scales: weight of one step of the code, float32 [groups, N].
        dtype: of the result.
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
    """Return the codes of a block of rows, int32 [rows, N]."""
    word, shift, bits = layout.word[block], layout.shift[block], layout.bits[block]
    here = torch.minimum(bits, 32 - shift)
    codes = words.index_select(0, word)
    # The shift copies the sign downwards; the mask leaves only bits that were in the word.
    codes.bitwise_right_shift_(shift[:, None]).bitwise_and_(_ones(here)[:, None])
    split = (here < bits).nonzero().squeeze(1)
    if len(split):
        rest = words.index_select(0, word[split] + 1).bitwise_and_(_ones(bits - here)[split][:, None])
        codes.index_add_(0, split, rest.bitwise_left_shift_(here[split][:, None]))
    return codes


def _ones(count: Tensor) -> Tensor:
    """Return int32 masks with that many low bits set; a code has 8 bits at most."""
    return (1 << count) - 1
