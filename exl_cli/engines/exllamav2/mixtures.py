"""Mixtures of experts by exl's kernels: five launches, and the router's product by torch, for up to 512 tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch

from exl_cli.engines.exllamav2.kernels import experts, many_rows, norm_rope
from exl_cli.engines.exllamav2.kernels.experts import ExpertOperation, ExpertTable, Routing
from exl_cli.engines.exllamav2.kernels.many_rows import GemmConfig
from exl_cli.engines.exllamav2.kernels.operation import Run
from exl_cli.engines.exllamav2.kernels.tuning import Tuner
from exl_cli.engines.exllamav2.layers import Mixture


class Mixtures:
    """Binds the launches of a stage's mixtures, which run one after the other in the same buffers.

    Args:
        device: the GPU.
        mixtures: all of them.
        activation: of all gates.
        tuner: chooses among their products' kernels.
        room: allocates float16 values.
    """

    def __init__(
        self,
        device: torch.device,
        mixtures: Sequence[Mixture],
        activation: str,
        tuner: Tuner,
        room: Callable[[int], torch.Tensor],
    ) -> None:
        self._device, self._activation, self._tuner = device, activation, tuner
        products = [mixture.gate_up for mixture in mixtures]
        slots = many_rows.MOST_ROWS * max(product.chosen for product in products)

        def buffer(columns: int) -> torch.Tensor:
            return room(slots * columns).view(slots, columns)

        hidden, inner = products[0].matrices[0].k, products[0].matrices[0].n
        # Experts' outputs take the place of their inputs.
        self._rows = [buffer(hidden) for _ in range(max(product.orders for product in products))]
        self._inner = buffer(inner)
        self._logits = room(many_rows.MOST_ROWS * products[0].experts).view(many_rows.MOST_ROWS, -1)
        self._routing = Routing.empty(slots, device)
        self._tables = {id(mixture): self._tables_of(mixture) for mixture in mixtures}

    def _tables_of(self, mixture: Mixture) -> tuple[ExpertTable, ExpertTable]:
        product = mixture.gate_up
        places = [matrix.inverse for matrix in mixture.down.matrices]
        first = ExpertTable(product, self._rows[: product.orders], self._inner, places)
        return first, ExpertTable(mixture.down, [self._inner], self._rows[0])

    def bind(self, mixture: Mixture, normed: torch.Tensor, hidden: torch.Tensor, rows: int) -> Iterable[Run]:
        """The launches that add a mixture's output to the stream.

        Args:
            mixture: one of the stage's.
            normed: float16, shape (rows or more, hidden): its normed input.
            hidden: the stream, likewise.
            rows: tokens, any number.
        """
        blocks = -(-rows // many_rows.MOST_ROWS)
        # Of equal size, so that one config serves all.
        for first, end in pairwise(index * rows // blocks for index in range(blocks + 1)):
            yield from self._block(mixture, normed[first:end], hidden[first:end])

    def _block(self, mixture: Mixture, x: torch.Tensor, hidden: torch.Tensor) -> Iterable[Run]:
        (rows, dim), product, routing = x.shape, mixture.gate_up, self._routing
        router, logits = mixture.router.t(), self._logits[:rows]
        gate_up, down = self._tables[id(mixture)]
        threads = norm_rope.norm_threads(dim, rows)

        def launch(name: str, grid: int, threads: int, argument: ctypes.Structure, shared_bytes: int = 0) -> Run:
            kernel = experts.kernel(name, self._device, shared_bytes)
            return kernel.bind((grid,), threads, argument)

        def route(stream: int) -> None:
            torch.mm(x, router, out=logits)

        yield route
        routed = experts.route(logits, routing, rows, product, normalized=mixture.normalized)
        yield launch("route", 1, experts.ROUTE_THREADS, routed, experts.route_bytes(product.experts))
        config = self._tuner.config(product, rows)
        wgmma = isinstance(config, GemmConfig) and config.wgmma
        dispatched = experts.dispatch(x, routing, gate_up, wgmma=wgmma)
        yield launch("dispatch", rows * product.chosen, threads, dispatched, 2 * dim)
        yield self._tuner.bind(ExpertOperation(gate_up, rows, routing, self._activation))
        last = ExpertOperation(down, rows, routing)
        yield self._tuner.bind(last)
        yield launch("combine", rows, threads, experts.combine(last, hidden))
