"""Quantized matrices where exllamav2 left them, and which build of `gemv.cu` multiplies with them.

No copy of the weights is made.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

FILE, NAME = "gemv.cu", "gemv"
MOST_ROWS = 32  # of `gemv.cu`
MOST_SEQUENCES = 256  # of a pass
MOST_TOKENS = 2048  # of a pass through a prompt
# Up to each of these numbers of rows, a product has a config.
ROWS = (1, 8, 16, MOST_ROWS, 64, 128, MOST_SEQUENCES, 512, 1024, MOST_TOKENS)
ACTIVATIONS = {"silu": 0, "gelu": 1}
_SLOT = 512  # bytes of a warp's one request, and of the ring's slots
_SCRATCH = 128  # bytes for the sum over a block


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
        ("splits", ctypes.c_uint32),
        ("partial", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
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
        """`max_bits` rounded up to 4, 6 or 8, so that few builds are needed."""
        return next(bits for bits in (4, 6, 8) if self.max_bits <= bits)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for matrices that the same build multiplies with in about the same time."""
        return (self.exl2, self.k, self.n, self.width, self.coarse)

    @property
    def order(self) -> int | None:
        """Address of `perm`, or None."""
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


def from_exllamav2(linears: Sequence[Mapping[str, torch.Tensor]]) -> list[QuantizedMatrix | None]:
    """Matrices from the tensors that `ExLlamaV2Linear`s on one device hold after loading; None where unsupported.

    The GPU is waited for once, however many there are. Matrices of the same order share `perm` and `inverse`.

    Args:
        linears: the `q_tensors` of each: EXL2's `q_weight`, `q_scale`, … or GPTQ's `qweight`, `qzeros`, `scales`.
    """
    on_host = _on_host(linears, ("q_perm", "q_groups", "q_scale_max"))
    tables = [
        _blocks(read["q_groups"], read["q_scale_max"], len(tensors["q_weight"])) if "q_weight" in tensors else None
        for tensors, read in zip(linears, on_host, strict=True)
    ]
    all_blocks = iter(_on_device([table.blocks for table in tables if table], linears))
    orders: dict[bytes, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
    matrices = []
    for tensors, read, table in zip(linears, on_host, tables, strict=True):
        order = read.get("q_perm", np.empty(0, np.uint16))
        # Files without activation order have one all the same, when they say which group each row is in.
        is_identity = np.array_equal(order, np.arange(len(order)))
        own = (None, None) if is_identity else (tensors["q_perm"], tensors.get("q_invperm"))
        perm, inverse = orders.setdefault(order.tobytes(), own)
        blocks = next(all_blocks) if table else None
        matrices.append(_matrix(tensors, table, blocks, perm, inverse))
    return matrices


def _matrix(
    tensors: Mapping[str, torch.Tensor],
    table: _BlockTable | None,
    blocks: torch.Tensor | None,
    perm: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> QuantizedMatrix | None:
    """A matrix, given its `q_tensors`, EXL2's table, on the device `blocks`, and its order; None where unsupported."""
    if "q_weight" in tensors:
        if table is None:
            return None
        weight, four, scale = tensors["q_weight"], tensors["q_scale"], None
        k, group_size, coarse, max_bits = 32 * len(table.blocks), 1, table.coarse, table.max_bits
    else:
        weight, four, scale = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        k, max_bits, group_size = 8 * weight.shape[0], 4, 1
        while group_size * scale.shape[0] < k:
            group_size *= 2
        if group_size < 32:
            return None
        coarse = group_size >= 128
    n = weight.shape[1]
    if k % 32 or n % 32 or weight.numel() >= 1 << 32:
        return None
    bias = tensors.get("bias")
    return QuantizedMatrix(weight, four, scale, blocks, bias, perm, inverse, k, n, group_size, coarse, max_bits)


def first_columns(matrices: Sequence[QuantizedMatrix]) -> list[int]:
    """Where the output of each begins in a row, if they are side by side."""
    return [*itertools.accumulate((matrix.n for matrix in matrices[:-1]), initial=0)]


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
        paired: whether they are an MLP's gate and up projections, combined with the activation.
        reorders: whether a single row of the input comes in the model's order, and is put into that of each matrix by
            the kernel; several rows always come as the matrices want them.
        experts: how many a mixture has: `matrices` are one of each, or gate and up projection of one after the other,
            all of the same k and n; 0 for matrices that every row is multiplied with.
        chosen: experts of each row.
    """

    matrices: tuple[QuantizedMatrix, ...]
    paired: bool = False
    reorders: bool = True
    experts: int = 0
    chosen: int = 0

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """Equal for products that the same build computes in about the same time."""
        if self.experts:
            exl2, k, n, *_ = self.matrices[0].kind
            return (self.paired, self.experts, self.chosen, exl2, k, n, self.width, self.coarse, self.orders)
        return (self.paired, self.copies, *(matrix.kind for matrix in self.matrices))

    @cached_property
    def width(self) -> int:
        """Of its matrices the largest."""
        return max(matrix.width for matrix in self.matrices)

    @cached_property
    def coarse(self) -> bool:
        """Whether all of its matrices are."""
        return all(matrix.coarse for matrix in self.matrices)

    @cached_property
    def orders(self) -> int:
        """Orders of the input side by side, of several rows: 2 if a gate wants another one than up does."""
        pairs = zip(self.matrices[::2], self.matrices[1::2], strict=True) if self.paired else ()
        return 1 + any(gate.order != up.order for gate, up in pairs)

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
    """A build of a kernel for a product.

    Attributes:
        defines: values of the names that the source leaves open.
        shared_bytes: dynamic shared memory of a block.
        file, name: the kernel's.
    """

    defines: dict[str, int]
    shared_bytes: int
    file: str = FILE
    name: str = NAME


def most_rows(rows: int) -> int:
    """The most rows for which the same choice of kernel and config is made."""
    return next(most for most in ROWS if rows <= most)


def variant(product: Product, rows: int, tile: TileConfig) -> Variant:
    """The build for a product with this many input rows."""
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
    stage = -(-(max_bits * _SLOT + (0 if shares_x else x_bytes) + groups) // 32) * 32
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
    """What to choose from for a product, the likeliest first; empty where nothing fits, or there are too many rows.

    Args:
        product: what to compute.
        rows: of the input.
        shared_bytes: that a block can have on the GPU.
    """
    if rows > MOST_ROWS:
        return {}
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
    """Set the addresses of inputs and outputs, one of each per matrix: float16, rows at any stride."""
    for target, x, out in zip(argument.matrix, xs, outs, strict=False):
        target.x, target.x_stride = x.data_ptr(), x.stride(0)
        target.out, target.out_stride = out.data_ptr(), out.stride(0)


class _BlockTable(NamedTuple):
    """EXL2's 32-row blocks, see `QuantizedMatrix`; int64."""

    blocks: npt.NDArray[np.int64]
    coarse: bool
    max_bits: int


def _blocks(groups: npt.NDArray[np.uint16], scale_max: npt.NDArray[np.uint16], packed_rows: int) -> _BlockTable | None:
    """EXL2's table of 32-row blocks; None where a group is not made of whole blocks.

    Args:
        groups: `q_groups`, 2 numbers for each group: bits and first packed row.
        scale_max: float16 of each group, divided by 256 as exllamav2 does at load.
        packed_rows: of the weights.
    """
    bits, first = (groups[place::2].astype(np.int64) for place in range(2))
    height = np.diff(first, append=packed_rows)
    if (height % bits).any():
        return None
    count = height // bits
    group = np.arange(len(bits)).repeat(count)
    place = np.arange(len(group)) - (count.cumsum() - count)[group]
    row, scale = first[group] + place * bits[group], scale_max.astype(np.int64)[group]
    # The uppermost bit of a group's number would be the sign: there are fewer than 2^15 groups.
    blocks = row | bits[group] << 24 | scale << 32 | group << 48
    return _BlockTable(blocks, not (count[:-1] % 4).any(), int(bits.max()))


def _on_host(
    linears: Sequence[Mapping[str, torch.Tensor]], names: Sequence[str]
) -> list[dict[str, npt.NDArray[np.uint16]]]:
    """Those of their 16-bit tensors that have one of these names, as numbers without a sign, in one transfer."""
    places = [(index, name) for index, tensors in enumerate(linears) for name in names if name in tensors]
    on_host: list[dict[str, npt.NDArray[np.uint16]]] = [{} for _ in linears]
    if places:
        parts = [linears[index][name].view(torch.int16) for index, name in places]
        numbers = torch.cat(parts).cpu().numpy().view(np.uint16)
        ends = itertools.accumulate(map(len, parts))
        for (index, name), part in zip(places, np.split(numbers, [*ends][:-1]), strict=True):
            on_host[index][name] = part
    return on_host


def _on_device(
    tables: Sequence[npt.NDArray[np.int64]], linears: Sequence[Mapping[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """EXL2's tables on the device of its weights, in one transfer."""
    if not tables:
        return []
    device = next(tensors["q_weight"].device for tensors in linears if "q_weight" in tensors)
    together = torch.from_numpy(np.concatenate(tables)).to(device)
    ends = itertools.accumulate(map(len, tables))
    return [together[end - len(table) : end] for table, end in zip(tables, ends, strict=True)]


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
