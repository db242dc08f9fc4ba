"""EXL2, the format of exllamav2: a weight whose rows take 2, 3, 4, 5, 6 or 8 bits each, group by group.

A layer of K input and N output features is stored as

| tensor | type | shape | holds |
|---|---|---|---|
| `q_weight` | int32 | [words, N] | the codes of all rows |
| `q_groups` | int16 | [2 * groups] | for each group its bits, then the row of `q_weight` where it begins |
| `q_scale` | int32 | [groups, N / 8] | a number from 0 to 15 per group and column, eight in a word, lowest bits first |
| `q_scale_max` | float16 | [groups] | a factor per group |
| `q_invperm` | int32 or int16 | [K] | for each input feature the packed row that holds its weights |

Codes. A group of r rows with b bits takes r * b / 32 rows of words. Read in one column from the top, lowest bit first,
those words are one string of bits, and the code of the group's i-th row is its bits i * b to i * b + b - 1. With 3, 5
and 6 bits a code may begin in one word and end in the next. Only the last group may end inside a word. Its rows are
those that are left of K, so the groups need not be of equal size.

Weights. `(code - 2 ** (b - 1)) * scale`, where `scale = (q_scale + 1) ** 2 * (q_scale_max / 256)`. Both products of
the scale are rounded to float16. That rounding is part of the format: `q_scale_max / 256` often is a subnormal
float16, off by half a percent and more, and the converter chose the codes with the rounded scale in hand.

Rows. The converter sorts the input features by their importance before it packs them, so that the more important
ones get more bits. Input feature k lies in packed row `q_invperm[k]`.

Sign. torch knows no uint16 in old files: the row numbers in `q_groups` and an int16 `q_invperm` are unsigned all the
same, and large layers do pass 32767.

Defined by exllamav2 0.3.2: `conversion/adaptivegptq.py` (`AdaptiveGPTQ.pack`, `AdaptiveQuantizer.find_params`) and
`exllamav2_ext/cuda/pack_tensor.cu` write it; `ext.py` (`make_q_matrix`), `exllamav2_ext/cuda/q_matrix.cu` and
`exllamav2_ext/cuda/quant/qdq_util.cuh` (`dq_scale`) read it. The bit order that `quant/qdq_*.cuh` describe in their
comments is one that exllamav2 makes in GPU memory while loading; files do not have it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from exl_cli.models.formats.common import Layout, dequantize, require_finite, unpack_nibbles
from exl_cli.models.formats.quantized_layers import damaged

BIT_WIDTHS = (2, 3, 4, 5, 6, 8)


def unpack(tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32, name: str = "") -> Tensor:
    """Return the weight of a layer as `torch.nn.Linear` has it: [N, K], output features first.

    Args:
        tensors: the layer's tensors, of the types and shapes that `quantized_layers` requires.
        dtype: of the result. The arithmetic is float32 in any case.
        name: the layer's name, for error messages.

    Raises:
        DamagedModelError: a tensor holds what the format does not allow.
    """
    words = tensors["q_weight"]
    scales = _scales(tensors, name)
    order = _order(tensors, name)
    bits, layout = _layout(tensors, len(scales), words, len(order), name)
    zeros = (1 << (bits - 1)).to(torch.float32)[:, None]
    layout = Layout(*(part[order].to(words.device) for part in (layout.word, layout.shift, layout.bits, layout.group)))
    return dequantize(words, layout, zeros.to(words.device), scales, dtype)


def _unsigned(tensor: Tensor) -> Tensor:
    """Return int16 that stands for uint16, or int32, as int64 in the CPU's memory."""
    wide = tensor.cpu().to(torch.int64)
    return wide & 0xFFFF if tensor.dtype == torch.int16 else wide


def _scales(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the scale of every group and column, float32 [groups, N]."""
    factor = tensors["q_scale_max"]
    require_finite(factor, "q_scale_max", name)
    steps = unpack_nibbles(tensors["q_scale"]).add_(1).square_().to(torch.float16)
    return (steps * (factor / 256)[:, None]).to(torch.float32)


def _order(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the packed row of every input feature, int64 [K]."""
    order = _unsigned(tensors["q_invperm"])
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise damaged(name, "q_invperm", f"is not a permutation of 0 to {len(order) - 1}")
    return order


def _layout(tensors: Mapping[str, Tensor], groups: int, words: Tensor, rows: int, name: str) -> tuple[Tensor, Layout]:
    """Return the bits of every group, int64 [groups], and where the code of each packed row lies."""
    bits, start = _unsigned(tensors["q_groups"]).view(groups, 2).unbind(1)
    height = _heights(bits, start, len(words), rows, name)
    group = torch.arange(groups).repeat_interleave(height)
    first = height.cumsum(0) - height
    bit = (torch.arange(rows) - first[group]) * bits[group]
    return bits, Layout(start[group] + bit // 32, (bit % 32).int(), bits[group].int(), group)


def _heights(bits: Tensor, start: Tensor, words: int, rows: int, name: str) -> Tensor:
    """Return the number of rows of every group, int64 [groups], once the table of groups is known to be sound."""
    for group, width in enumerate(bits.tolist()):
        if width not in BIT_WIDTHS:
            raise damaged(name, "q_groups", f"group {group} has {width} bits, the format knows 2, 3, 4, 5, 6 and 8")
    size = torch.diff(start, append=torch.tensor([words]))
    if int(start[0]) or bool((size <= 0).any()):
        raise damaged(name, "q_groups", f"the groups do not begin one after another within {words} rows of q_weight")
    if bool((size * 32 % bits)[:-1].any()):
        raise damaged(name, "q_groups", "a group other than the last does not hold a whole number of rows")
    height = size * 32 // bits
    height[-1] = rows - int(height[:-1].sum())
    needed = -(-int(height[-1]) * int(bits[-1]) // 32)
    if int(height[-1]) <= 0 or needed != int(size[-1]):
        raise damaged(name, "q_groups", f"the groups fill {words} rows of q_weight, but not {rows} rows of weights")
    return height
