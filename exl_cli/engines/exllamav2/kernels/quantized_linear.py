"""Which build of `gemv.cu` computes a product, and with what argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from exl_cli.engines.exllamav2.kernels.matrices import SLOT, Products, QuantizedMatrix

FILE, NAME = "gemv.cu", "gemv"
MOST_ROWS = 32
ACTIVATIONS = {"silu": 0, "gelu": 1}
_SCRATCH = 128  # bytes for the sum over a block


@dataclass(frozen=True)
class TileConfig:
    """How a launch divides its work.

    Attributes:
        warps: of a block; even where it computes a pair.
        stages: of the ring through which each warp's weights come.
        columns: of a block, a multiple of 32; its warps share what they read of several rows.
    """

    warps: int
    stages: int
    columns: int = 32


@dataclass(frozen=True, eq=False)
class Product:
    """Matrices that one launch multiplies with.

    Attributes:
        matrices: up to three of one format and of as many rows.
        paired: they are a gate and what it gates.
        reorders: whether a single row of the input comes in the model's order, and is put into that of each matrix by
            the kernel; several rows always come as the matrices want them.
    """

    matrices: tuple[QuantizedMatrix, ...]
    paired: bool = False
    reorders: bool = True

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for products that the same build computes in about the same time."""
        return (self.paired, self.copies, *(matrix.kind for matrix in self.matrices))

    @property
    def bytes(self) -> int:
        """What it must read besides its input."""
        return sum(matrix.bytes for matrix in self.matrices)

    def blocks(self, tile: TileConfig) -> int:
        """Blocks of its launch; 0 where the tile does not fit its columns."""
        warps = tile.columns // 32 * (2 if self.paired else 1)
        if tile.warps % warps or any(matrix.n % tile.columns for matrix in self.matrices):
            return 0
        blocks = sum(matrix.n for matrix in self.matrices) // tile.columns
        return blocks // 2 if self.paired else blocks

    @property
    def copies(self) -> int:
        """Copies of a single row that a block keeps: in order, and as it comes where any matrix wants another order."""
        orders = {matrix.order for matrix in self.matrices} if self.reorders else {None}
        most = len(orders) if self.paired else 1
        return most + any(order is not None for order in orders)


class Variant(NamedTuple):
    """A build of the source for a product.

    Attributes:
        defines: values of the names that the source leaves open.
        shared_bytes: dynamic shared memory of a block.
    """

    defines: dict[str, int]
    shared_bytes: int


def most_rows(rows: int) -> int:
    """The most rows that the same build computes."""
    return next(most for most in (1, 8, 16, MOST_ROWS) if rows <= most)


def variant(product: Product, rows: int, tile: TileConfig) -> Variant:
    """The build for a product of an input of so many rows."""
    matrices, warps = product.matrices, tile.warps
    exl2, max_bits = matrices[0].exl2, max(matrix.width for matrix in matrices)
    # Widths or scales change within 128 rows.
    fine = not all(matrix.coarse for matrix in matrices)
    tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
    shares_x = tile.columns > 32
    defines = {
        "FORMAT": int(exl2), "MAX_BITS": max_bits, "FINE": int(fine), "PAIRED": int(product.paired),
        "ONE_ROW": int(rows == 1), "TILES": tiles, "WARPS": warps, "STAGES": tile.stages, "COLUMNS": tile.columns,
        "RESIDENT": 32 if rows == 1 and not fine else warps,
    }  # fmt: skip
    # A single row, the rings, and in their place the sums at the end.
    x_bytes = 0 if rows == 1 else tiles * 8 * 256
    row = -(-matrices[0].k // 128) * 256 * product.copies if rows == 1 else 0
    groups = (4 if fine else 1) * (16 if exl2 else 80)
    stage = -(-(max_bits * SLOT + (0 if shares_x else x_bytes) + groups) // 32) * 32
    # As if both of a pair had an input of their own.
    shared_x = warps * 32 // tile.columns * x_bytes if shares_x else 0
    rings = row + tile.stages * (warps * stage + shared_x)
    sums = warps * (1 if rows == 1 else tiles * 8) * 32 * 4
    return Variant(defines, _SCRATCH + max(rings, sums))


def tile_configs(rows: int) -> list[TileConfig]:
    """Those worth trying for that many rows, the likeliest first.

    The last one is for GPUs of little shared memory: to be built only where none of the others fits.
    """
    if rows > 16:
        return [TileConfig(8, 2), TileConfig(8, 2, 64), TileConfig(8, 2, 128), TileConfig(4, 2)]
    if rows > 1:
        return [TileConfig(8, 2), TileConfig(16, 2), TileConfig(8, 3), TileConfig(4, 2)]
    return [TileConfig(8, 2), TileConfig(8, 3), TileConfig(16, 2), TileConfig(16, 3), TileConfig(4, 2)]


def builds(product: Product, rows: int, shared_bytes: int) -> dict[TileConfig, Variant]:
    """What to choose from for a product, the likeliest first; empty where nothing fits.

    Args:
        product: what to compute.
        rows: of the input.
        shared_bytes: that a block can have on the GPU.
    """
    *usual, small = tile_configs(rows)
    for candidates in (usual, [small]):
        variants = {tile: variant(product, rows, tile) for tile in candidates if product.blocks(tile)}
        fitting = {tile: build for tile, build in variants.items() if build.shared_bytes <= shared_bytes}
        if fitting:
            return fitting
    return {}


def argument(product: Product, rows: int, activation: str = "silu") -> Products:
    """The kernel's argument, but for where inputs and outputs are: see `connect`."""
    products = Products(count=len(product.matrices), rows=rows, activation=ACTIVATIONS[activation])
    first = 0
    for index, matrix in enumerate(product.matrices):
        products.matrix[index] = matrix.argument()
        products.matrix[index].first_block = first
        if rows == 1 and product.reorders:
            products.matrix[index].perm = matrix.order
        first += matrix.n // 32
    return products


def connect(argument: Products, xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    """Say where inputs and outputs are: float16, rows of them at any stride, one of each for every matrix."""
    for target, x, out in zip(argument.matrix, xs, outs, strict=False):
        target.x, target.x_stride = x.data_ptr(), x.stride(0)
        target.out, target.out_stride = out.data_ptr(), out.stride(0)
