"""Which build of `gemm.cu` multiplies many rows with quantized matrices, and what its launches need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exl_cli.engines.exllamav2.kernels import quantized_linear
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product, Products, TileConfig, Variant

FILE, NAME = "gemm.cu", "gemm"
_CHUNK = 128
_SCRATCH = 1024


@dataclass(frozen=True)
class GemmConfig:
    """How `gemm.cu` divides its work.

    Attributes:
        warps: of a block, a multiple of 4.
        row_warps: warps for different rows; the others are for different columns.
        tiles: of 8 rows, of a warp.
        strips: of 32 columns, of a warp.
        stages: of the ring.
        resident: blocks on a multiprocessor.
        wgmma: whether four warps multiply together; needs compute capability 9.0.
    """

    warps: int
    row_warps: int
    tiles: int
    strips: int
    stages: int
    resident: int
    wgmma: bool = False

    @property
    def rows(self) -> int:
        """Rows of a block's tile."""
        return 8 * self.tiles * self.row_warps

    @property
    def columns(self) -> int:
        """Columns of a block's tile: of a pair, half of them of each matrix."""
        return 32 * self.strips * (self.warps // self.row_warps)

    def units(self, product: Product, rows: int) -> int:
        """Pieces of work, tiles times chunks of k."""
        side = self.columns // (2 if product.paired else 1)
        matrices = product.matrices[: 1 if product.paired else None]
        columns = sum(-(-matrix.n // side) for matrix in matrices)
        return columns * -(-rows // self.rows) * -(-matrices[0].k // _CHUNK)

    def blocks(self, product: Product, rows: int, at_once: int) -> int:
        """Blocks of a launch on a GPU that holds so many at once: a launch of more would never end."""
        return min(at_once, self.units(product, rows))


def variant(product: Product, config: GemmConfig) -> Variant:
    """The build for a product."""
    matrices, sides = product.matrices, 2 if product.paired else 1
    exl2, max_bits = matrices[0].exl2, max(matrix.width for matrix in matrices)
    fine = not all(matrix.coarse for matrix in matrices)
    two_x = product.paired and matrices[0].order != matrices[1].order
    defines = {
        "FORMAT": int(exl2), "MAX_BITS": max_bits, "PAIRED": int(product.paired), "TWO_X": int(two_x),
        "FINE": int(fine), "WARPS": config.warps, "ROW_WARPS": config.row_warps, "TILES": config.tiles,
        "STRIPS": config.strips, "STAGES": config.stages, "RESIDENT": config.resident, "WGMMA": int(config.wgmma),
    }  # fmt: skip
    parts, columns = 4 if fine else 1, config.columns // sides
    of_a_side = 4 * max_bits * columns * 4 + parts * columns // 2 + (32 if exl2 else parts * columns * 2)
    stage = (2 if two_x else 1) * config.rows * 2 * _CHUNK + sides * of_a_side
    return Variant(defines, _SCRATCH + config.stages * (-(-stage // 1024) * 1024), FILE, NAME)


def configs(product: Product, rows: int) -> list[GemmConfig]:
    """Those worth trying for that many rows, the likeliest first; those that measure well on an H200."""
    if rows <= 8:
        return []
    if rows <= 16:
        return [GemmConfig(8, 1, 2, 2, 4, 1)] if product.paired else [GemmConfig(4, 1, 2, 1, 4, 4)]
    if product.paired:
        return [GemmConfig(4, 1, 4, 2, 4, 2), GemmConfig(8, 1, 4, 2, 4, 1)]
    return [GemmConfig(4, 1, 4, 1, 4, 3), GemmConfig(8, 1, 4, 1, 6, 1)]


def builds(product: Product, rows: int, shared_bytes: int) -> dict[TileConfig | GemmConfig, Variant]:
    """What to choose from for a product, of both kernels, those of `gemv.cu` first; empty where nothing fits.

    Args:
        product: what to compute.
        rows: of the input.
        shared_bytes: that a block can have on the GPU.
    """
    all_builds: dict[TileConfig | GemmConfig, Variant] = {}
    for tile, build in quantized_linear.builds(product, rows, shared_bytes).items():
        all_builds[tile] = build
    for config in configs(product, rows):
        build = variant(product, config)
        if build.shared_bytes <= shared_bytes:
            all_builds[config] = build
    return all_builds


def places(perm: torch.Tensor | None, k: int) -> torch.Tensor:
    """Where in the model's order each number of an input lies that `gemm.cu` with WGMMA takes.

    The tensor cores read an input from memory in the order in which a warp's lanes hold the weights: of 16 numbers,
    lane t of four holds those at 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, which are four rows that follow one another.

    Args:
        perm: weight row j belongs to input perm[j]; int16 (uint16 in truth). None: as it comes.
        k: rows of the weight, a multiple of 128.
    """
    step, lane = torch.arange(8)[:, None, None, None], torch.arange(4)[:, None]
    rows = 32 * lane + 4 * step + 2 * torch.arange(2)[:, None, None] + torch.arange(2)
    order = (torch.arange(k // _CHUNK)[:, None] * _CHUNK + rows.flatten()).flatten().to(torch.int16)
    return order if perm is None else perm[(order.long() & 0xFFFF).to(perm.device)].contiguous()


class Workspace:
    """Where blocks leave the sums of tiles that they share. Launches one after the other may use the same.

    Args:
        device: the GPU.
        floats: of all launches the most that one needs, see `partial_floats`.
        tiles: of all launches the most that one has.
    """

    def __init__(self, device: torch.device, floats: int, tiles: int) -> None:
        self._partial = torch.empty(floats, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(tiles, dtype=torch.int32, device=device)

    def connect(self, argument: Products) -> None:
        """Have a launch use it."""
        argument.partial, argument.arrived = self._partial.data_ptr(), self._arrived.data_ptr()


def partial_floats(config: GemmConfig, blocks: int) -> int:
    """Numbers that a launch of so many blocks may leave in its workspace."""
    return 2 * blocks * config.rows * config.columns
