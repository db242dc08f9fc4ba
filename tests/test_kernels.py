"""The quantized matmul kernel, emulated on the CPU, against float64 products."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernels.emulated import COMPILER, Emulated
from kernels.shuffled import as_loaded_exl2, as_loaded_gptq
from quantize import random_exl2, random_gptq
from torch import Tensor

from exl_cli.engines.exllamav2.kernels import norm_rope, quantized_linear
from exl_cli.engines.exllamav2.kernels.quantized_linear import QuantizedMatrix, from_exllamav2

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to compile the kernels for the CPU")


@pytest.fixture(scope="module")
def folder(kernels_folder: Path) -> Path:
    return kernels_folder


def exl2(
    rng: np.random.Generator, columns: int, bits: Sequence[int], rows: Sequence[int]
) -> tuple[QuantizedMatrix, Tensor]:
    tensors, weight = random_exl2(rng, columns, bits, rows)
    (matrix,) = from_exllamav2([as_loaded_exl2(tensors)])
    assert matrix is not None
    return matrix, torch.from_numpy(weight)


def gptq(
    rng: np.random.Generator, columns: int, rows: int, group: int, act_order: bool
) -> tuple[QuantizedMatrix, Tensor]:
    g_idx = np.arange(rows) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    tensors, weight = random_gptq(rng, columns, g_idx, zero_offset=1, store_g_idx=act_order)
    (matrix,) = from_exllamav2([as_loaded_gptq(tensors)])
    assert matrix is not None
    return matrix, torch.from_numpy(weight)


def ordered(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    """The input in the order of the weight's rows."""
    return x if matrix.perm is None else x[:, matrix.perm.long() & 0xFFFF].contiguous()


def multiply(
    folder: Path,
    matrices: Sequence[QuantizedMatrix],
    xs: Sequence[Tensor],
    *,
    paired: bool = False,
    activation: str = "silu",
    add: Tensor | None = None,
    scatter: Tensor | None = None,
    norm: Tensor | None = None,
    warps: int = 4,
    stages: int = 3,
    columns: int = 32,
) -> list[Tensor]:
    """All products by one launch; outputs and what lies around them are NaN before."""
    rows = len(xs[0])
    product = quantized_linear.Product(tuple(matrices), paired)
    argument = quantized_linear.argument(product, rows, activation)
    # A single row is put in order by the kernel itself.
    inputs = [x if rows == 1 else ordered(matrix, x) for matrix, x in zip(matrices, xs, strict=True)]
    outs, kept = [], []
    for target, matrix in zip(argument.matrix, matrices, strict=False):
        out = torch.full((rows + 1, matrix.n + 32), float("nan"), dtype=torch.float16)
        if add is not None:
            out[:rows, : matrix.n] = add
            target.add = out.data_ptr()
        if norm is not None:
            kept.append(ordered(matrix, norm[None])[0])
            target.norm, target.epsilon = kept[-1].data_ptr(), 1e-5
        if scatter is not None:
            target.scatter = scatter.data_ptr()
        outs.append(out)
    quantized_linear.connect(argument, inputs, outs)
    tile = quantized_linear.TileConfig(warps, stages, columns)
    variant = quantized_linear.variant(product, rows, tile)
    kernel = Emulated(folder, quantized_linear.FILE, quantized_linear.NAME, "Products", variant.defines)
    kernel(argument, (product.blocks(tile), 1), 32 * warps)
    for out, matrix in zip(outs, matrices, strict=True):
        assert out[rows:].isnan().all()
        assert out[:, matrix.n :].isnan().all()
    return [out[:rows, : matrix.n].double() for out, matrix in zip(outs, matrices, strict=True)]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def in_range(t: Tensor) -> Tensor:
    """What float16 can hold of it; a NaN stays one."""
    return t.clamp(-65504, 65504)


def inputs(rng: np.random.Generator, rows: int, k: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal((rows, k))).half()


