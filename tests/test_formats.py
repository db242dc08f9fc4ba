"""Dequantizing EXL2 and GPTQ, against an independent packer and against exllamav2's results on a GPU."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exl_cli.models.formats import exl2, gptq

LAYER = "model.layers.0.mlp.up_proj"


def assert_is(weight: Tensor, expected: Any) -> None:
    """A code times a float16 scale is exact in float32, so no tolerance is needed."""
    assert weight.dtype == torch.float32
    assert weight.shape == expected.shape
    np.testing.assert_array_equal(weight.double().numpy(), expected)


# --- EXL2: layouts ---------------------------------------------------------------------------------------------------


@st.composite
def exl2_groups(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Groups of any bits, whole words each but for the last, which may end anywhere."""
    bits = draw(st.lists(st.sampled_from(quantize.BIT_WIDTHS), min_size=1, max_size=6))
    rows = [draw(st.integers(1, 4)) * 32 // math.gcd(width, 32) for width in bits]
    rows[-1] = draw(st.integers(1, 100))
    return bits, rows


@settings(deadline=None, max_examples=50)
@given(groups=exl2_groups(), columns=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_exl2_any_mixture_of_bits(groups: tuple[list[int], list[int]], columns: int, seed: int) -> None:
    tensors, expected = quantize.random_exl2(np.random.default_rng(seed), 8 * columns, *groups)
    assert_is(exl2.unpack(tensors), expected)


def test_exl2_words_written_by_hand() -> None:
    """Three bits: the 32 codes 0 1 2 … 7 0 1 … are the octal digits of a 96-bit number, read from its end."""
    number = int("76543210" * 4, 8)
    words = [number >> 32 * i & 0xFFFFFFFF for i in range(3)]
    assert words == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    tensors = {
        "q_weight": torch.tensor(words).to(torch.int32)[:, None].repeat(1, 8),
        "q_groups": torch.tensor([3, 0], dtype=torch.int16),
        "q_scale": torch.tensor([[0x7FFFFFFF]], dtype=torch.int32),  # steps of 16 eighths, the last column 8 eighths
        "q_scale_max": torch.tensor([0.5], dtype=torch.float16),
        "q_invperm": torch.arange(31, -1, -1, dtype=torch.int32),
    }
    weight = exl2.unpack(tensors)
    assert weight[0].tolist() == [0.5 * (code - 4) for code in (7, 6, 5, 4, 3, 2, 1, 0)] * 4
    assert weight[7].tolist() == [0.125 * (code - 4) for code in (7, 6, 5, 4, 3, 2, 1, 0)] * 4


def test_exl2_scale_is_rounded_to_float16_like_the_converter_rounds_it() -> None:
    """1e-3 / 256 is subnormal in float16: the nearest is 66 * 2 ** -24, 0.7 % above."""
    numbers = (np.full((32, 8), 3), np.full((1, 8), 15), np.array([1e-3]), [2], [32], np.arange(32))
    weight = exl2.unpack(quantize.pack_exl2(*numbers))
    assert weight.unique().tolist() == [256 * 66 * 2.0**-24]


def test_exl2_permutation_and_row_starts_are_unsigned() -> None:
    rng = np.random.default_rng(1)
    tensors, expected = quantize.random_exl2(rng, 8, [8, 8, 4], [33_000, 3_000, 1_000])
    tensors["q_invperm"] = tensors["q_invperm"].to(torch.int16)
    assert int(tensors["q_invperm"].min()) < 0
    assert_is(exl2.unpack(tensors), expected)
    tensors, expected = quantize.random_exl2(rng, 8, [8, 8, 3], [131_200, 256, 64])
    assert tensors["q_groups"].tolist()[1::2] == [0, 32_800 - 65_536, 32_864 - 65_536]
    assert_is(exl2.unpack(tensors), expected)


# --- GPTQ: layouts ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    words=st.integers(1, 24),
    groups=st.integers(1, 9),
    columns=st.integers(1, 6),
    zero_offset=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_gptq_any_g_idx(words: int, groups: int, columns: int, zero_offset: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    g_idx = rng.integers(0, groups, 8 * words)
    g_idx[0] = groups - 1
    tensors, expected = quantize.random_gptq(rng, 8 * columns, g_idx, zero_offset=zero_offset)
    assert_is(gptq.unpack(tensors, zero_offset=zero_offset), expected)


@pytest.mark.parametrize(
    ("rows", "size", "given_size"),
    [
        (512, 128, None),
        (512, 128, 128),
        (320, 128, None),  # three groups, the last of 64 rows
        (288, 96, 96),  # no power of two, so it must be said: 128 would make three groups as well
        (288, 128, None),
        (768, 96, None),  # eight groups: 128 would make six
        (256, 256, None),
        (256, 256, -1),
        (40, 64, 64),
    ],
)
@pytest.mark.parametrize("stored", ["absent", "zeros", "sequential"])
def test_gptq_sequential_groups(rows: int, size: int, given_size: int | None, stored: str) -> None:
    rng = np.random.default_rng(rows)
    g_idx = np.arange(rows) // size
    tensors, expected = quantize.random_gptq(rng, 16, g_idx, zero_offset=1, store_g_idx=stored == "sequential")
    if stored == "zeros":
        tensors["g_idx"] = torch.zeros(rows, dtype=torch.int32)
    assert_is(gptq.unpack(tensors, zero_offset=1, group_size=given_size), expected)


def test_gptq_words_written_by_hand() -> None:
    tensors = {
        "qweight": torch.tensor([0xF7654321]).to(torch.int32)[:, None].repeat(1, 8),
        "qzeros": torch.tensor([[0x77777777, 0x7777777F]]).to(torch.int32)[:, 1:],
        "scales": torch.full((1, 8), 0.25, dtype=torch.float16),
    }
    weight = gptq.unpack(tensors, zero_offset=1)
    assert weight[1].tolist() == [0.25 * (code - 8) for code in (1, 2, 3, 4, 5, 6, 7, 15)]
    assert weight[0].tolist() == [0.25 * (code - 16) for code in (1, 2, 3, 4, 5, 6, 7, 15)]
    weight = gptq.unpack(tensors, zero_offset=0)
    assert weight[1].tolist() == [0.25 * (code - 7) for code in (1, 2, 3, 4, 5, 6, 7, 15)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gptq_scales_of_other_types(dtype: torch.dtype) -> None:
    tensors, expected = quantize.random_gptq(np.random.default_rng(3), 16, np.arange(64) // 32, zero_offset=0)
    coarse = tensors["scales"].to(torch.bfloat16)
    tensors["scales"] = coarse.to(torch.float16)
    expected = gptq.unpack(tensors, zero_offset=0).double().numpy()
    tensors["scales"] = coarse.to(dtype)
    tensors["g_idx"] = tensors["g_idx"].to(torch.int64)
    assert_is(gptq.unpack(tensors, zero_offset=0), expected)


# --- both: what the caller may ask for -------------------------------------------------------------------------------

Unpack = Callable[..., Tensor]


def an_exl2_layer() -> tuple[dict[str, Tensor], Unpack]:
    tensors, _ = quantize.random_exl2(np.random.default_rng(4), 64, [6, 5, 4], [64, 64, 72])
    return tensors, exl2.unpack


def a_gptq_layer() -> tuple[dict[str, Tensor], Unpack]:
    tensors, _ = quantize.random_gptq(np.random.default_rng(5), 64, np.arange(200) // 64, zero_offset=1)
    return tensors, lambda tensors, **options: gptq.unpack(tensors, zero_offset=1, **options)


@pytest.fixture(params=[an_exl2_layer, a_gptq_layer], ids=["exl2", "gptq"])
def layer(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], Unpack]:
    return request.param()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_the_float32_weight_rounded_once(
    layer: tuple[dict[str, Tensor], Unpack], dtype: torch.dtype
) -> None:
    tensors, unpack = layer
    assert torch.equal(unpack(tensors, dtype=dtype), unpack(tensors).to(dtype))


def test_inputs_stay_as_they_are_and_need_not_be_contiguous(layer: tuple[dict[str, Tensor], Unpack]) -> None:
    tensors, unpack = layer
    strided = {key: tensor.repeat_interleave(2, dim=-1)[..., ::2] for key, tensor in tensors.items()}
    assert torch.equal(unpack(strided), unpack(tensors))
    assert all(torch.equal(strided[key], tensor) for key, tensor in tensors.items())


# --- the built-in model ----------------------------------------------------------------------------------------------


def read_layers(file: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The float tensors of a model file by name, and the quantized layers' tensors by layer."""
    from safetensors.torch import load_file

    floats, layers = {}, {}
    for key, tensor in load_file(file).items():
        layer, _, part = key.rpartition(".")
        if part == "weight":
            floats[key] = tensor.float()
        else:
            layers.setdefault(layer, {})[part] = tensor
    return floats, layers


def unpack_model(layers: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{layer}.weight": exl2.unpack(tensors, name=layer)
        if "q_weight" in tensors
        else gptq.unpack(tensors, zero_offset=1, group_size=128, name=layer)
        for layer, tensors in layers.items()
    }


MODELS = {"fable-7m-exl2": ("exl2_dir", "output.safetensors"), "fable-7m-gptq": ("gptq_dir", "model.safetensors")}


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_exllamav2_on_a_gpu(model: str, golden_path: Path, request: pytest.FixtureRequest) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, file = request.getfixturevalue(MODELS[model][0]), MODELS[model][1]
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    # The head has weights of its own in EXL2, tied or not.
    config |= {"tie_word_embeddings": False, "dtype": "float32"}
    network = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    floats, layers = read_layers(folder / file)
    weights = floats | unpack_model(layers)
    weights.setdefault("lm_head.weight", floats["model.embed_tokens.weight"])
    network.load_state_dict(weights)
    golden = np.load(golden_path)
    for prompt in (0, 1):
        expected = torch.from_numpy(golden[f"{model}.{prompt}.logits"]).float()
        with torch.no_grad():
            ids = torch.from_numpy(golden[f"{model}.{prompt}.ids"]).long()
            logits = network(ids[None]).logits[0, -len(expected) :]
        assert float((logits - expected).norm() / expected.norm()) <= 0.003
        assert float((logits.argmax(-1) == expected.argmax(-1)).float().mean()) >= 0.95


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(field: str) -> int:
    """Of /proc/self/status, in bytes."""
    return 1024 * int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def gptq_layer(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "qweight": words(rows // 8, columns),
        "qzeros": words(rows // 128, columns // 8),
        "scales": torch.rand(rows // 128, columns).half(),
        "g_idx": (torch.randperm(rows) // 128).int(),
    }


def exl2_layer(rows: int, columns: int) -> dict[str, Tensor]:
    bits = torch.tensor([6, 5, 4, 3]).repeat_interleave(rows // 512)
    starts = (bits.cumsum(0) - bits) * 4
    return {
        "q_weight": words(int(bits.sum()) * 4, columns),
        "q_scale": words(rows // 128, columns // 8),
        "q_scale_max": torch.rand(rows // 128).half(),
        "q_groups": torch.stack([bits, starts], 1).flatten().short(),
        "q_invperm": torch.randperm(rows).int(),
    }


def unpack_at_once(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = ((qweight[:, None] >> shifts[:, None]) & 15).flatten(0, 1)
    zeros = ((qzeros[:, :, None] >> shifts) & 15).flatten(1) + 1
    return (codes - zeros[g_idx]) * scales.float()[g_idx]


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that become resident meanwhile. Large tensors are mapped, and unmapped when they are freed."""
    Path("/proc/self/clear_refs").write_text("5")  # begin the highest resident size again
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts resident memory")
def test_a_large_layer_takes_less_than_twice_its_size_to_unpack() -> None:
    """The last one shows that the measure notices a layer that is unpacked all at once."""
    layers = gptq_layer(2048, 7168), exl2_layer(7168, 2048)
    size = 4 * 2048 * 7168  # a weight's; the system counts to within some pages for each thread
    assert 0.95 < peak_of(lambda: gptq.unpack(layers[0], zero_offset=1)) / size < 2.0
    assert 0.95 < peak_of(lambda: exl2.unpack(layers[1])) / size < 2.0
    assert peak_of(lambda: unpack_at_once(**layers[0])) > 2.0 * size
