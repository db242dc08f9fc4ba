"""Which build of `gemv.cu` computes a product, and with what argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exl_cli.engines.exllamav2.kernels.matrices import SLOT, Products, QuantizedMatrix

FILE, NAME = "gemv.cu", "gemv"
MOST_ROWS = 32
ACTIVATIONS = {"silu": 0, "gelu": 1}
_SCRATCH = 128  # bytes for the sum over a block


@dataclass(frozen=True)
class Variant:
    """What the source leaves open.

    Attributes:
        exl2: the format of all the matrices.
        max_bits: of their weights.
        fine: widths or scales change within 128 rows.
        paired: a gate and what it gates.
        rows: of the input, 1 to `MOST_ROWS`.
        warps: of a block; even where paired.
        stages: of the ring through which each warp's weights come.
        k: rows of the matrices.
        two_xs: whether a pair takes its input in two orders.
    """

    exl2: bool
    max_bits: int
    fine: bool
    paired: bool
    rows: int
    warps: int
    stages: int
    k: int
    two_xs: bool

    @property
    def _tiles(self) -> int:
        return 1 if self.rows <= 8 else 2 if self.rows <= 16 else 4

    @property
    def defines(self) -> dict[str, int]:
        """Values of the source's names."""
        return {
            "FORMAT": int(self.exl2),
            "MAX_BITS": self.max_bits,
            "FINE": int(self.fine),
            "PAIRED": int(self.paired),
            "ONE_ROW": int(self.rows == 1),
            "TILES": self._tiles,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "RESIDENT": 32 if self.rows == 1 and not self.fine else self.warps,
        }

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: a single row, the rings, and in their place the sums at the end."""
        x_bytes = 0 if self.rows == 1 else self._tiles * 8 * 256
        row = -(-self.k // 128) * 256 * (2 if self.two_xs else 1) if self.rows == 1 else 0
        rings = row + self.warps * self.stages * (self.max_bits * SLOT + x_bytes)
        sums = self.warps * (1 if self.rows == 1 else self._tiles * 8) * 32 * 4
        return _SCRATCH + max(rings, sums)


def most_rows(rows: int) -> int:
    """The most rows that the same build computes."""
    return next(most for most in (1, 8, 16, MOST_ROWS) if rows <= most)


@dataclass(frozen=True)
class Layout:
    """How a launch divides its work; see `Variant`."""

    warps: int
    stages: int


def variant(
    matrices: Sequence[QuantizedMatrix], rows: int, layout: Layout, *, paired: bool = False, two_xs: bool = True
) -> Variant:
    """The build for these matrices, which one launch is to multiply with.

    Args:
        matrices: up to three of as many rows.
        rows: of the input.
        layout: how to divide the work.
        paired: they are a gate and what it gates.
        two_xs: of a pair, each takes its input in an order of its own.
    """
    return Variant(
        exl2=matrices[0].exl2,
        max_bits=max(matrix.width for matrix in matrices),
        fine=not all(matrix.coarse for matrix in matrices),
        paired=paired,
        rows=rows,
        warps=layout.warps,
        stages=layout.stages,
        k=matrices[0].k,
        two_xs=paired and two_xs,
    )


def layouts(rows: int) -> list[Layout]:
    """Those worth trying for that many rows, the likeliest first; the last one for GPUs of little shared memory."""
    if rows > 16:
        return [Layout(4, 2), Layout(8, 2)]
    if rows > 1:
        return [Layout(8, 2), Layout(16, 2), Layout(8, 3), Layout(4, 2)]
    return [Layout(8, 2), Layout(8, 3), Layout(16, 2), Layout(16, 3), Layout(4, 2)]


def argument(matrices: Sequence[QuantizedMatrix], rows: int, activation: str = "silu") -> Products:
    """The kernel's argument, but for where inputs and outputs are: see `connect`."""
    products = Products(count=len(matrices), rows=rows, activation=ACTIVATIONS[activation])
    first = 0
    for index, matrix in enumerate(matrices):
        products.matrix[index] = matrix.argument()
        products.matrix[index].first_block = first
        first += matrix.n // 32
    return products


def connect(argument: Products, xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    """Say where inputs and outputs are: float16, rows of them at any stride, one of each for every matrix."""
    for target, x, out in zip(argument.matrix, xs, outs, strict=False):
        target.x, target.x_stride = x.data_ptr(), x.stride(0)
        target.out, target.out_stride = out.data_ptr(), out.stride(0)


def blocks(matrices: Sequence[QuantizedMatrix], *, paired: bool = False) -> int:
    """How many blocks the launch has."""
    return matrices[0].n // 32 if paired else sum(matrix.n // 32 for matrix in matrices)