@pytest.mark.parametrize(
    ("rows", "k", "group", "act_order"),
    [(1, 704, 64, True), (5, 416, 32, False), (8, 640, 128, True), (11, 256, 256, False)],
)
def test_gptq(folder: Path, rows: int, k: int, group: int, act_order: bool) -> None:
    rng = np.random.default_rng(rows * k)
    matrix, weight = gptq(rng, 96, k, group, act_order)
    x = inputs(rng, rows, k)
    (got,) = multiply(folder, [matrix], [x])
    assert error(got, x.double() @ weight.T) < 1e-3


@pytest.mark.parametrize(
    ("rows", "bits", "heights"),
    [
        (1, (8, 6, 5, 4, 3, 2), (32, 64, 32, 96, 160, 64)),
        (1, (3, 2), (96, 224)),
        (7, (5, 4), (32, 320)),
        (13, (6, 5), (128, 160)),
        (32, (4, 3), (64, 64)),
    ],
)
def test_exl2(folder: Path, rows: int, bits: tuple[int, ...], heights: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(bits) * rows)
    matrix, weight = exl2(rng, 64, bits, heights)
    x = inputs(rng, rows, sum(heights))
    (got,) = multiply(folder, [matrix], [x], stages=2)
    assert error(got, x.double() @ weight.T) < 2e-3


@pytest.mark.parametrize(("rows", "warps", "columns"), [(2, 4, 64), (16, 4, 128), (32, 8, 64)])
def test_warps_of_other_columns_share_the_rows(folder: Path, rows: int, warps: int, columns: int) -> None:
    """Some of them have a chunk less than others."""
    rng = np.random.default_rng(rows)
    made = [gptq(rng, columns, 608, 32, False) for columns in (256, 128)]
    x = inputs(rng, rows, 608)
    got = multiply(folder, [matrix for matrix, _ in made], [x, x], warps=warps, stages=2, columns=columns)
    for out, (_, weight) in zip(got, made, strict=True):
        assert error(out, x.double() @ weight.T) < 1e-3


def test_several_warps_columns_of_mixed_widths(folder: Path) -> None:
    rng = np.random.default_rng(12)
    matrix, weight = exl2(rng, 64, (5, 4, 2), (64, 96, 160))
    x = inputs(rng, 9, 320)
    (got,) = multiply(folder, [matrix], [x], warps=4, stages=2, columns=64)
    assert error(got, x.double() @ weight.T) < 2e-3


