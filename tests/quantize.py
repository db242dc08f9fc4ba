"""Packers for both quantized formats, for tests: slow, obvious, and sharing nothing with the product's unpackers.

Each `pack_*` turns chosen numbers into the tensors of one layer; the `*_weight` beside it computes from the same
numbers, without packing anything, the weight they stand for. `random_*` choose the numbers. K counts input features
(rows), N output features (columns), G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.generic]
BIT_WIDTHS = (2, 3, 4, 5, 6, 8)


def pack_bits(codes: Array, bits: int) -> Array:
    """Write each column of codes [K, N] as one string of bits, lowest first, cut into words: int32 [words, N]."""
    rows, columns = codes.shape
    string = np.zeros((-(-rows * bits // 32) * 32, columns), dtype=np.uint8)
    numbers = codes.astype(np.uint8)
    for bit in range(bits):
        string[bit : rows * bits : bits] = numbers >> bit & 1
    return np.packbits(string, axis=0, bitorder="little").T.copy().view("<i4").T


def as_tensor(array: Array) -> Tensor:
    """Return a tensor that owns its memory, row by row, whatever the strides of the array."""
    return torch.from_numpy(array.copy(order="C"))


def pack_exl2(
    codes: Array, scale_q: Array, scale_max: Array, group_bits: Sequence[int], group_rows: Sequence[int], perm: Array
) -> dict[str, Tensor]:
    """Return the tensors of an EXL2 layer.

    Args:
        codes: the numbers to store, [K, N], in the order in which they are packed; 0 to 2 ** bits - 1.
        scale_q: steps of the scales, [G, N], 0 to 15.
        scale_max: factors of the groups, [G].
        group_bits, group_rows: for each group its bits and its rows; all but the last must fill whole words.
        perm: the input feature that each packed row belongs to, [K].
    """
    words, table, row, start = [], [], 0, 0
    for bits, rows in zip(group_bits, group_rows, strict=True):
        words.append(pack_bits(codes[row : row + rows], bits))
        table += [bits, start]
        row, start = row + rows, start + len(words[-1])
    return {
        "q_weight": as_tensor(np.concatenate(words)),
        "q_groups": as_tensor(np.array(table, dtype=np.uint16).view(np.int16)),
        "q_scale": as_tensor(pack_bits(scale_q.T, 4).T),
        "q_scale_max": as_tensor(scale_max.astype(np.float16)),
        "q_invperm": as_tensor(np.argsort(perm).astype(np.int32)),
    }


def exl2_weight(
    codes: Array, scale_q: Array, scale_max: Array, group_bits: Sequence[int], group_rows: Sequence[int], perm: Array
) -> NDArray[np.float64]:
    """Return the weight [N, K] that the arguments of `pack_exl2` stand for.

    Scales are float16 at every step, as exllamav2 computes them; a product of two float16 is exact in float64, so
    that each step rounds once.
    """
    factor = (scale_max.astype(np.float16).astype(np.float64) / 256).astype(np.float16)
    weight = np.zeros(codes.shape)
    row = 0
    for group, (bits, rows) in enumerate(zip(group_bits, group_rows, strict=True)):
        scale = ((scale_q[group].astype(np.float64) + 1) ** 2 * np.float64(factor[group])).astype(np.float16)
        packed = slice(row, row + rows)
        weight[perm[packed]] = (codes[packed].astype(np.float64) - 2 ** (bits - 1)) * scale.astype(np.float64)
        row += rows
    return weight.T


def random_exl2(
    rng: np.random.Generator, columns: int, group_bits: Sequence[int], group_rows: Sequence[int]
) -> tuple[dict[str, Tensor], NDArray[np.float64]]:
    """Return a random EXL2 layer with those groups: its tensors and its weight [N, K]."""
    rows, groups = sum(group_rows), len(group_bits)
    widths = np.repeat(group_bits, group_rows)[:, None]
    codes = rng.integers(0, 1 << np.broadcast_to(widths, (rows, columns)))
    scale_q = rng.integers(0, 16, (groups, columns))
    scale_max = np.exp(rng.uniform(np.log(1e-4), np.log(1), groups)).astype(np.float16)
    numbers = (codes, scale_q, scale_max, group_bits, group_rows, rng.permutation(rows))
    return pack_exl2(*numbers), exl2_weight(*numbers)


def pack_gptq(codes: Array, zeros: Array, scales: Array, g_idx: Array | None, *, zero_offset: int) -> dict[str, Tensor]:
    """Return the tensors of a 4-bit GPTQ layer.

    Args:
        codes: the numbers to store, [K, N], 0 to 15.
        zeros: the codes that mean 0, [G, N]; 0 to 15, or 1 to 16 with `zero_offset` 1.
        scales: [G, N].
        g_idx: the group of each row, [K]; None leaves the tensor out.
        zero_offset: 1 stores the zeros less one ("gptq"), 0 as they are ("gptq_v2").
    """
    tensors = {
        "qweight": as_tensor(pack_bits(codes, 4)),
        "qzeros": as_tensor(pack_bits((zeros - zero_offset).T, 4).T),
        "scales": as_tensor(scales.astype(np.float16)),
    }
    if g_idx is not None:
        tensors["g_idx"] = as_tensor(g_idx.astype(np.int32))
    return tensors


def gptq_weight(codes: Array, zeros: Array, scales: Array, g_idx: Array) -> NDArray[np.float64]:
    """Return the weight [N, K] that the arguments of `pack_gptq` stand for."""
    steps = scales.astype(np.float16).astype(np.float64)
    return ((codes.astype(np.float64) - zeros[g_idx]) * steps[g_idx]).T


def random_gptq(
    rng: np.random.Generator, columns: int, g_idx: Array, *, zero_offset: int, store_g_idx: bool = True
) -> tuple[dict[str, Tensor], NDArray[np.float64]]:
    """Return a random GPTQ layer whose rows belong to those groups: its tensors and its weight [N, K]."""
    groups = int(g_idx.max()) + 1
    codes = rng.integers(0, 16, (len(g_idx), columns))
    zeros = rng.integers(zero_offset, 16 + zero_offset, (groups, columns))
    scales = np.exp(rng.uniform(np.log(1e-4), np.log(1), (groups, columns))).astype(np.float16)
    tensors = pack_gptq(codes, zeros, scales, g_idx if store_g_idx else None, zero_offset=zero_offset)
    return tensors, gptq_weight(codes, zeros, scales, g_idx)
