"""4-bit GPTQ, as written by AutoGPTQ and GPTQModel.

A layer with K inputs and N outputs is stored as

| tensor | type | shape | contents |
|---|---|---|---|
| `qweight` | int32 | [K / 8, N] | codes, eight rows per word, lowest bits first |
| `qzeros` | int32 | [groups, N / 8] | zero points per group and column, eight columns per word, lowest bits first |
| `scales` | float16, bfloat16 or float32 | [groups, N] | scales per group and column |
| `g_idx` | int32 or int64 | [K] | group of each row; optional |

Weights: `(code - zero) * scale`, with the zero point and scale of the row's group.

Zero points: "gptq" stores zero - 1 (`zero_offset=1`), "gptq_v2" stores zero (`zero_offset=0`). A stored 15 in "gptq"
means 16, as in exllamav2's kernels; some versions of AutoGPTQ wrap it to 0. `quantized_layers.gptq_settings` detects
which one a file uses.

Groups: with act-order (`desc_act`), rows were quantized by importance but are stored in their original order, so
`g_idx` is unordered. Without it, group g starts at row g * group_size; the last may be short, and group_size -1 means
one group. An all-zero `g_idx` with several groups is an artefact of some converters and counts as absent, as in
exllamav2.

Source: AutoGPTQ, `auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py` and `qlinear_cuda.py` (`pack`, `forward`). Read by
exllamav2 0.3.2 in `ext.py` (`make_q_matrix`) and `exllamav2_ext/cuda/q_matrix.cu` (`reconstruct_gptq_kernel`,
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
    """Dequantize a layer to `torch.nn.Linear`'s weight, [N, K]. Computes in float32.

    Args:
        tensors: the layer's tensors, validated by `quantized_layers`.
        zero_offset: added to the stored zero points: 1 for "gptq", 0 for "gptq_v2".
        group_size: rows per group, -1 for one group, None to derive it from the shapes. Used only without `g_idx`.
        dtype: dtype of the result.
        name: the layer's name, for error messages.

    Raises:
        DamagedModelError: invalid contents.
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
    """Group of each row, int64 [K]."""
    if "g_idx" in tensors:
        index = tensors["g_idx"]
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise damaged(name, "g_idx", f"refers to groups {low} to {high}, but scales has 0 to {groups - 1}")
        if high > 0:
            return index.to(torch.int64)
    if group_size is None:
        group_size = group_size_of(rows, groups)
        if not group_size:
            raise damaged(name, "scales", f"has {groups} groups, which cannot divide {rows} rows")
    elif group_size <= 0:
        group_size = rows
    if -(-rows // group_size) != groups:
        raise damaged(
            name, "scales", f"has {groups} groups, but {rows} rows in groups of {group_size} need a different number"
        )
    return torch.arange(rows) // group_size
