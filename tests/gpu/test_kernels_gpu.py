"""The quantized matmul kernels on a GPU, against float64 products, and a whole model with and without them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Recorder
from kernels.shuffled import as_loaded_exl2, as_loaded_gptq
from quantize import random_exl2, random_gptq

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import CachedScoring
from exl_cli.engines.exllamav2.kernels import many_rows, quantized_linear
from exl_cli.engines.exllamav2.kernels.compiler import Kernel
from exl_cli.engines.exllamav2.kernels.many_rows import GemmConfig
from exl_cli.engines.exllamav2.kernels.quantized_linear import QuantizedMatrix, from_exllamav2
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer


def random_matrix(rng: np.random.Generator, kind: str, columns: int) -> tuple[QuantizedMatrix, torch.Tensor]:
    if kind == "gptq":
        rows = 32 * int(rng.integers(1, 60))
        group = int(rng.choice([32, 64, 128, 1024]))
        g_idx = np.arange(rows) // group
        act_order = bool(rng.integers(2))
        if act_order:
            g_idx = rng.permutation(g_idx)
        tensors, weight = random_gptq(rng, columns, g_idx, zero_offset=1, store_g_idx=act_order)
        loaded = as_loaded_gptq(tensors)
    else:
        count = int(rng.integers(1, 9))
        bits = sorted((int(b) for b in rng.choice([2, 3, 4, 5, 6, 8], count)), reverse=True)
        step = int(rng.choice([32, 128]))
        tensors, weight = random_exl2(rng, columns, bits, [step * int(n) for n in rng.integers(1, 5, count)])
        loaded = as_loaded_exl2(tensors)
    (matrix,) = from_exllamav2([{name: tensor.cuda() for name, tensor in loaded.items()}])
    assert matrix is not None
    return matrix, torch.from_numpy(weight).cuda()


def product(matrix: QuantizedMatrix, x: torch.Tensor, tile: quantized_linear.TileConfig) -> torch.Tensor:
    """Into poisoned memory; what lies around the result stays as it was."""
    rows = len(x)
    one = quantized_linear.Product((matrix,))
    variant = quantized_linear.variant(one, rows, tile)
    kernel = Kernel(quantized_linear.FILE, quantized_linear.NAME, variant.defines, x.device, variant.shared_bytes)
    # A single row is put in order by the kernel itself.
    ordered = x if matrix.perm is None or rows == 1 else x[:, matrix.perm.long() & 0xFFFF].contiguous()
    out = torch.full((rows + 1, matrix.n + 8), float("nan"), dtype=torch.half, device=x.device)
    argument = quantized_linear.argument(one, rows)
    quantized_linear.connect(argument, [ordered], [out])
    launch = kernel.bind((one.blocks(tile),), 32 * tile.warps, argument)
    launch(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert out[rows:].isnan().all()
    assert out[:, matrix.n :].isnan().all()
    return out[:rows, : matrix.n].double()


@pytest.mark.parametrize("kind", ["gptq", "exl2"])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 13, 16, 32])
def test_products_of_random_matrices(kind: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for _ in range(4):
        matrix, weight = random_matrix(rng, kind, 32 * int(rng.choice([1, 2, 3, 4, 5, 8, 12])))
        x = torch.from_numpy(rng.standard_normal((rows, matrix.k))).half().cuda()
        expected = x.double() @ weight.T
        for tile in quantized_linear.tile_configs(rows):
            one = quantized_linear.Product((matrix,))
            if not one.blocks(tile) or quantized_linear.variant(one, rows, tile).shared_bytes > 160 * 1024:
                continue
            first, second = (product(matrix, x, tile) for _ in range(2))
            assert float((first - expected).norm() / expected.norm()) < 2e-3
            assert torch.equal(first, second)


def many_rows_product(matrix: QuantizedMatrix, x: torch.Tensor, config: GemmConfig) -> torch.Tensor:
    """Into poisoned memory, by way of a poisoned workspace; what lies around the result stays as it was."""
    rows, product = len(x), quantized_linear.Product((matrix,))
    variant = many_rows.variant(product, config)
    kernel = Kernel(variant.file, variant.name, variant.defines, x.device, variant.shared_bytes)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    at_once = min(config.resident, kernel.resident(config.threads)) * processors
    blocks = config.blocks(product, rows, at_once)
    partial = torch.full((many_rows.partial_floats(config, blocks),), float("nan"), device=x.device)
    arrived = torch.zeros(config.units(product, rows), dtype=torch.int32, device=x.device)
    order = many_rows.places(matrix.perm, matrix.k) if config.wgmma else matrix.perm
    ordered = x if order is None else x[:, order.long().to(x.device) & 0xFFFF].contiguous()
    out = torch.full((rows + 1, matrix.n + 8), float("nan"), dtype=torch.half, device=x.device)
    argument = quantized_linear.argument(product, rows)
    quantized_linear.connect(argument, [ordered], [out])
    argument.splits = config.splits(product, rows, at_once)
    argument.partial, argument.arrived = partial.data_ptr(), arrived.data_ptr()
    if config.wgmma:
        mapped = many_rows.with_maps(argument)
        many_rows.write_maps(mapped, [ordered], config)
        launch = kernel.bind((blocks,), config.threads, mapped)
    else:
        launch = kernel.bind((blocks,), config.threads, argument)
    launch(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert not arrived.any()
    assert out[rows:].isnan().all()
    assert out[:, matrix.n :].isnan().all()
    return out[:rows, : matrix.n].double()


@pytest.mark.parametrize("kind", ["gptq", "exl2"])
@pytest.mark.parametrize("rows", [9, 16, 31, 32, 64, 100, 200])
def test_products_of_many_rows_with_random_matrices(kind: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    wgmma = torch.cuda.get_device_capability() == (9, 0)
    shared_bytes = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for _ in range(3):
        matrix, weight = random_matrix(rng, kind, 32 * int(rng.choice([1, 3, 4, 8, 12, 40])))
        x = torch.from_numpy(rng.standard_normal((rows, matrix.k))).half().cuda()
        expected = x.double() @ weight.T
        one = quantized_linear.Product((matrix,))
        configs = [
            config
            for four, limit in [(False, 99 << 10), (False, shared_bytes), (wgmma, shared_bytes)]
            for config in many_rows.configs(one, rows, limit, wgmma=four)
        ]
        if wgmma and matrix.k % 128 == 0:
            configs += [GemmConfig(8, 1, 8, 1, 2, 1, wgmma=True), GemmConfig(8, 2, 16, 1, 2, 1, wgmma=True)]
        for config in configs:
            if many_rows.variant(one, config).shared_bytes > shared_bytes:
                continue
            first, second = (many_rows_product(matrix, x, config) for _ in range(2))
            assert float((first - expected).norm() / expected.norm()) < 2e-3
            assert torch.equal(first, second)


@pytest.fixture
def original_kernels() -> Iterator[None]:
    os.environ["EXL_KERNELS"] = "exllamav2"
    yield
    os.environ.pop("EXL_KERNELS", None)


def perplexity(folder: Path, ids: Sequence[int], step: int) -> tuple[float, str]:
    info = loader.resolve(str(folder))
    engine = EngineThread(loader.load(info, Tokenizer(info.path), LoadOptions(engine="exllamav2"), Recorder()))
    assert isinstance(engine, CachedScoring)
    logits = engine.cached_logits(ids, step)[:-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    return math.exp(float(loss)), engine.facts["kernels"]


@pytest.mark.usefixtures("original_kernels")
@pytest.mark.parametrize("format_", ["exl2", "gptq"])
def test_perplexity_is_that_of_exllamav2s_own_kernels(
    format_: str, exl2_dir: Path, gptq_dir: Path, tmp_path: Path
) -> None:
    folder = exl2_dir if format_ == "exl2" else gptq_dir
    text = "Once upon a time there was a little fox who lived under a big tree near the river. " * 20
    ids = Tokenizer(folder).encode(text, add_special_tokens=True)[:512]
    theirs, kernels = perplexity(folder, ids, 8)
    assert "exllamav2's modules" in kernels
    del os.environ["EXL_KERNELS"]
    ours, kernels = perplexity(folder, ids, 8)
    assert kernels == "exl's kernels"
    print(f"\n{format_}: {ours:.5f} and {theirs:.5f}, {100 * abs(ours / theirs - 1):.4f} % apart")
    assert abs(ours / theirs - 1) < 1e-3
