"""Mixtures of experts, emulated on the CPU, against float64."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels.emulated import COMPILER, Emulated
from test_kernels import error, exl2, gptq, inputs
from torch import Tensor
from torch.nn import functional

from exl_cli.engines.exllamav2.kernels import experts, many_rows, norm_rope
from exl_cli.engines.exllamav2.kernels.experts import ExpertOperation, ExpertTable, Routing
from exl_cli.engines.exllamav2.kernels.many_rows import GemmConfig
from exl_cli.engines.exllamav2.kernels.quantized_linear import ROWS, Product, QuantizedMatrix, Variant

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to compile the kernels for the CPU")

# Of each expert gate, up and down, each with its weights.
Made = Sequence[Sequence[tuple[QuantizedMatrix, Tensor]]]
# Runs a build, given C's name of its argument's type, with this argument, grid and so many threads a block.
Run = Callable[[Variant, str, ctypes.Structure, int, int], None]
Mapped = many_rows.MappedProducts | many_rows.MappedExpertProducts
WriteMaps = Callable[[Mapped, Sequence[Tensor], GemmConfig], None]


@pytest.fixture(scope="module")
def run(kernels_folder: Path) -> Run:
    def emulate(build: Variant, type_: str, argument: ctypes.Structure, blocks: int, threads: int) -> None:
        # Several blocks run in another order each time, and their copies end at other times.
        kernel = Emulated(kernels_folder, build.file, build.name, type_, build.defines)
        kernel(argument, (blocks,), threads, next(seeds) if blocks > 1 else 0)

    seeds = itertools.count()
    return emulate


def poisoned(slots: int, device: torch.device) -> Routing:
    """Buffers with nothing valid in them, and a slot more than needed, which must stay as it is."""
    routing = Routing.empty(slots + 1, device)
    for tensor in routing:
        tensor.fill_(-1)
    return routing


def route(run: Run, logits: Tensor, product: Product, *, normalized: bool) -> Routing:
    rows = len(logits)
    routing = poisoned(rows * product.chosen, logits.device)
    argument = experts.route(logits, routing, rows, product, normalized=normalized)
    build = Variant(experts.DEFINES, experts.route_bytes(product.experts), experts.FILE, "route")
    run(build, "Route", argument, 1, experts.ROUTE_THREADS)
    assert all(int(tensor[-1]) == -1 for tensor in routing[:3])
    return routing


def chosen_by(logits: Tensor, count: int) -> Tensor:
    """The largest of each row, of equal ones the first."""
    return torch.argsort(-logits.double(), dim=1, stable=True)[:, :count]


def check(routing: Routing, logits: Tensor, product: Product, *, normalized: bool) -> None:
    (rows, _), chosen, tile_rows = logits.shape, product.chosen, many_rows.expert_rows(product, len(logits))
    slots = rows * chosen
    wanted = chosen_by(logits, chosen)
    weights = logits.double().softmax(1).gather(1, wanted)
    if normalized:
        weights /= weights.sum(1, keepdim=True)
    assert error(routing.weights[:slots].view(rows, chosen).double(), weights) < 1e-5
    pairs = sorted((expert, row) for row, experts_ in enumerate(wanted.tolist()) for expert in experts_)
    assert routing.sources[:slots].tolist() == [row | expert << 16 for expert, row in pairs]
    slot_of = {pair: slot for slot, pair in enumerate(pairs)}
    expected = [slot_of[expert, row] for row, experts_ in enumerate(wanted.tolist()) for expert in experts_]
    assert routing.places[:slots].tolist() == expected
    tiles = []
    for expert in range(product.experts):
        mine = [slot for (it, _), slot in slot_of.items() if it == expert]
        for at in range(0, len(mine), tile_rows):
            part = mine[at : at + tile_rows]
            tiles.append([expert, part[0], part[-1] + 1])
    assert int(routing.row_tiles) == len(tiles)
    assert routing.tiles[: len(tiles)].tolist() == tiles
    assert bool((routing.tiles[len(tiles) :] == -1).all())
    config = GemmConfig(4, 1, tile_rows // 8, 1, 2, 1)
    matrix = replace(gptq(np.random.default_rng(0), 32, 128, 128, False)[0], k=128, n=config.columns)
    assert len(tiles) <= experts.grid(replace(product, matrices=(matrix,)), rows, config, 1 << 20)[0]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("rows", "count", "chosen"), [(1, 8, 2), (45, 60, 4), (512, 128, 8), (300, 4, 2), (33, 256, 32)]
)
def test_tokens_go_to_their_experts(run: Run, rows: int, count: int, chosen: int, normalized: bool) -> None:
    logits = inputs(np.random.default_rng(rows), rows, count) * 3
    product = Product((), experts=count, chosen=chosen)
    routing = route(run, logits, product, normalized=normalized)
    check(routing, logits, product, normalized=normalized)


@pytest.mark.parametrize("kind", ["equal", "two values", "one expert gets all", "past the range"])
def test_ties_and_experts_without_tokens(run: Run, kind: str) -> None:
    rng, rows, count = np.random.default_rng(5), 70, 12
    logits = torch.zeros((rows, count)).half()
    if kind == "two values":
        logits = torch.from_numpy(rng.integers(0, 2, (rows, count))).half()
    elif kind == "one expert gets all":
        logits[:, 7], logits[:, 3] = 5.0, torch.from_numpy(rng.standard_normal(rows)).half() + 20
    elif kind == "past the range":
        logits[:, 4], logits[:, 5] = float("inf"), float("-inf")
    product = Product((), experts=count, chosen=2)
    routing = route(run, logits, product, normalized=True)
    check(routing, logits.clamp(-65504, 65504), product, normalized=True)


@pytest.mark.parametrize("paired", [True, False])
def test_every_gpu_has_room_for_a_config(paired: bool) -> None:
    rng = np.random.default_rng(1)
    # The widest weights, in groups that end within a chunk; gate and up want their rows in two orders.
    matrices = tuple(exl2(rng, 128, (8, 4), (96, 160))[0] for _ in range(8))
    widest = Product(matrices, paired=paired, experts=4 if paired else 8, chosen=2)
    for rows in ROWS:
        for config, build in many_rows.builds(widest, rows, 99 << 10, wgmma=False).items():
            assert isinstance(config, GemmConfig)
            assert config.rows >= many_rows.expert_rows(widest, min(rows, many_rows.MOST_ROWS))
            assert build.shared_bytes <= 99 << 10
        assert many_rows.builds(widest, rows, 227 << 10, wgmma=True)


def emulated_maps(mapped: Mapped, xs: Sequence[Tensor], config: GemmConfig) -> None:
    for target, x in zip(mapped.x, xs, strict=False):
        target[:4] = x.data_ptr(), 2 * x.stride(0), len(x), config.rows


def mixture(
    run: Run,
    made: Made,
    x: Tensor,
    logits: Tensor,
    residual: Tensor,
    chosen: int,
    *,
    activation: str = "silu",
    normalized: bool = True,
    at_once: int = 5,
    configs: Callable[[Product], GemmConfig] | None = None,
    write_maps: WriteMaps = emulated_maps,
) -> Tensor:
    """A residual plus a mixture's output, computed in buffers of NaN.

    Args:
        made: gate, up and down of each expert.
        x: its normed input.
        at_once: blocks that a GPU would hold at once.
        configs: chooses a product's config; a small one by default.
        write_maps: `many_rows.write_maps`, or an emulation of it.
    """
    rows, count = len(x), len(made)
    both = tuple(matrix for gate, up, _ in made for matrix, _ in (gate, up))
    gate_up = Product(both, paired=True, experts=count, chosen=chosen)
    down = Product(tuple(matrix for _, _, (matrix, _) in made), experts=count, chosen=chosen)
    hidden, inner = both[0].k, both[0].n

    def buffer(splits: int, columns: int) -> Tensor:
        shape = (splits * rows * chosen + 1, columns)
        return torch.full(shape, float("nan"), dtype=torch.float16, device=x.device)

    copies = [buffer(1, hidden) for _ in range(gate_up.orders)]
    acts, outs = buffer(1, inner), buffer(8, hidden)
    places = [
        None if matrix.perm is None else torch.argsort(matrix.perm.long() & 0xFFFF).to(torch.int16)
        for matrix in down.matrices
    ]
    first, second = ExpertTable(gate_up, copies, acts, places), ExpertTable(down, [acts], outs)
    threads = norm_rope.norm_threads(hidden, rows)
    routing = route(run, logits, gate_up, normalized=normalized)

    def config(product: Product) -> GemmConfig:
        tiles = many_rows.expert_rows(product, rows) // 8
        return configs(product) if configs else GemmConfig(4, 1, tiles, 2 if product.paired else 1, 2, 1)

    build = Variant(experts.DEFINES, 2 * hidden, experts.FILE, "dispatch")
    dispatched = experts.dispatch(x, routing, first, wgmma=config(gate_up).wgmma)
    run(build, "Dispatch", dispatched, rows * chosen, threads)
    operations = [ExpertOperation(first, rows, routing, activation), ExpertOperation(second, rows, routing)]
    for operation in operations:
        used = config(operation.product)
        build = many_rows.variant(operation.product, used)
        blocks, operation.splits = experts.grid(operation.product, rows, used, at_once)
        argument = operation.argument()
        if used.wgmma:
            mapped = many_rows.with_maps(argument)
            write_maps(mapped, operation.xs, used)
            run(build, "MappedProducts", mapped, blocks, used.threads)
        else:
            run(build, "Products", argument, blocks, used.threads)
    of_numbers = ~x.isnan().any(1)[routing.sources[: rows * chosen].long() & 0xFFFF]
    for written in (*copies, acts):
        assert not written[:-1][of_numbers].isnan().any()
        assert written[-1].isnan().all()
    assert outs[operations[1].splits * rows * chosen :].isnan().all()
    to = torch.cat([residual, torch.full_like(residual[:1], float("nan"))])
    run(
        Variant(experts.DEFINES, 0, experts.FILE, "combine"),
        "Combine",
        experts.combine(operations[1], to),
        rows,
        threads,
    )
    assert to[-1].isnan().all()
    return to[:-1].double()


def product(x: Tensor, made: tuple[QuantizedMatrix, Tensor]) -> Tensor:
    matrix, weight = made
    return x.double() @ weight.T + (0 if matrix.bias is None else matrix.bias)


def expected(
    made: Made,
    x: Tensor,
    logits: Tensor,
    residual: Tensor,
    chosen: int,
    *,
    activation: str = "silu",
    normalized: bool = True,
) -> Tensor:
    wanted = chosen_by(logits, chosen)
    weights = logits.double().softmax(1).gather(1, wanted)
    if normalized:
        weights /= weights.sum(1, keepdim=True)
    total = residual.double()
    for expert, matrices in enumerate(made):
        gate, up, down = matrices
        inner = product(x, gate)
        gated = functional.silu(inner) if activation == "silu" else functional.gelu(inner, approximate="tanh")
        out = product(gated * product(x, up), down)
        total = total + out * (weights * (wanted == expert)).sum(1, keepdim=True)
    return total


def four_warps(product: Product) -> GemmConfig:
    return GemmConfig(4, 1, 8, 2 if product.paired else 1, 2, 1, wgmma=True)


@pytest.mark.parametrize(
    ("rows", "count", "chosen", "hidden", "inner", "act_order", "group", "at_once", "options"),
    [
        (1, 4, 2, 256, 160, True, 128, 5, {}),
        (1, 4, 2, 160, 672, True, 32, 64, {"normalized": False}),  # down is split
        (7, 6, 3, 416, 96, True, 32, 3, {"activation": "gelu"}),
        (17, 5, 2, 96, 160, False, 32, 7, {}),
        (34, 2, 1, 160, 96, True, 128, 3, {}),
        (5, 8, 2, 64, 64, True, 32, 9, {}),
        (75, 3, 2, 256, 384, True, 128, 5, {"configs": four_warps}),
        (70, 2, 1, 384, 128, False, 32, 9, {"configs": four_warps}),
    ],
)
def test_mixtures_of_gptq(
    run: Run, rows: int, count: int, chosen: int, hidden: int, inner: int, act_order: bool, group: int,
    at_once: int, options: dict[str, object],
) -> None:  # fmt: skip
    rng = np.random.default_rng(rows * hidden)
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    made = [[gptq(rng, n, k, group, act_order) for n, k in shapes] for _ in range(count)]
    if act_order:
        made[1:3] = [[(replace(it, bias=inputs(rng, 1, it.n)[0] * 4), w) for it, w in of_it] for of_it in made[1:3]]
    x, logits, residual = inputs(rng, rows, hidden) / 8, inputs(rng, rows, count), inputs(rng, rows, hidden)
    said = {name: value for name, value in options.items() if name != "configs"}
    wanted = expected(made, x, logits, residual, chosen, **said)  # type: ignore[arg-type]
    got = mixture(run, made, x, logits, residual, chosen, at_once=at_once, **options)  # type: ignore[arg-type]
    assert error(got - residual, wanted - residual) < 3e-3
    again = mixture(run, made, x, logits, residual, chosen, at_once=at_once, **options)  # type: ignore[arg-type]
    assert torch.equal(got, again)


@pytest.mark.parametrize(
    ("rows", "shape", "bits", "scale", "inner"),
    [
        (3, (4, 4, 1), (4, 3, 2), 4, 160),
        (30, (8, 1, 4), (8, 5, 3), 0.1, 160),
        (60, (4, 1, 8), (8, 5, 3), 0.1, 128),
    ],
)
def test_mixtures_of_exl2(
    run: Run, rows: int, shape: tuple[int, int, int], bits: tuple[int, ...], scale: float, inner: int
) -> None:
    """Every matrix has another order and other widths."""
    rng = np.random.default_rng(rows)
    heights = [((96, 64, 96), (32, 64)), ((32, 160, 64), (32, 32)), ((128, 64, 64), (64, 32))]
    made = [
        [
            exl2(rng, inner, bits, of_x),
            exl2(rng, inner, bits, of_x[::-1]),
            exl2(rng, 256, bits, (*high, inner - sum(high))),
        ]
        for of_x, high in heights
    ]
    x, logits, residual = inputs(rng, rows, 256) * scale, inputs(rng, rows, 3), inputs(rng, rows, 256) / 1024
    logits[:, 1] = -9  # an expert that gets nothing

    def config(product: Product) -> GemmConfig:
        return GemmConfig(*shape, 2 if product.paired else 1, 3, 1, wgmma=inner % 128 == 0)

    got = mixture(run, made, x, logits, residual, 2, configs=config)
    assert error(got - residual, expected(made, x, logits, residual, 2) - residual) < 4e-3


def test_a_token_that_is_not_a_number_disturbs_no_other(run: Run) -> None:
    rng, rows, bad = np.random.default_rng(8), 9, 4
    made = [[gptq(rng, n, k, 32, True) for n, k in ((96, 64), (96, 64), (64, 96))] for _ in range(4)]
    x, logits, residual = inputs(rng, rows, 64) / 8, inputs(rng, rows, 4), inputs(rng, rows, 64)
    wanted = expected(made, x, logits, residual, 2) - residual
    x[bad], logits[bad] = float("nan"), float("nan")
    got = mixture(run, made, x, logits, residual, 2) - residual
    assert got[bad].isnan().all()
    others = [row for row in range(rows) if row != bad]
    assert error(got[others], wanted[others]) < 3e-3


def test_operations_to_measure_route_each_token_otherwise() -> None:
    matrix, _ = gptq(np.random.default_rng(0), 32, 64, 32, False)
    product = Product((matrix,) * 32, experts=32, chosen=4)
    rows, routed = 100, set()
    for operation in experts.trials([product] * 3, rows, torch.device("cpu")):
        tiles = operation.routing.tiles[: int(operation.routing.row_tiles)].tolist()
        assert [first for _, first, _ in tiles] == [0, *(end for *_, end in tiles[:-1])]
        assert tiles[-1][2] == rows * product.chosen
        assert sorted(expert for expert, *_ in tiles) == [expert for expert, *_ in tiles]
        assert all(0 < end - first <= many_rows.expert_rows(product, rows) for _, first, end in tiles)
        routed.add(tuple(map(tuple, tiles)))
    assert len(routed) == 3
