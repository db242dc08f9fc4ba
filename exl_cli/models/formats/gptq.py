"""GPTQ with 4 bits, as AutoGPTQ and its successor GPTQModel write it.

A layer of K input and N output features is stored as

| tensor | type | shape | holds |
|---|---|---|---|
| `qweight` | int32 | [K / 8, N] | the codes, eight rows in a word, lowest bits first |
| `qzeros` | int32 | [groups, N / 8] | the zero point per group and column, eight columns in a word, lowest bits first |
| `scales` | float16, bfloat16 or float32 | [groups, N] | the scale per group and column |
| `g_idx` | int32 or int64 | [K] | the group of each row; may be absent |

Weights. Row k of column n is `(code - zero) * scale` with the zero and the scale of row k's group.

Zero points. The original convention ("gptq") stores the zero less one (`zero_offset=1`), "gptq_v2" the zero itself
(`zero_offset=0`). A stored 15 of the former gives 16, as in exllamav2's kernels; some versions of AutoGPTQ made 0 of
it. Which of them a file follows `quantized_layers.gptq_settings` finds out.

Groups. With act-order (`desc_act`) rows were quantized in the order of their importance but stay where they were, so
that `g_idx` may name the groups in any order. Without, group g has the rows from g * group_size on; the last group
may be short, and a group size of -1 means one group. A `g_idx` of zeros only, with more than one group, is a thing
some writers leave behind: like exllamav2 we take it for absent.

Defined by AutoGPTQ's `auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py` and `qlinear_cuda.py` (`pack`, `forward`). As
exllamav2 0.3.2 reads it: `ext.py` (`make_q_matrix`), `exllamav2_ext/cuda/q_matrix.cu` (`reconstruct_gptq_kernel`,
`make_sequential`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from exl_cli.models.formats.common import Layout, dequantize, require_finite, unpack_nibbles
from exl_cli.models.formats.quantized_layers import damaged, group_size_of


def unpack(
    tensors: Mapping[str, Tensor],
    *,
    zero_offset: int,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Tensor:
    """Return the weight of a layer as `torch.nn.Linear` has it: [N, K], output features first.

    Args:
        tensors: the layer's tensors, of the types and shapes that `quantized_layers` requires.
        zero_offset: what to add to the stored zero points: 1 for "gptq", 0 for "gptq_v2".
        group_size: rows in a group, -1 for all. It counts only where `g_idx` does not tell; None derives it from K
            and the number of groups.
        dtype: of the result. The arithmetic is float32 in any case.
        name: the layer's name, for error messages.

    Raises:
        DamagedModelError: a tensor holds what the format does not allow.
    """
    words, scales = tensors["qweight"], tensors["scales"]
    rows = 8 * words.shape[0]
    require_finite(scales, "scales", name)
    zeros = unpack_nibbles(tensors["qzeros"]) + zero_offset
    group = _groups(tensors, len(scales), rows, group_size, name).to(words.device)
    row = torch.arange(rows, device=words.device)
    layout = Layout(row // 8, (row % 8 * 4).int(), torch.full_like(row, 4, dtype=torch.int32), group)
    return dequantize(words, layout, zeros.to(torch.float32), scales.to(torch.float32), dtype)


def _groups(tensors: Mapping[str, Tensor], groups: int, rows: int, group_size: int | None, name: str) -> Tensor:
    """Return the group of every row, int64 [K]."""
    if "g_idx" in tensors:
        index = tensors["g_idx"]
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise damaged(name, "g_idx", f"names groups {low} to {high}, scales has 0 to {groups - 1}")
        if high > 0:
            return index.to(torch.int64)
    if group_size is None:
        group_size = group_size_of(rows, groups)
        if not group_size:
            raise damaged(name, "scales", f"has {groups} groups, which cannot divide {rows} rows between them")
    elif group_size <= 0:
        group_size = rows
    if -(-rows // group_size) != groups:
        raise damaged(name, "scales", f"has {groups} groups, {rows} rows in groups of {group_size} need another number")
    return torch.arange(rows) // group_size
