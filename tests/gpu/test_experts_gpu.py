"""Mixtures of experts on a real GPU: exl's kernels against float64, and against exllamav2's modules."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from test_experts import expected, mixture
from test_kernels import exl2, gptq, inputs
from test_kernels_gpu import original_kernels
from test_stages import load
from torch import Tensor

from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.exllamav2.kernels import many_rows
from exl_cli.engines.exllamav2.kernels.compiler import Kernel
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product, QuantizedMatrix, Variant
from exl_cli.engines.exllamav2.kernels.tuning import Tuner
from exl_cli.engines.exllamav2.mixtures import Mixtures

__all__ = ["original_kernels"]
KINDS = ["mixtral", "qwen3-moe", "qwen3-moe-plain-topk", "qwen3-moe-dense-layers"]


def run(build: Variant, _: str, argument: ctypes.Structure, blocks: int, threads: int) -> None:
    kernel = Kernel(build.file, build.name, build.defines, torch.device("cuda", 0), build.shared_bytes)
    kernel.bind((blocks,), threads, argument)(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


def random_matrix(rng: np.random.Generator, format_: str, columns: int, rows: int) -> tuple[QuantizedMatrix, Tensor]:
    if format_ == "gptq":
        matrix, weight = gptq(rng, columns, rows, 128, bool(rng.integers(2)))
    else:
        cuts = sorted(32 * int(cut) for cut in rng.choice(np.arange(1, rows // 32), 2, replace=False))
        bits = sorted((int(it) for it in rng.choice([2, 3, 4, 5, 6], 3)), reverse=True)
        matrix, weight = exl2(rng, columns, bits, [cuts[0], cuts[1] - cuts[0], rows - cuts[1]])
    fields = {field.name: getattr(matrix, field.name) for field in dataclasses.fields(matrix)}
    on_gpu = {name: value.cuda() for name, value in fields.items() if isinstance(value, Tensor)}
    # As exllamav2 keeps it.
    inverse = None if matrix.perm is None else torch.argsort(matrix.perm.long() & 0xFFFF).to(torch.int16).cuda()
    return dataclasses.replace(matrix, **on_gpu | {"inverse": inverse}), weight.cuda()


@pytest.mark.parametrize("format_", ["gptq", "exl2"])
@pytest.mark.parametrize("rows", [1, 3, 17, 100, 512])
@pytest.mark.parametrize("whole_chunks", [False, True])
def test_random_mixtures_in_every_config(format_: str, rows: int, whole_chunks: bool) -> None:
    rng = np.random.default_rng(rows)
    shared_bytes = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    unit = 128 if whole_chunks else 32
    hidden, inner = unit * int(rng.integers(4, 640 // unit)), unit * int(rng.integers(3, 640 // unit))
    count = int(rng.choice([4, 8, 24]))
    chosen = int(rng.integers(1, count))
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    made = [[random_matrix(rng, format_, columns, height) for columns, height in shapes] for _ in range(count)]
    x, logits, residual = (inputs(rng, rows, width).cuda() for width in (hidden, count, hidden))
    residual /= 1024
    # Neither past the range nor lost in the residual.
    while float((wanted := expected(made, x, logits, residual, chosen) - residual).abs().max()) > 1e4:
        x /= 2
    limits = [(99 << 10, False), (shared_bytes, False)]
    if torch.cuda.get_device_capability() == (9, 0):
        limits.append((shared_bytes, True))
    for limit, wgmma in limits:
        for index in range(3):

            def config(
                product: Product, limit: int = limit, index: int = index, wgmma: bool = wgmma
            ) -> many_rows.GemmConfig:
                configs = many_rows.configs(product, rows, limit, wgmma=wgmma)
                return configs[index % len(configs)]

            first, second = (
                mixture(
                    run, made, x, logits, residual, chosen, at_once=264, configs=config,
                    write_maps=many_rows.write_maps,
                )
                for _ in range(2)
            )  # fmt: skip
            assert float((first - residual - wanted).norm() / wanted.norm()) < 4e-3
            assert torch.equal(first, second)


@pytest.mark.parametrize("format_", ["gptq", "exl2"])
@pytest.mark.parametrize("rows", [1, 40, 600, 1500])
def test_any_number_of_tokens(format_: str, rows: int) -> None:
    rng, device = np.random.default_rng(rows), torch.device("cuda", 0)
    hidden, inner, count, chosen = 256, 384, 4, 2
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    made = [[random_matrix(rng, format_, columns, height) for columns, height in shapes] for _ in range(count)]
    both = tuple(matrix for gate, up, _ in made for matrix, _ in (gate, up))
    # A product that is exact in any order of its terms, so that no choice of experts is left to rounding.
    router = torch.eye(count, hidden, dtype=torch.half, device=device)
    x, residual = (inputs(rng, rows, hidden).cuda() / scale for scale in (8, 1024))
    while float((wanted := expected(made, x, x @ router.T, residual, chosen) - residual).abs().max()) > 1e4:
        x /= 2
    own: Any = SimpleNamespace(
        gate_up=Product(both, paired=True, experts=count, chosen=chosen),
        down=Product(tuple(down for *_, (down, _) in made), experts=count, chosen=chosen),
        router=router, normalized=True,
    )  # fmt: skip

    def room(size: int) -> Tensor:
        return torch.full((size,), float("nan"), dtype=torch.half, device=device)

    tuner = Tuner(device, [own.gate_up, own.down], room)
    states = residual.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        mixtures = Mixtures(device, [own], "silu", tuner, room)
        for launch in mixtures.bind(own, x, states, rows):
            launch(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert float((states - residual - wanted).norm() / wanted.norm()) < 4e-3


@pytest.mark.usefixtures("original_kernels")
@pytest.mark.parametrize("format_", ["gptq", "exl2"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_exllamav2s_modules(kind: str, format_: str, tmp_path: Path) -> None:
    """Prompts leave no choice of experts open."""
    folder = architectures.make(kind, tmp_path / "model", format_)
    *_, ids = architectures.prompts(kind, format_)

    def logits(cuts: tuple[int, ...] = ()) -> tuple[list[torch.Tensor], str]:
        thread = EngineThread(load(folder, cuts, architectures.CONTEXT))
        try:
            return [thread.cached_logits(ids, step) for step in (1, 8, 32)], thread.facts["kernels"]
        finally:
            thread.close()

    theirs, kernels = logits()
    assert "exllamav2's modules" in kernels
    del os.environ["EXL_KERNELS"]
    for cuts in ((), (1,)):
        ours, kernels = logits(cuts)
        assert kernels == "exl's kernels"
        for got, wanted in zip(ours, theirs, strict=True):
            assert float((got - wanted).norm() / wanted.norm()) < 1e-2
