"""The kernels compile for every kind of GPU that they run on.

NVRTC needs none: it comes with the CUDA builds of torch, and as the wheel nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import exl2, gptq

from exl_cli.engines.exllamav2.kernels import (
    compiler,
    decode_attention,
    experts,
    many_rows,
    norm_rope,
    quantized_linear,
    sample,
)
from exl_cli.engines.exllamav2.kernels.many_rows import GemmConfig
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Shared memory that a block can have (CUDA programming guide, technical specifications).
CARDS = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}


def nvrtc() -> Any:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in (spec.submodule_search_locations or ())] if spec else []
    wheels = [path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")]
    for path in (*wheels, Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"):
        try:
            for part in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(part))  # which it looks for elsewhere
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


@pytest.fixture(scope="module")
def library() -> Any:
    return nvrtc() or pytest.skip("NVRTC is not installed")


def gemms(capability: tuple[int, int]) -> list[tuple[Product, GemmConfig]]:
    rng = np.random.default_rng(1)
    matrix, _ = gptq(rng, 128, 256, 128, False)
    fine, _ = exl2(rng, 128, (5, 4), (96, 160))
    wgmma = capability == (9, 0)
    of_experts_on_hopper = [
        (Product((fine, fine), paired=True, experts=1, chosen=1), GemmConfig(4, 1, 4, 2, 3, 2, wgmma=True)),
        (Product((matrix,), experts=1, chosen=1), GemmConfig(4, 1, 8, 1, 4, 2, wgmma=True)),
    ]
    return [
        (Product((matrix, matrix), paired=True), GemmConfig(4, 1, 4, 2, 3, 2, wgmma=wgmma)),
        (Product((matrix,)), GemmConfig(4, 1, 4, 1, 4, 3, wgmma=wgmma)),
        (Product((matrix,)), GemmConfig(4, 1, 2, 1, 4, 4)),
        (Product((fine,)), GemmConfig(4, 1, 4, 1, 4, 3, wgmma=wgmma)),
        (Product((fine, fine), paired=True, experts=1, chosen=1), GemmConfig(4, 1, 1, 2, 3, 2)),
        (Product((matrix,), experts=1, chosen=1), GemmConfig(8, 1, 4, 1, 3, 1)),
        *(of_experts_on_hopper if wgmma else []),
    ]


@pytest.mark.parametrize("capability", CARDS, ids=str)
def test_all_kernels_compile(library: Any, capability: tuple[int, int]) -> None:
    limit = CARDS[capability] << 10

    def compile_(file: str, defines: dict[str, int], shared_bytes: int) -> None:
        assert shared_bytes <= limit
        binary = compiler.compiled(library, (file, tuple(sorted(defines.items())), capability))
        assert binary.startswith(b"\x7fELF")

    for product, config in gemms(capability):
        variant = many_rows.variant(product, config)
        compile_(variant.file, variant.defines, variant.shared_bytes)
    for rows in (1, 32):
        product = Product(gemms(capability)[0][0].matrices)
        variant = next(iter(quantized_linear.builds(product, rows, limit).values()))
        compile_(variant.file, variant.defines, variant.shared_bytes)
    plan = decode_attention.plan(4, 1, 32, 8, 4096, 100)
    compile_(decode_attention.FILE, plan.defines(128, 256), plan.shared_bytes(128))
    compile_(norm_rope.FILE, {}, 0)
    compile_(experts.FILE, experts.DEFINES, experts.route_bytes(experts.MOST_EXPERTS))
    compile_(sample.FILE, {}, sample.SHARED_BYTES)
