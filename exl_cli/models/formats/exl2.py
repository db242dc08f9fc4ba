"""EXL2, exllamav2's format: groups of rows with 2, 3, 4, 5, 6 or 8 bits per weight, mixed within a layer.

A layer with K inputs and N outputs is stored as

| tensor | type | shape | contents |
|---|---|---|---|
| `q_weight` | int32 | [words, N] | packed codes |
| `q_groups` | int16 | [2 * groups] | per group: bits, first row in `q_weight` |
| `q_scale` | int32 | [groups, N / 8] | 4-bit scales per group and column, eight per word, lowest bits first |
| `q_scale_max` | float16 | [groups] | a factor per group |
| `q_invperm` | int32 or int16 | [K] | packed row of each input |

Codes: a group of r rows with b bits takes r * b / 32 rows of words. Within a column, from the top and lowest bit
first, the words form one bit string, and row i of the group has bits i * b to i * b + b - 1. Codes of 3, 5 and 6 bits
can span two words. The last group holds the remaining rows of K, and only it may end inside a word.

Weights: `(code - 2 ** (b - 1)) * scale`, with `scale = (q_scale + 1) ** 2 * (q_scale_max / 256)`. The division and the
product are both rounded to float16. The rounding is part of the format: `q_scale_max / 256` is often subnormal, off by
0.5 % and more, and the converter chose the codes for the rounded scale.

Rows: the converter sorts the inputs by importance, so that important ones get more bits. Input k is in packed row
`q_invperm[k]`.

Sign: `q_groups` and an int16 `q_invperm` hold unsigned values (older torch has no uint16), and large layers exceed
32767.

Source: exllamav2 0.3.2. Written by `conversion/adaptivegptq.py` (`AdaptiveGPTQ.pack`, `AdaptiveQuantizer.find_params`)
and `exllamav2_ext/cuda/pack_tensor.cu`; read by `ext.py` (`make_q_matrix`), `exllamav2_ext/cuda/q_matrix.cu` and
`exllamav2_ext/cuda/quant/qdq_util.cuh` (`dq_scale`). The bit order documented in `quant/qdq_*.cuh` is that of
exllamav2's shuffled copy in GPU memory, not of the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from exl_cli.models.formats.common import Layout, dequantize, require_finite, unpack_nibbles
from exl_cli.models.formats.quantized_layers import damaged

BIT_WIDTHS = (2, 3, 4, 5, 6, 8)


def unpack(tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32, name: str = "") -> Tensor:
    """Dequantize a layer to `torch.nn.Linear`'s weight, [N, K]. Computes in float32.

    Args:
        tensors: the layer's tensors, validated by `quantized_layers`.
        dtype: dtype of the result.
        name: the layer's name, for error messages.

    Raises:
        DamagedModelError: invalid contents.
    """
    words = tensors["q_weight"]
    scales = _scales(tensors, name)
    order = _order(tensors, name)
    bits, layout = _layout(tensors, len(scales), words, len(order), name)
    zeros = (1 << (bits - 1)).to(torch.float32)[:, None]
    layout = Layout(*(part[order].to(words.device) for part in (layout.word, layout.shift, layout.bits, layout.group)))
    return dequantize(words, layout, zeros.to(words.device), scales, dtype)


def _unsigned(tensor: Tensor) -> Tensor:
    """Widen int32, or uint16 stored as int16, to int64 on the CPU."""
    wide = tensor.cpu().to(torch.int64)
    return wide & 0xFFFF if tensor.dtype == torch.int16 else wide


def _scales(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Scales, float32 [groups, N]; the rounding to float16 is deliberate, see the module docstring."""
    factor = tensors["q_scale_max"]
    require_finite(factor, "q_scale_max", name)
    steps = unpack_nibbles(tensors["q_scale"]).add_(1).square_().to(torch.float16)
    return (steps * (factor / 256)[:, None]).to(torch.float32)


def _order(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Packed row of each input, int64 [K]."""
    order = _unsigned(tensors["q_invperm"])
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise damaged(name, "q_invperm", f"is not a permutation of 0 to {len(order) - 1}")
    return order


def _layout(tensors: Mapping[str, Tensor], groups: int, words: Tensor, rows: int, name: str) -> tuple[Tensor, Layout]:
    """Bits of each group, int64 [groups], and the layout of the packed rows."""
    bits, start = _unsigned(tensors["q_groups"]).view(groups, 2).unbind(1)
    height = _heights(bits, start, len(words), rows, name)
    group = torch.arange(groups).repeat_interleave(height)
    first = height.cumsum(0) - height
    bit = (torch.arange(rows) - first[group]) * bits[group]
    return bits, Layout(start[group] + bit // 32, (bit % 32).int(), bits[group].int(), group)


def _heights(bits: Tensor, start: Tensor, words: int, rows: int, name: str) -> Tensor:
    """Rows of each group, int64 [groups], after validating `q_groups`."""
    for group, width in enumerate(bits.tolist()):
        if width not in BIT_WIDTHS:
            raise damaged(name, "q_groups", f"group {group} has {width} bits; the format allows 2, 3, 4, 5, 6 and 8")
    size = torch.diff(start, append=torch.tensor([words]))
    if int(start[0]) or bool((size <= 0).any()):
        raise damaged(name, "q_groups", f"the groups' first rows are not ascending within {words} rows of q_weight")
    if bool((size * 32 % bits)[:-1].any()):
        raise damaged(name, "q_groups", "a group other than the last does not have a whole number of rows")
    height = size * 32 // bits
    height[-1] = rows - int(height[:-1].sum())
    needed = -(-int(height[-1]) * int(bits[-1]) // 32)
    if int(height[-1]) <= 0 or needed != int(size[-1]):
        raise damaged(name, "q_groups", f"the groups fill {words} rows of q_weight, but not {rows} rows of weights")
    return height