@pytest.mark.parametrize("act_order", [(False, False), (True, False)])
def test_both_of_a_pair_share_the_rows_or_not(folder: Path, act_order: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(10)
    made = [gptq(rng, 128, 416, 128 if not any(act_order) else 32, order) for order in act_order]
    x = inputs(rng, 11, 416) / 8
    got, _ = multiply(folder, [m for m, _ in made], [x, x], paired=True, warps=8, stages=3, columns=64)
    gate, up = (x.double() @ weight.T for _, weight in made)
    assert error(got, torch.nn.functional.silu(gate) * up) < 2e-3


def test_several_matrices_at_once(folder: Path) -> None:
    """Query, key and value: different widths, different orders of rows, one launch."""
    rng = np.random.default_rng(3)
    made = [
        exl2(rng, columns, bits, rows)
        for columns, bits, rows in [(96, (5, 4), (64, 128)), (32, (6, 3), (32, 160)), (64, (4, 2), (96, 96))]
    ]
    x = inputs(rng, 1, 192)
    got = multiply(folder, [matrix for matrix, _ in made], [x, x, x])
    for out, (_, weight) in zip(got, made, strict=True):
        assert error(out, x.double() @ weight.T) < 2e-3


@pytest.mark.parametrize(("activation", "rows"), [("silu", 1), ("gelu", 3)])
def test_a_gate_and_what_it_gates(folder: Path, activation: str, rows: int) -> None:
    rng = np.random.default_rng(4)
    made = [gptq(rng, 64, 384, 128, act_order) for act_order in (True, False)]
    x = inputs(rng, rows, 384) / 8
    scatter = torch.from_numpy(rng.permutation(64)).to(torch.int16)
    got, _ = multiply(
        folder, [m for m, _ in made], [x, x], paired=True, activation=activation, scatter=scatter, warps=4
    )
    gate, up = (x.double() @ weight.T for _, weight in made)
    function = (
        torch.nn.functional.silu if activation == "silu" else lambda v: torch.nn.functional.gelu(v, approximate="tanh")
    )
    expected = torch.empty_like(gate)
    expected[:, scatter.long()] = function(gate) * up
    assert error(got, expected) < 2e-3


def test_a_residual_is_added_and_a_bias(folder: Path) -> None:
    rng = np.random.default_rng(5)
    tensors, weight = random_gptq(rng, 64, np.arange(256) // 128, zero_offset=1)
    bias = inputs(rng, 1, 64)[0] * 10
    (matrix,) = from_exllamav2([as_loaded_gptq(tensors) | {"bias": bias}])
    assert matrix is not None
    x, residual = inputs(rng, 2, 256), inputs(rng, 2, 64) * 10
    (got,) = multiply(folder, [matrix], [x], add=residual, warps=2)
    assert error(got, x.double() @ torch.from_numpy(weight).T + bias + residual) < 1e-3


@pytest.mark.parametrize(("rows", "make"), [(1, gptq), (3, exl2)])
def test_sums_past_the_range_of_float16_become_its_ends(folder: Path, rows: int, make: Any) -> None:
    rng = np.random.default_rng(13)
    details = (256, 128, False) if make is gptq else ((4,), (256,))
    (gate, gate_weight), (up, up_weight) = (make(rng, 64, *details) for _ in range(2))
    x, residual = inputs(rng, rows, 256) * 10000, inputs(rng, rows, 64) * 30000
    (got,) = multiply(folder, [gate], [x], add=residual)
    sums = x.double() @ gate_weight.T + residual.double()
    assert sums.abs().max() > 65536
    np.testing.assert_allclose(got, in_range(sums), rtol=2e-3, atol=64)
    got, _ = multiply(folder, [gate, up], [x, x], paired=True)
    products = torch.nn.functional.silu(x.double() @ gate_weight.T) * (x.double() @ up_weight.T)
    assert products.abs().max() > 65536
    np.testing.assert_allclose(got, in_range(products), rtol=5e-3, atol=64)


def test_a_row_that_passed_the_range_is_normed_as_if_at_its_end(folder: Path) -> None:
    """What other kernels left infinite; normed rows may pass it, too. A NaN is not hidden."""
    rng = np.random.default_rng(14)
    matrix, weight = gptq(rng, 64, 256, 128, False)
    x, scale = inputs(rng, 2, 256) * 1000, inputs(rng, 1, 256)[0]
    x[0, 3], x[0, 77], x[1, 5], scale[3] = -torch.inf, torch.inf, torch.nan, 60000
    wide = in_range(x.double())
    normed = in_range(wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale.double())
    assert normed[0].abs().max() == 65504
    out = rms_norm(folder, x, scale)[0]
    assert out[1].isnan().all()
    np.testing.assert_allclose(out[0].double(), normed[0], rtol=2e-3, atol=1e-3)
    (got,) = multiply(folder, [matrix], [x[:1]], norm=scale)
    np.testing.assert_allclose(got[0], in_range(normed[0] @ weight.T), rtol=5e-3, atol=64)
    (got,) = multiply(folder, [matrix], [x[1:]])
    assert got.isnan().all()


def test_an_identity_permutation_is_skipped() -> None:
    """exllamav2 makes one for every file that says which group each row is in."""
    rng = np.random.default_rng(9)
    tensors, _ = random_gptq(rng, 32, np.arange(64) // 32, zero_offset=1)
    places = torch.arange(64).to(torch.int16)
    (matrix,) = from_exllamav2([as_loaded_gptq(tensors) | {"q_perm": places, "q_invperm": places}])
    assert matrix is not None
    assert matrix.perm is None
    assert matrix.inverse is None


def test_many_matrices_are_read_as_each_alone() -> None:
    rng = np.random.default_rng(11)
    several = [as_loaded_exl2(random_exl2(rng, 32, bits, (96, 64))[0]) for bits in ((5, 3), (8, 4))]
    g_idx = rng.permutation(np.arange(160) // 32)
    several.insert(1, as_loaded_gptq(random_gptq(rng, 32, g_idx, zero_offset=1, store_g_idx=True)[0]))
    several.append(several[2] | {name: several[0][name].clone() for name in ("q_perm", "q_invperm")})
    together = from_exllamav2(several)
    for tensors, matrix in zip(several, together, strict=True):
        (alone,) = from_exllamav2([tensors])
        assert matrix is not None
        assert alone is not None
        for field in dataclasses.fields(matrix):
            got, wanted = getattr(matrix, field.name), getattr(alone, field.name)
            assert torch.equal(got, wanted) if isinstance(wanted, Tensor) else got == wanted
    # Equal orders are one.
    assert len({matrix.order for matrix in together if matrix}) == 3


def test_matrices_that_the_kernel_cannot_take_are_left_to_exllamav2() -> None:
    rng = np.random.default_rng(7)
    small_groups, _ = random_gptq(rng, 32, np.arange(64) // 16, zero_offset=1)
    odd_columns, _ = random_gptq(rng, 40, np.arange(64) // 32, zero_offset=1)
    assert from_exllamav2([as_loaded_gptq(small_groups), as_loaded_gptq(odd_columns)]) == [None, None]


@pytest.mark.parametrize("reordered", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("paired", [False, True])
def test_one_row_is_normed_and_put_in_order_on_the_way(folder: Path, paired: bool, reordered: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(8)
    made = [gptq(rng, 32, 416, 32, act_order) for act_order in reordered]
    x, weight = inputs(rng, 1, 416) * 5, inputs(rng, 1, 416)[0]
    got = multiply(folder, [m for m, _ in made], [x, x], paired=paired, norm=weight)
    wide = x.double()
    normed = wide * (wide.square().mean() + 1e-5).rsqrt() * weight.double()
    expected = [normed @ w.T for _, w in made]
    if paired:
        expected = [torch.nn.functional.silu(expected[0]) * expected[1]]
    for out, wanted in zip(got, expected, strict=False):
        assert error(out, wanted) < 2e-3


def rms_norm(folder: Path, x: Tensor, weight: Tensor, *orders: Tensor, among: int = 1) -> list[Tensor]:
    """In the order of x, and in others, by as many threads as for so many rows."""
    rows, dim = x.shape
    outs = [torch.full_like(x, float("nan")) for _ in range(1 + len(orders))]
    argument = norm_rope.NormArgument(x=x.data_ptr(), weight=weight.data_ptr(), epsilon=1e-5, dim=dim, outs=len(outs))
    for index, (out, order) in enumerate(zip(outs, (None, *orders), strict=True)):
        argument.out[index] = out.data_ptr()
        argument.perm[index] = None if order is None else order.data_ptr()
    Emulated(folder, norm_rope.FILE, "rms_norm", "Norm", {})(argument, (rows, 1), norm_rope.norm_threads(dim, among))
    return outs


@pytest.mark.parametrize(("dim", "among"), [(64, 1), (288, 1), (4096, 1), (4096, 2048), (4352, 2048)])
def test_rms_norm_in_several_orders(folder: Path, dim: int, among: int) -> None:
    rng = np.random.default_rng(dim)
    x, weight = inputs(rng, 3, dim), inputs(rng, 1, dim)[0]
    perm = torch.from_numpy(rng.permutation(dim)).to(torch.int16)
    outs = rms_norm(folder, x, weight, perm, among=among)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert error(outs[0].double(), expected) < 5e-4
    assert torch.equal(outs[1], outs[0][:, perm.long()])


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "turned", "normed", "past_the_range"),
    [(64, 64, False, False), (128, 128, True, False), (80, 40, False, False), (64, 64, False, True)],
)
def test_rotary_embedding_and_the_cache(
    folder: Path, head_dim: int, turned: int, normed: bool, past_the_range: bool, many: bool
) -> None:
    """Two sequences of three tokens, on pages out of order; transformers' definition of the rotation."""
    rng = np.random.default_rng(head_dim)
    heads, kv_heads, tokens, page_size = 4, 2, 3, 4
    lengths = torch.tensor([6, 1], dtype=torch.int32)
    table = torch.tensor([[4, 1, 3], [2, 0, 5]], dtype=torch.int32)
    qkv = inputs(rng, 2 * tokens, (heads + 2 * kv_heads) * head_dim)
    if past_the_range:
        qkv *= torch.inf
    angles = torch.outer(torch.arange(16.0), 10000.0 ** (-torch.arange(0, turned, 2) / turned)).repeat(1, 2)
    sine, cosine = angles.sin().half(), angles.cos().half()
    q_weight, k_weight = inputs(rng, heads, head_dim), inputs(rng, kv_heads, head_dim)
    keys, values = (torch.full((6, page_size, kv_heads, head_dim), float("nan"), dtype=torch.float16) for _ in "kv")
    before = qkv.view(2, tokens, heads + 2 * kv_heads, head_dim).double().clamp(-65504, 65504)
    argument = norm_rope.RopeArgument(
        qkv=qkv.data_ptr(), sine=sine.data_ptr(), cosine=cosine.data_ptr(), lengths=lengths.data_ptr(),
        table=table.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(),
        q_weight=q_weight.data_ptr() if normed else None, k_weight=k_weight.data_ptr() if normed else None,
        epsilon=1e-6, heads=heads, kv_heads=kv_heads, head_dim=head_dim, turned=turned, tokens=tokens,
        stride=qkv.stride(0), table_stride=3, page_size=page_size, rows=2 * tokens,
    )  # fmt: skip
    if many:
        blocks = -(-2 * tokens * (heads + 2 * kv_heads) // 8)
        Emulated(folder, norm_rope.FILE, "rotate_many", "Rope", {})(argument, (blocks,), 256)
    else:
        threads = -(-head_dim // 2 // 32) * 32
        Emulated(folder, norm_rope.FILE, "rotate", "Rope", {})(argument, (2 * tokens, heads + 2 * kv_heads), threads)

    q, k, v = before.split([heads, kv_heads, kv_heads], 2)
    if normed:
        q, k = (
            t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
            for t, w in ((q, q_weight), (k, k_weight))
        )
    positions = lengths.long()[:, None] + torch.arange(tokens)
    cos, sin = cosine.double()[positions][:, :, None], sine.double()[positions][:, :, None]

    def rotated(t: Tensor) -> Tensor:
        part = t[..., :turned]
        turned_part = part * cos + torch.cat((-part[..., turned // 2 :], part[..., : turned // 2]), -1) * sin
        return torch.cat((turned_part, t[..., turned:]), -1)

    after = qkv.view(2, tokens, heads + 2 * kv_heads, head_dim).double()
    assert error(after[:, :, :heads], in_range(rotated(q))) < 1e-3
    pages, places = table.long().gather(1, positions // page_size), positions % page_size
    assert error(keys.double()[pages, places], in_range(rotated(k))) < 1e-3
    assert torch.equal(values.double()[pages, places], v)
    assert int(keys.isnan().all(-1).sum()) == (6 * page_size - 2 * tokens) * kv_heads


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 32])
@pytest.mark.parametrize(("bits", "k"), [(4, 4096), (4, 28672), (6, 14336), (8, 28672)])
def test_some_tile_fits_the_gpus_of_least_shared_memory(rows: int, bits: int, k: int) -> None:
    """A block has 99 KB at most on compute capabilities 8.6 and 8.9, 227 KB on 9.0 (CUDA programming guide)."""
    rng = np.random.default_rng(0)
    matrix, _ = exl2(rng, 32, (bits,), (32,))
    product = quantized_linear.Product((dataclasses.replace(matrix, k=k),), reorders=False)
    *usual, small = quantized_linear.tile_configs(rows)
    of_32_columns = [tile for tile in usual if tile.columns == 32]
    needed = {tile: quantized_linear.variant(product, rows, tile).shared_bytes for tile in (*of_32_columns, small)}
    for limit in (99 * 1024, 227 * 1024):
        fitting = [tile for tile in of_32_columns if needed[tile] <= limit]
        chosen = quantized_linear.builds(product, rows, limit)
        # The last one only where it must be.
        assert list(chosen) == (fitting or [small])
        assert max(build.shared_bytes for build in chosen.values()) <= limit
    assert quantized_linear.builds(product, rows, min(needed.values()) - 1) == {}
