"""Mixtures of experts: routing tokens to experts, and the arguments of `experts.cu` and of `gemm.cu` for them.

A slot is a token with one of the experts it is routed to. Only the GPU knows how many slots an expert has: launches
depend on the number of tokens alone, and CUDA graphs can capture them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from exl_cli.engines.exllamav2.kernels import many_rows, quantized_linear
from exl_cli.engines.exllamav2.kernels.compiler import Kernel
from exl_cli.engines.exllamav2.kernels.many_rows import ExpertProducts, GemmConfig
from exl_cli.engines.exllamav2.kernels.quantized_linear import MatrixArgument, Product

FILE = "experts.cu"
ROUTE_THREADS = 1024
MOST_EXPERTS, MOST_CHOSEN = 256, 32
DEFINES = {"MOST_EXPERTS": MOST_EXPERTS, "MOST_ROWS": many_rows.MOST_ROWS}
_MASK_BYTES = 4 * many_rows.MOST_ROWS // 32
_MOST_SPLITS = 8


class RouteArgument(ctypes.Structure):
    """`Route` of experts.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "weights", "places", "sources", "tiles", "row_tiles")),
        *((name, ctypes.c_uint32) for name in ("rows", "experts", "chosen", "tile_rows", "normalized")),
    )


class DispatchArgument(ctypes.Structure):
    """`Dispatch` of experts.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "sources", "matrix")),
        *((name, ctypes.c_uint32) for name in ("dim", "orders", "wgmma")),
    )


class CombineArgument(ctypes.Structure):
    """`Combine` of experts.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("outs", "weights", "places", "to")),
        *((name, ctypes.c_uint32) for name in ("dim", "chosen", "splits", "split_rows")),
    )


class Routing(NamedTuple):
    """The output of `route`.

    Attributes:
        weights: float32, shape (slots or more,): of each token's experts, the largest first.
        places: int32, likewise: the slot of each of those.
        sources: int32, likewise: token | expert << 16 of each slot. Slots are sorted by expert, then by token.
        tiles: int32, shape (slots or more, 3): expert, first slot and end of each tile of rows.
        row_tiles: int32, shape (1,): the number of tiles.
    """

    weights: torch.Tensor
    places: torch.Tensor
    sources: torch.Tensor
    tiles: torch.Tensor
    row_tiles: torch.Tensor

    @staticmethod
    def empty(slots: int, device: torch.device) -> Routing:
        """Buffers for this many slots."""
        places, sources = (torch.empty(slots, dtype=torch.int32, device=device) for _ in range(2))
        tiles, row_tiles = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((slots, 3), (1,)))
        return Routing(torch.empty(slots, device=device), places, sources, tiles, row_tiles)


