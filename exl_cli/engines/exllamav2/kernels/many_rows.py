"""Which build of `gemm.cu` multiplies many rows with quantized matrices, and what its launches need."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from exl_cli.engines.exllamav2.kernels import compiler, dense, quantized_linear
from exl_cli.engines.exllamav2.kernels.dense import DenseConfig
from exl_cli.engines.exllamav2.kernels.quantized_linear import (
    Product,
    Products,
    QuantizedMatrix,
    TileConfig,
    Variant,
)

FILE, NAME = "gemm.cu", "gemm"
# Values. Larger matrices, which are heads, are only unpacked if no other kernel takes that many rows.
DENSE_NUMBERS = 1 << 28
_CHUNK = 128
_GEMV_ROWS = quantized_linear.MOST_ROWS
MOST_ROWS = 512
_SCRATCH = 1024
# Bytes behind the weights of each 32 rows.
_GAP = 32


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
        wgmma: whether four warps multiply together, and producer warps copy for them; needs compute capability 9.0.
        unfused: whether to compute a pair as two outputs, combined by another kernel. A warp then has registers for
            more rows of each.
        split_k: whether each tile is split into the same number of parts, the most for which all blocks are resident
            at once; otherwise work is divided into equal shares, which may begin and end anywhere in a tile (stream-K).
    """

    warps: int
    row_warps: int
    tiles: int
    strips: int
    stages: int
    resident: int
    wgmma: bool = False
    unfused: bool = False
    split_k: bool = False

    def product(self, product: Product) -> Product:
        """What its launch computes of a product."""
        return replace(product, paired=False) if self.unfused else product

    @property
    def threads(self) -> int:
        """Threads of a block, producers included."""
        return 32 * (self.warps + (4 if self.wgmma else 0))

    @property
    def rows(self) -> int:
        """Rows of a block's tile."""
        return 8 * self.tiles * self.row_warps

    @property
    def columns(self) -> int:
        """Columns of a block's tile: of a pair, half of them of each matrix."""
        return 32 * self.strips * (self.warps // self.row_warps)

    def tiles_of(self, product: Product, rows: int) -> int:
        """Tiles that make up the outputs."""
        product = self.product(product)
        side = self.columns // (2 if product.paired else 1)
        matrices = product.matrices[: 1 if product.paired else None]
        return sum(-(-matrix.n // side) for matrix in matrices) * -(-rows // self.rows)

    def units(self, product: Product, rows: int) -> int:
        """Pieces of work, tiles times chunks of k."""
        return self.tiles_of(product, rows) * -(-product.matrices[0].k // _CHUNK)

    def splits(self, product: Product, rows: int, at_once: int) -> int:
        """Parts of each tile in a launch on a GPU that holds so many blocks at once; 0 for stream-K."""
        if not self.split_k:
            return 0
        tiles = self.tiles_of(product, rows)
        return max(1, min(at_once // tiles, self.units(product, rows) // tiles))

    def blocks(self, product: Product, rows: int, at_once: int) -> int:
        """Blocks of a launch on a GPU that holds so many at once: a launch of more would never end."""
        most = (
            self.tiles_of(product, rows) * self.splits(product, rows, at_once)
            if self.split_k
            else self.units(product, rows)
        )
        return min(at_once, most)


Config = TileConfig | GemmConfig | DenseConfig


def variant(product: Product, config: GemmConfig) -> Variant:
    """The build for a product."""
    product = config.product(product)
    sides, exl2, max_bits = 2 if product.paired else 1, product.matrices[0].exl2, product.width
    fine, two_x = not product.coarse, product.orders == 2
    defines = {
        "FORMAT": int(exl2), "MAX_BITS": max_bits, "PAIRED": int(product.paired), "TWO_X": int(two_x),
        "FINE": int(fine), "WARPS": config.warps, "ROW_WARPS": config.row_warps, "TILES": config.tiles,
        "STRIPS": config.strips, "STAGES": config.stages, "RESIDENT": config.resident, "WGMMA": int(config.wgmma),
        "EXPERTS": int(product.experts > 0),
    }  # fmt: skip
    parts, columns = 4 if fine else 1, config.columns // sides
    of_a_side = 4 * (max_bits * columns * 4 + _GAP) + parts * columns // 2 + (32 if exl2 else parts * columns * 2)
    stage = (2 if two_x else 1) * config.rows * 2 * _CHUNK + sides * of_a_side
    return Variant(defines, _SCRATCH + config.stages * (-(-stage // 1024) * 1024), FILE, NAME)


class MappedProducts(ctypes.Structure):
    """`MappedProducts` of gemm_producer.cuh: its size and its place are multiples of 64 bytes."""

    _fields_ = (
        ("x", (ctypes.c_uint64 * 16) * 3),
        ("products", Products),
        ("padding", ctypes.c_ubyte * (-ctypes.sizeof(Products) % 64)),
    )


class ExpertProducts(ctypes.Structure):
    """`Products` of matrix.cuh with EXPERTS."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrix", "tiles", "row_tiles")),
        *((name, ctypes.c_uint32) for name in ("activation", "splits", "split_rows")),
    )


class MappedExpertProducts(ctypes.Structure):
    """`MappedProducts` with EXPERTS."""

    _fields_ = (
        ("x", (ctypes.c_uint64 * 16) * 3),
        ("products", ExpertProducts),
        ("padding", ctypes.c_ubyte * (-ctypes.sizeof(ExpertProducts) % 64)),
    )


def with_maps(products: Products | ExpertProducts) -> MappedProducts | MappedExpertProducts:
    """The argument of a build with WGMMA, but for its maps."""
    mapped = MappedProducts if isinstance(products, Products) else MappedExpertProducts
    buffer = bytearray(ctypes.sizeof(mapped) + 63)
    place = -ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer)) % 64
    argument = mapped.from_buffer(buffer, place)
    argument.products = products
    return argument


def write_maps(argument: MappedProducts | MappedExpertProducts, xs: Sequence[torch.Tensor], config: GemmConfig) -> None:
    """Describe the inputs, of which each has as many rows as there are, to the copy engine."""
    for target, x in zip(argument.x, xs, strict=False):
        compiler.write_tensor_map(ctypes.addressof(target), x, (_CHUNK // 2, config.rows))


def dense_variant(product: Product) -> Variant:
    """The build that unpacks a product's matrices."""
    return Variant(dense.defines(product.matrices[0]), 0, dense.FILE, dense.NAME)


def configs(product: Product, rows: int, shared_bytes: int, *, wgmma: bool) -> list[GemmConfig]:
    """Those worth trying for that many rows, the likeliest first: those that measure well on an H200.

    Args:
        product: what to compute.
        rows: of the input.
        shared_bytes: that a block can have on the GPU.
        wgmma: whether the GPU has the instructions by which four warps multiply together.
    """
    fitting: list[GemmConfig] = []
    # If nothing else fits, as for wide weights with two inputs.
    smallest = GemmConfig(4, 1, 4, 2 if product.paired else 1, 2, 1)
    for candidates in (
        _candidates(product, rows, wgmma=wgmma),
        [smallest] if _GEMV_ROWS < rows <= MOST_ROWS and not product.experts else [],
    ):
        for config in candidates:
            for stages in range(config.stages, 1, -1):
                fewer = replace(config, stages=stages)
                if variant(product, fewer).shared_bytes <= shared_bytes:
                    fitting.append(fewer)
                    break
        if fitting:
            break
    return fitting


def _candidates(product: Product, rows: int, *, wgmma: bool) -> list[GemmConfig]:
    paired = product.paired
    if product.experts:
        return _candidates_of_experts(product, expert_rows(product, rows), wgmma=wgmma)
    if rows <= 8 or rows > MOST_ROWS:
        return []
    if rows <= 16:
        return (
            [GemmConfig(8, 1, 2, 2, 4, 1)] if paired else [GemmConfig(4, 1, 2, 1, 4, 4), GemmConfig(8, 1, 2, 1, 4, 1)]
        )
    # The order of k in which four warps want x goes across the end of a chunk that is not whole, and is 16 bits wide.
    if wgmma and all(matrix.k % _CHUNK == 0 and matrix.k <= 1 << 16 for matrix in product.matrices):
        if rows <= 32:
            shapes = [(4, 1, 4, 1, 5, 2), (4, 1, 4, 1, 4, 3), (8, 1, 4, 1, 6, 1)]
            pairs = [(4, 1, 4, 2, 4, 2), (8, 1, 4, 2, 4, 1)]
        elif rows <= 64:
            shapes, pairs = [(4, 1, 8, 1, 4, 2), (8, 1, 8, 1, 4, 1)], [(4, 1, 8, 2, 3, 2)]
        elif rows <= 128:
            shapes, pairs = [(8, 1, 16, 1, 4, 1), (4, 1, 16, 1, 2, 2), (4, 1, 8, 1, 4, 2)], []
        else:
            shapes, pairs = [(8, 1, 16, 1, 4, 1), (8, 2, 16, 1, 3, 1), (4, 1, 16, 1, 2, 2)], []
        unfused = [GemmConfig(*shape, wgmma=True, unfused=paired, split_k=True) for shape in shapes]
        # Stream-K is for shapes for which split-K would leave much of the GPU idle.
        unfused.append(replace(unfused[0], split_k=False))
        return unfused + [GemmConfig(*shape, wgmma=True, split_k=True) for shape in pairs if paired]
    # The last of each is for GPUs on which a block has 99 KB of shared memory.
    if rows <= 32:
        shapes = [(8, 1, 4, 2, 4, 1), (4, 1, 4, 2, 4, 2)] if paired else [(8, 1, 4, 1, 4, 2), (4, 1, 4, 1, 4, 3)]
    elif rows <= 64:
        shapes = [(8, 1, 8, 2, 4, 1), (4, 1, 8, 2, 3, 2)] if paired else [(8, 1, 8, 1, 4, 1), (4, 1, 8, 1, 4, 2)]
    else:
        shapes = [(8, 2, 8, 2, 3, 1), (4, 1, 8, 2, 3, 2)] if paired else [(8, 2, 8, 1, 4, 1), (4, 1, 8, 1, 3, 2)]
    return [GemmConfig(*shape) for shape in shapes]


def _candidates_of_experts(product: Product, tile_rows: int, *, wgmma: bool) -> list[GemmConfig]:
    """Those for a mixture of experts: for both of its products with WGMMA, or for none."""
    paired, matrix = product.paired, product.matrices[0]
    wgmma = wgmma and tile_rows >= 32 and matrix.k % _CHUNK == 0 and matrix.n % _CHUNK == 0
    strips = 2 if paired else 1
    if wgmma and tile_rows == 32:
        shapes = [(4, 1, 4, 4, 2), (8, 1, 4, 4, 1)] if paired else [(4, 1, 4, 5, 2), (4, 1, 4, 4, 3), (8, 1, 4, 6, 1)]
    elif wgmma:
        shapes = [(4, 1, 8, 3, 2), (8, 1, 8, 4, 1)] if paired else [(4, 1, 8, 4, 2), (8, 1, 8, 4, 1)]
    else:
        # Few rows leave too few tiles of 128 columns: idle multiprocessors cost more than warps for rows that are not
        # there.
        shapes = {
            8: [(4, 1, 1, 4, 2), (4, 2, 1, 4, 3), (4, 4, 1, 4, 4)],
            16: [(4, 1, 2, 4, 2), (4, 2, 1, 4, 3), (8, 1, 2, 4, 1)],
            32: [(4, 1, 4, 4, 2), (4, 2, 2, 4, 2), (8, 1, 4, 4, 1)],
            64: [(4, 1, 8, 3, 2), (8, 1, 8, 4, 1), (4, 2, 4, 4, 2)],
        }[tile_rows]
    return [
        GemmConfig(warps, row_warps, tiles, strips, stages, resident, wgmma=wgmma)
        for warps, row_warps, tiles, stages, resident in shapes
    ]


def expert_rows(product: Product, rows: int) -> int:
    """Rows of a tile of a mixture's products: about as many as an expert has of so many, at most 64."""
    mean = quantized_linear.most_rows(rows) * product.chosen / product.experts
    return next((tile for tile in (8, 16) if mean <= tile * 3 / 4), 32 if mean <= 48 else 64)


def order(matrix: QuantizedMatrix, config: Config) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """In which order a matrix wants several rows of its input, and the other way round; None for the model's order.

    Returns:
        Places in the input, int16 (uint16 in truth) of shape (k,), and for each number of the input its place.
    """
    if isinstance(config, DenseConfig):
        return None, None
    if not (isinstance(config, GemmConfig) and config.wgmma):
        return matrix.perm, matrix.inverse
    wanted = places(matrix.perm, matrix.k).to(matrix.weight.device)
    return wanted, torch.argsort(wanted.long() & 0xFFFF).to(torch.int16)


def builds(product: Product, rows: int, shared_bytes: int, *, wgmma: bool) -> dict[Config, Variant]:
    """What to choose from for a product, those of `gemv.cu` first; empty where nothing fits.

    Args:
        product, rows, wgmma: as of `configs`.
        shared_bytes: that a block can have on the GPU.
    """
    all_builds: dict[Config, Variant] = {}
    if product.experts:
        return {config: variant(product, config) for config in configs(product, rows, shared_bytes, wgmma=wgmma)}
    for tile, build in quantized_linear.builds(product, rows, shared_bytes).items():
        all_builds[tile] = build
    for config in configs(product, rows, shared_bytes, wgmma=wgmma):
        all_builds[config] = variant(product, config)
    # Unpacking the weights once, for cuBLAS, may be faster: on an H200 from about 512 rows on.
    small = all(matrix.k * matrix.n <= DENSE_NUMBERS for matrix in product.matrices)
    if rows > MOST_ROWS or (rows > _GEMV_ROWS and small):
        all_builds[DenseConfig()] = dense_variant(product)
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
    """The partial sums of tiles that several blocks compute. Launches one after the other may use the same.

    Args:
        device: the GPU.
        floats: the most that any launch needs, see `partial_floats`.
        tiles: the most that any launch has.
    """

    def __init__(self, device: torch.device, floats: int, tiles: int) -> None:
        self._partial = torch.empty(floats, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(tiles, dtype=torch.int32, device=device)

    def connect(self, argument: Products) -> None:
        """Have a launch use it."""
        argument.partial, argument.arrived = self._partial.data_ptr(), self._arrived.data_ptr()


def partial_floats(config: GemmConfig, blocks: int) -> int:
    """Most partial sums of a launch of so many blocks."""
    return 2 * blocks * config.rows * config.columns
