"""Quantized matrices as `gemv.cu` takes them: where exllamav2 left them, with no copy of the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

SLOT = 512  # bytes of a warp's one request, and of the ring's slots


class MatrixArgument(ctypes.Structure):
    """`Matrix` of gemv.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "x", "perm", "norm", "four", "scale", "block", "bias")),
        *((name, ctypes.c_void_p) for name in ("scatter", "out", "add")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_uint32) for name in ("n", "k", "x_stride", "out_stride", "group_shift", "first_block")),
    )


class Products(ctypes.Structure):
    """`Products` of gemv.cu."""

    _fields_ = (
        ("matrix", MatrixArgument * 3),
        ("count", ctypes.c_uint32),
        ("rows", ctypes.c_uint32),
        ("activation", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix of k rows and n columns, of 4-bit GPTQ or of EXL2 weights, on one device.

    Attributes:
        weight: packed, int32 of shape (packed rows, n), reordered within 32-row blocks as exllamav2 does at load.
        four: int32 of shape (groups, n / 8), four bits a column: GPTQ's zero points less 1, or EXL2's scales.
        scale: GPTQ's, float16 of shape (groups, n); None for EXL2.
        blocks: EXL2's, int64, one for each 32 rows: packed row, bits << 24, scale << 32 (float16), group << 48; None
            for GPTQ.
        bias: float16 of shape (n,), or None.
        perm: int16 (uint16 in truth) of shape (k,) or None: weight row j belongs to input perm[j].
        inverse: the other way round; None with perm.
        k, n: rows and columns.
        group_size: rows that share a scale, a power of two; GPTQ only.
        coarse: whether widths and scales change at multiples of 128 rows only.
        max_bits: the widest weights' bits.
        bytes: of weights and scales, what a product must read.
    """

    weight: torch.Tensor
    four: torch.Tensor
    scale: torch.Tensor | None
    blocks: torch.Tensor | None
    bias: torch.Tensor | None
    perm: torch.Tensor | None
    inverse: torch.Tensor | None
    k: int
    n: int
    group_size: int
    coarse: bool
    max_bits: int

    @property
    def exl2(self) -> bool:
        """Whether it is EXL2, otherwise GPTQ."""
        return self.scale is None

    @property
    def bytes(self) -> int:
        """What a product must read: weights, scales and zero points."""
        parts = (self.weight, self.four, self.scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def width(self) -> int:
        """`max_bits`, rounded up to one of few, so that few builds do for all."""
        return next(bits for bits in (4, 6, 8) if self.max_bits <= bits)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for matrices that the same build multiplies with in about the same time."""
        return (self.exl2, self.k, self.n, self.width, self.coarse)

    @property
    def order(self) -> int | None:
        """Where `perm` is, or None."""
        return _pointer(self.perm)

    def argument(self) -> MatrixArgument:
        """The part of the kernel's argument that the matrix itself fills."""
        return MatrixArgument(
            weight=self.weight.data_ptr(),
            four=self.four.data_ptr(),
            scale=_pointer(self.scale),
            block=_pointer(self.blocks),
            bias=_pointer(self.bias),
            n=self.n,
            k=self.k,
            group_shift=self.group_size.bit_length() - 1,
        )


def from_exllamav2(tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix | None:
    """A matrix from the tensors that an `ExLlamaV2Linear` holds after loading; None where `gemv.cu` cannot take it.

    Args:
        tensors: its `q_tensors`: EXL2's `q_weight`, `q_scale`, … or GPTQ's `qweight`, `qzeros`, `scales`.
    """
    bias, perm, inverse = (tensors.get(name) for name in ("bias", "q_perm", "q_invperm"))
    # Files without activation order have one all the same, when they say which group each row is in.
    if perm is not None and torch.equal(perm, torch.arange(len(perm), device=perm.device).to(perm.dtype)):
        perm = inverse = None
    if "q_weight" in tensors:
        weight, four = tensors["q_weight"], tensors["q_scale"]
        table = _blocks(tensors["q_groups"], tensors["q_scale_max"], weight.shape[0])
        if table is None:
            return None
        blocks, coarse, max_bits = table
        k, n, group_size, scale = 32 * len(blocks), weight.shape[1], 1, None
        blocks = blocks.to(weight.device)
    else:
        weight, four, scale = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        k, n, blocks, max_bits = 8 * weight.shape[0], weight.shape[1], None, 4
        group_size = 1
        while group_size * scale.shape[0] < k:
            group_size *= 2
        if group_size < 32:
            return None
        coarse = group_size >= 128
    if k % 32 or n % 32 or weight.numel() >= 1 << 32:
        return None
    return QuantizedMatrix(weight, four, scale, blocks, bias, perm, inverse, k, n, group_size, coarse, max_bits)


def _blocks(groups: torch.Tensor, scale_max: torch.Tensor, packed_rows: int) -> tuple[torch.Tensor, bool, int] | None:
    """EXL2's table of 32-row blocks, on the CPU, whether it is coarse, and the widest bits.

    None where a group is not made of whole blocks.

    Args:
        groups: `q_groups`, int16 of 2 for each group: bits and first packed row.
        scale_max: float16 of each group, divided by 256 as exllamav2 does at load.
        packed_rows: of the weights.
    """
    flat = groups.cpu().view(torch.uint16).long()
    bits, first = flat[0::2], flat[1::2]
    height = torch.diff(first, append=torch.tensor([packed_rows]))
    if bool((height % bits).any()):
        return None
    count = height // bits
    group = torch.arange(len(bits)).repeat_interleave(count)
    place = torch.arange(len(group)) - (count.cumsum(0) - count)[group]
    row = first[group] + place * bits[group]
    scale = scale_max.cpu().view(torch.uint16).long()[group]
    # The uppermost bit of a group's number would be the sign: there are fewer than 2^15 groups.
    coarse = not bool((count[:-1] % 4).any())
    return row | bits[group] << 24 | scale << 32 | group << 48, coarse, int(bits.max())


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