class ExpertTable:
    """A mixture's matrices with where their inputs and outputs are: on the GPU, an array of `Matrix` (matrix.cuh).

    Args:
        product: the matrices.
        xs: the input row of each slot, float16, shape (slots, k) at any row stride; a tensor for each of the product's
            orders.
        out: the output rows, shape (slots, n or more), as many for each of `grid`'s splits.
        places: for each expert, where to write each column of a pair's output, None for in order; empty if all are.
    """

    def __init__(
        self,
        product: Product,
        xs: Sequence[torch.Tensor],
        out: torch.Tensor,
        places: Sequence[torch.Tensor | None] = (),
    ) -> None:
        self.product, self.out = product, out
        self.xs = [xs[index % len(xs)] for index in range(product.orders)]
        sides = 2 if product.paired else 1
        arguments = (MatrixArgument * len(product.matrices))()
        for index, matrix in enumerate(product.matrices):
            argument, x = matrix.argument(), self.xs[index % sides % product.orders]
            argument.x, argument.x_stride, argument.perm = x.data_ptr(), x.stride(0), matrix.order
            argument.out, argument.out_stride = out.data_ptr(), out.stride(0)
            scatter = places[index // sides] if places else None
            argument.scatter = None if scatter is None else scatter.data_ptr()
            arguments[index] = argument
        self.matrices = torch.frombuffer(bytearray(arguments), dtype=torch.uint8).to(out.device)


@dataclass(eq=False)
class ExpertOperation:
    """A product of every expert with the rows routed to it.

    Attributes:
        table: the matrices.
        rows: tokens, at most `many_rows.MOST_ROWS`.
        routing: has tiles of `many_rows.expert_rows` rows.
        activation: a pair's.
        splits: parts of k, each with a separate output, one row per slot, still to be added; set by `Launcher.bind`.
    """

    table: ExpertTable
    rows: int
    routing: Routing
    activation: str = "silu"
    splits: int = 1

    @property
    def product(self) -> Product:
        """The table's."""
        return self.table.product

    @property
    def xs(self) -> list[torch.Tensor]:
        """The input row of each slot, for each of the product's orders."""
        return [x[: self.rows * self.product.chosen] for x in self.table.xs]

    def argument(self) -> ExpertProducts:
        """The argument of `gemm.cu`, that with WGMMA has maps beside it."""
        return ExpertProducts(
            matrix=self.table.matrices.data_ptr(), tiles=self.routing.tiles.data_ptr(),
            row_tiles=self.routing.row_tiles.data_ptr(), activation=quantized_linear.ACTIVATIONS[self.activation],
            splits=self.splits, split_rows=self.rows * self.product.chosen,
        )  # fmt: skip


def grid(product: Product, rows: int, config: GemmConfig, at_once: int) -> tuple[int, int]:
    """Blocks of a launch, and how many of them compute a tile together, each a part of k.

    Args:
        product, rows, config: what is computed and how.
        at_once: blocks that the GPU holds at once.
    """
    slots, each = rows * product.chosen, many_rows.expert_rows(product, rows)
    row_tiles = slots if slots <= product.experts else product.experts + (slots - product.experts) // each
    tiles = row_tiles * -(-product.matrices[0].n // (config.columns // (2 if product.paired else 1)))
    # Parts of a pair would have to be added before the activation. Other parts are added together with the experts.
    most = min(_MOST_SPLITS, many_rows.MOST_ROWS // rows, -(-product.matrices[0].k // 256))
    splits = 1 if product.paired else max(1, min(at_once // tiles, most))
    return min(at_once, tiles * splits), splits


def route_bytes(experts: int) -> int:
    """Shared memory of `route`."""
    return experts * (_MASK_BYTES + 8)


def route(logits: torch.Tensor, routing: Routing, rows: int, product: Product, *, normalized: bool) -> RouteArgument:
    """The argument of `route`, a single block.

    Args:
        logits: float16, shape (rows or more, experts).
        routing: to be written.
        rows: tokens.
        product: one of the mixture's.
        normalized: whether a token's weights are to sum to 1.
    """
    return RouteArgument(
        **{name: tensor.data_ptr() for name, tensor in routing._asdict().items()}, logits=logits.data_ptr(),
        rows=rows, experts=product.experts, chosen=product.chosen, normalized=normalized,
        tile_rows=many_rows.expert_rows(product, rows),
    )  # fmt: skip


def dispatch(x: torch.Tensor, routing: Routing, table: ExpertTable, *, wgmma: bool) -> DispatchArgument:
    """The argument of `dispatch`, a block a slot: copies x, of shape (rows or more, k), to the rows of `table.xs`.

    With `wgmma`, in the order that builds with WGMMA want, as both of a mixture's products then are.
    """
    return DispatchArgument(
        x=x.data_ptr(), sources=routing.sources.data_ptr(), matrix=table.matrices.data_ptr(), dim=x.shape[1],
        orders=table.product.orders, wgmma=wgmma,
    )  # fmt: skip


def combine(operation: ExpertOperation, to: torch.Tensor) -> CombineArgument:
    """The argument of `combine`, a block a token: adds its experts' weighted outputs to its row of `to`.

    Args:
        operation: the down product, already bound.
        to: float16, shape (rows or more, n).
    """
    chosen = operation.product.chosen
    return CombineArgument(
        outs=operation.table.out.data_ptr(), weights=operation.routing.weights.data_ptr(),
        places=operation.routing.places.data_ptr(), to=to.data_ptr(), dim=to.shape[1], chosen=chosen,
        splits=operation.splits, split_rows=operation.rows * chosen,
    )  # fmt: skip


def kernel(name: str, device: torch.device, shared_bytes: int = 0) -> Kernel:
    """A kernel of experts.cu."""
    return Kernel(FILE, name, DEFINES, device, shared_bytes)


def trials(products: Sequence[Product], rows: int, device: torch.device) -> list[ExpertOperation]:
    """Operations to measure, on random numbers. Each routes its tokens at random, lest all read the same experts."""
    product = products[0]
    slots, matrix = rows * product.chosen, product.matrices[0]
    x = torch.randn((slots, matrix.k), device=device).half()
    splits = 1 if product.paired else min(_MOST_SPLITS, many_rows.MOST_ROWS // rows)
    out = torch.empty((splits * slots, matrix.n), dtype=torch.half, device=device)
    return [
        ExpertOperation(ExpertTable(it, [x], out), rows, _random_routing(it, rows, seed, device))
        for seed, it in enumerate(products)
    ]


def _random_routing(product: Product, rows: int, seed: int, device: torch.device) -> Routing:
    """Tiles of tokens that are routed at random."""
    each = many_rows.expert_rows(product, rows)
    random = torch.Generator().manual_seed(seed)
    wanted = torch.rand((rows, product.experts), generator=random).topk(product.chosen).indices
    tiles, begin = [], 0
    for expert, count in enumerate(torch.bincount(wanted.flatten(), minlength=product.experts).tolist()):
        tiles += [(expert, first, min(first + each, begin + count)) for first in range(begin, begin + count, each)]
        begin += count
    routing = Routing.empty(rows * product.chosen, device)
    routing.tiles[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32, device=device)
    routing.row_tiles.fill_(len(tiles))
    return routing
