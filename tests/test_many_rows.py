"""The GEMM kernel, emulated on the CPU, against float64 products."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels.emulated import COMPILER, Emulated
from test_kernels import error, exl2, gptq, inputs, ordered
from torch import Tensor

from exl_cli.engines.exllamav2.kernels import dense, many_rows, norm_rope, quantized_linear
from exl_cli.engines.exllamav2.kernels.many_rows import GemmConfig
from exl_cli.engines.exllamav2.kernels.quantized_linear import QuantizedMatrix

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to compile the kernels for the CPU")


@pytest.fixture(scope="module")
def folder(kernels_folder: Path) -> Path:
    return kernels_folder


def arranged(matrix: QuantizedMatrix, x: Tensor, config: GemmConfig) -> Tensor:
    """The input in the order that a build wants, a part of a wider tensor that is NaN around it."""
    rows, k = x.shape
    wide = torch.full((rows + 1, k + 8), float("nan"), dtype=torch.float16)
    wide[:rows, :k] = x[:, many_rows.places(matrix.perm, k).long() & 0xFFFF] if config.wgmma else ordered(matrix, x)
    return wide[:rows, :k]


def multiply(
    folder: Path,
    matrices: Sequence[QuantizedMatrix],
    x: Tensor,
    config: GemmConfig,
    blocks: int,
    *,
    paired: bool = False,
    activation: str = "silu",
    add: Tensor | None = None,
    scatter: Tensor | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """All products by one launch; outputs, what lies around them and the workspace are NaN before."""
    rows = len(x)
    product = quantized_linear.Product(tuple(matrices), paired)
    argument = quantized_linear.argument(product, rows, activation)
    outs = []
    for target, matrix in zip(argument.matrix, matrices, strict=False):
        out = torch.full((rows + 1, matrix.n + 32), float("nan"), dtype=torch.float16)
        if add is not None:
            out[:rows, : matrix.n] = add
            target.add = out.data_ptr()
        if scatter is not None:
            target.scatter = scatter.data_ptr()
        outs.append(out)
    xs = [arranged(matrix, x, config) for matrix in matrices]
    quantized_linear.connect(argument, xs, outs)
    variant = many_rows.variant(product, config)
    units = config.units(product, rows)
    partial = torch.full((many_rows.partial_floats(config, blocks),), float("nan"))
    arrived = torch.zeros(units, dtype=torch.int32)
    argument.partial, argument.arrived = partial.data_ptr(), arrived.data_ptr()
    argument.splits = config.splits(product, rows, blocks)
    grid = (config.blocks(product, rows, blocks),)
    if config.wgmma:
        mapped = many_rows.with_maps(argument)
        for target, own in zip(mapped.x, xs, strict=False):
            target[:4] = own.data_ptr(), 2 * own.stride(0), rows, config.rows
        kernel = Emulated(folder, many_rows.FILE, many_rows.NAME, "MappedProducts", variant.defines)
        kernel(mapped, grid, config.threads, seed)
    else:
        kernel = Emulated(folder, many_rows.FILE, many_rows.NAME, "Products", variant.defines)
        kernel(argument, grid, config.threads, seed)
    assert not arrived.any()
    for out, matrix in zip(outs, matrices, strict=True):
        assert out[rows:].isnan().all()
        assert out[:, matrix.n :].isnan().all()
    return [out[:rows, : matrix.n].double() for out, matrix in zip(outs, matrices, strict=True)]


def biased(rng: np.random.Generator, matrix: QuantizedMatrix, weight: Tensor) -> tuple[QuantizedMatrix, Tensor, Tensor]:
    """The matrix with a bias, its values, and the bias."""
    bias = inputs(rng, 1, matrix.n)[0]
    return replace(matrix, bias=bias), weight, bias


SMALL = GemmConfig(warps=4, row_warps=1, tiles=2, strips=1, stages=2, resident=1)
HIGH = GemmConfig(warps=4, row_warps=2, tiles=2, strips=2, stages=3, resident=1)
WGMMA = GemmConfig(warps=4, row_warps=1, tiles=4, strips=1, stages=2, resident=1, wgmma=True)
SPLIT_K = replace(WGMMA, split_k=True)
WGMMA_HIGH = GemmConfig(warps=8, row_warps=2, tiles=8, strips=2, stages=2, resident=1, wgmma=True)
WGMMA_PAIR = GemmConfig(warps=4, row_warps=1, tiles=4, strips=2, stages=3, resident=1, wgmma=True)


@pytest.mark.parametrize(
    ("rows", "k", "columns", "group", "act_order", "config", "blocks"),
    [
        (9, 416, 96, 32, False, SMALL, 3),
        (16, 640, 160, 128, True, SMALL, 7),
        (33, 256, 224, 128, False, HIGH, 5),
        (37, 704, 64, 64, True, HIGH, 2),
        (45, 384, 160, 64, True, WGMMA, 5),
        (130, 256, 288, 128, False, WGMMA_HIGH, 3),
        (45, 384, 160, 64, False, SPLIT_K, 3),
        (20, 384, 160, 128, True, SPLIT_K, 7),
    ],
)
def test_gptq(
    folder: Path, rows: int, k: int, columns: int, group: int, act_order: bool, config: GemmConfig, blocks: int
) -> None:
    rng = np.random.default_rng(rows * k)
    matrix, weight = gptq(rng, columns, k, group, act_order)
    x = inputs(rng, rows, k)
    (got,) = multiply(folder, [matrix], x, config, blocks)
    assert error(got, x.double() @ weight.T) < 1e-3
    # Blocks in another order, and copies at other times, change not a bit.
    (again,) = multiply(folder, [matrix], x, config, blocks, seed=rows | 1)
    assert torch.equal(got, again)


@pytest.mark.parametrize(
    ("rows", "bits", "heights", "config", "blocks"),
    [
        (17, (8, 6, 5, 4, 3, 2), (32, 64, 32, 96, 160, 64), HIGH, 4),
        (10, (3, 2), (96, 224), SMALL, 3),
        (12, (6, 5, 4), (128, 128, 256), SMALL, 4),
        (20, (5, 3), (128, 160), HIGH, 1),
        (33, (8, 6, 5, 4, 3, 2), (32, 64, 32, 96, 192, 96), WGMMA, 4),
    ],
)
def test_exl2(
    folder: Path, rows: int, bits: tuple[int, ...], heights: tuple[int, ...], config: GemmConfig, blocks: int
) -> None:
    rng = np.random.default_rng(len(bits) * rows)
    matrix, weight = exl2(rng, 96, bits, heights)
    x = inputs(rng, rows, sum(heights))
    (got,) = multiply(folder, [matrix], x, config, blocks)
    assert error(got, x.double() @ weight.T) < 2e-3


@pytest.mark.parametrize(
    ("act_order", "config", "blocks"),
    [
        ((False, False), HIGH, 3),
        ((True, False), HIGH, 3),
        ((False, False), replace(WGMMA_PAIR, split_k=True), 2),
        ((True, False), WGMMA_PAIR, 2),
    ],
)
def test_a_gate_and_what_it_gates(folder: Path, act_order: tuple[bool, ...], config: GemmConfig, blocks: int) -> None:
    rng = np.random.default_rng(4)
    made = [biased(rng, *gptq(rng, 96, 384, *details)) for details in zip((128, 256), act_order, strict=True)]
    x = inputs(rng, 19, 384) / 8
    scatter = torch.from_numpy(rng.permutation(96)).to(torch.int16)
    got, _ = multiply(folder, [m for m, *_ in made], x, config, blocks, paired=True, scatter=scatter)
    gate, up = (x.double() @ weight.T + bias for _, weight, bias in made)
    expected = torch.empty_like(gate)
    expected[:, scatter.long()] = torch.nn.functional.silu(gate) * up
    assert error(got, expected) < 2e-3


@pytest.mark.parametrize("config", [HIGH, WGMMA_PAIR])
def test_a_gate_with_other_bit_widths_than_up(folder: Path, config: GemmConfig) -> None:
    rng = np.random.default_rng(6)
    made = [exl2(rng, 64, bits, heights) for bits, heights in [((5, 4), (128, 256)), ((3, 2), (160, 224))]]
    x = inputs(rng, 10, 384) / 8
    got, _ = multiply(folder, [m for m, _ in made], x, config, 2, paired=True, activation="gelu")
    gate, up = (x.double() @ weight.T for _, weight in made)
    assert error(got, torch.nn.functional.gelu(gate, approximate="tanh") * up) < 2e-3


@pytest.mark.parametrize(
    ("rows", "config", "blocks"),
    [
        (18, SMALL, 5),
        (45, WGMMA, 7),  # tiles are split at different places
        (45, SPLIT_K, 19),  # two blocks a tile, for two and three chunks
        (45, SPLIT_K, 5),  # no tile is split, and blocks have one or two
    ],
)
def test_several_matrices_in_one_launch_and_a_residual(
    folder: Path, rows: int, config: GemmConfig, blocks: int
) -> None:
    rng = np.random.default_rng(3)
    made = [biased(rng, *gptq(rng, columns, 640, 128, columns > 100)) for columns in (160, 32, 96)]
    x, residual = inputs(rng, rows, 640), inputs(rng, rows, 1) * 10
    got = multiply(folder, [matrix for matrix, *_ in made], x, config, blocks, add=residual)
    for out, (_, weight, bias) in zip(got, made, strict=True):
        assert error(out, x.double() @ weight.T + bias + residual) < 1e-3


@pytest.mark.parametrize("act_order", [(False, False), (True, False)])
def test_a_pair_computed_as_two_outputs(folder: Path, act_order: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(11)
    made = [biased(rng, *gptq(rng, 96, 384, 128, order)) for order in act_order]
    x = inputs(rng, 40, 384)
    got = multiply(folder, [matrix for matrix, *_ in made], x, replace(SPLIT_K, unfused=True), 8, paired=True)
    for out, (_, weight, bias) in zip(got, made, strict=True):
        assert error(out, x.double() @ weight.T + bias) < 1e-3


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("processors", [8, 132])
def test_blocks_share_all_work_and_fit_the_workspace(processors: int, paired: bool) -> None:
    """A launch must have no more blocks than a GPU holds; the workspace is that of the most rows with these configs."""
    matrix, _ = gptq(np.random.default_rng(0), 32, 256, 128, False)
    for n, k in itertools.product((32, 1024, 14336), (128, 4096)):
        product = quantized_linear.Product((replace(matrix, n=n, k=k),) * 2, paired)
        for most, rows in ((16, 9), (32, 17), (64, 33), (128, 65), (256, 129), (512, 257), (512, 512)):
            for config in many_rows.configs(product, most, 227 << 10, wgmma=True):
                at_once = config.resident * processors
                tiles, blocks = config.tiles_of(product, rows), config.blocks(product, rows, at_once)
                splits = config.splits(product, rows, at_once)
                assert 0 < blocks <= min(at_once, config.units(product, rows))
                assert splits <= k // 128
                assert not config.split_k or (blocks == tiles * splits if splits > 1 else blocks == min(tiles, at_once))
                assert tiles <= config.tiles_of(product, most)


@pytest.mark.parametrize(("k", "wgmma"), [(4096, True), (4128, False), (1 << 16, True), ((1 << 16) + 128, False)])
def test_inputs_in_the_order_of_four_warps(k: int, wgmma: bool) -> None:
    matrix, _ = gptq(np.random.default_rng(0), 32, 256, 128, False)
    product = quantized_linear.Product((replace(matrix, k=k),))
    assert {config.wgmma for config in many_rows.configs(product, 64, 227 << 10, wgmma=True)} == {wgmma}
    if wgmma:
        order, inverse = many_rows.order(product.matrices[0], WGMMA)
        assert order is not None
        assert inverse is not None
        assert torch.equal((order.long() & 0xFFFF)[inverse.long() & 0xFFFF], torch.arange(k))


def dequantized(folder: Path, matrix: QuantizedMatrix) -> Tensor:
    """The matrix by `dequantize.cu`, into poisoned memory; what lies around it stays as it was."""
    out = torch.full((matrix.k + 1, matrix.n + 32), float("nan"), dtype=torch.float16)
    kernel = Emulated(folder, dense.FILE, dense.NAME, "Dequantize", dense.defines(matrix))
    kernel(dense.argument(matrix, out), dense.grid(matrix), dense.THREADS)
    assert out[matrix.k :].isnan().all()
    assert out[:, matrix.n :].isnan().all()
    return out[: matrix.k, : matrix.n].double()


@pytest.mark.parametrize(("k", "group", "act_order"), [(416, 32, True), (256, 128, False), (704, 64, True)])
def test_a_matrix_of_gptq_unpacked(folder: Path, k: int, group: int, act_order: bool) -> None:
    matrix, weight = gptq(np.random.default_rng(k), 160, k, group, act_order)
    assert error(dequantized(folder, matrix), weight.T) < 1e-3


def test_a_matrix_of_exl2_unpacked(folder: Path) -> None:
    matrix, weight = exl2(np.random.default_rng(8), 96, (8, 6, 5, 4, 3, 2), (32, 64, 32, 96, 160, 64))
    assert error(dequantized(folder, matrix), weight.T) < 1e-3


@pytest.mark.parametrize(
    ("dim", "permuted", "threads"),
    [(96, False, 32), (416, True, 64), (1288, False, 32), (1288, True, 32), (5024, True, 256)],
)
def test_a_gate_whose_products_are_there(folder: Path, dim: int, permuted: bool, threads: int) -> None:
    rng = np.random.default_rng(dim)
    gate, up = (torch.from_numpy(rng.standard_normal((3, dim)) * 3).half() for _ in range(2))
    up[1, 5] = float("inf")
    perm = torch.from_numpy(rng.permutation(dim)) if permuted else torch.arange(dim)
    out = torch.full((4, dim), float("nan"), dtype=torch.float16)
    places = perm.to(torch.int16)
    argument = norm_rope.GateArgument(
        gate=gate.data_ptr(), up=up.data_ptr(), out=out.data_ptr(), perm=places.data_ptr() if permuted else None,
        dim=dim, stride=dim, activation=0,
    )  # fmt: skip
    Emulated(folder, norm_rope.FILE, "gate", "Gate", {})(argument, (3,), threads)
    expected = torch.nn.functional.silu(gate.double()) * up.double().clamp(-65504, 65504)
    assert error(out[:3].double(), expected.clamp(-65504, 65504)[:, perm]) < 1e-3
    assert out[3:].isnan().all()
