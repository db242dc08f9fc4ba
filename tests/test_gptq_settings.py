"""GPTQ models whose config.json contradicts their tensors load correctly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantize
import torch
from safetensors.torch import load_file, save_file
from shallow import shallow_gptq
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.engines.exllamav2.support import why_not
from exl_cli.errors import DamagedModelError, ExlError, UnsupportedModelError
from exl_cli.models.formats import gptq
from exl_cli.models.info import ModelInfo, inspect

ROWS, COLUMNS, LAYERS = 256, 64, 3
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}


def write(folder: Path, declared: dict[str, Any] | None, **stored: Any) -> dict[str, tuple[Any, Any]]:
    """Quantize float weights as GPTQ's authors do; returns each layer's, with the largest error that rounding makes."""
    rng = np.random.default_rng(0)
    tensors, weights = {}, {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.up_proj"
        parts, weight, error = layer_of(rng, **stored)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        weights[name] = weight, error
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    quantization = {} if declared is None else {"quantization_config": {"quant_method": "gptq", **declared}}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **quantization}))
    return weights


def layer_of(
    rng: np.random.Generator,
    *,
    symmetric: bool = True,
    zero_offset: int = 1,
    size: int = 64,
    act_order: bool = False,
    g_idx: str = "stored",
) -> tuple[dict[str, torch.Tensor], Any, Any]:
    weight = rng.normal(scale=0.02, size=(ROWS, COLUMNS))
    groups = np.arange(ROWS) // size
    if act_order:
        groups = rng.permutation(groups)
    scales, zeros = np.zeros((2, groups.max() + 1, COLUMNS))
    for group in range(len(scales)):
        low, high = weight[groups == group].min(0), weight[groups == group].max(0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scales[group] = np.float16((high - low) / 15)
        zeros[group] = 8 if symmetric else np.round(-low / scales[group])
    codes = np.clip(np.round(weight / scales[groups]) + zeros[groups], 0, 15)
    stored = {"stored": groups, "absent": None, "zeros": 0 * groups}[g_idx]
    parts = quantize.pack_gptq(codes, zeros.astype(int), scales, stored, zero_offset=zero_offset)
    return parts, weight.T, scales[groups].T


def check(info: ModelInfo, weights: dict[str, tuple[Any, Any]]) -> None:
    """What is read of the settings makes the float weights of what is stored, but for the rounding."""
    tensors = load_file(info.path / "model.safetensors")
    for name, (weight, step) in weights.items():
        parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        unpacked = gptq.unpack(parts, zero_offset=info.zero_offset, group_size=info.group_size)
        assert (np.abs(unpacked.numpy() - weight) <= 0.51 * step).mean() > 0.999
        assert (np.abs(unpacked.numpy() - weight) <= 1.01 * step).all()


SYMMETRIC = {"bits": 4, "group_size": 64, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
ASYMMETRIC = {**SYMMETRIC, "sym": False}
V2 = {"checkpoint_format": "gptq_v2"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "7 as gptq": ({}, SYMMETRIC, ""),
    "8 as gptq_v2": ({"zero_offset": 0}, SYMMETRIC | V2, ""),
    "8 as gptq": ({"zero_offset": 0}, SYMMETRIC, "checkpoint_format gptq, but the zero points are stored as gptq_v2"),
    "7 as gptq_v2": ({}, SYMMETRIC | V2, "checkpoint_format gptq_v2, but the zero points are stored as gptq"),
    "8, not symmetric": ({"zero_offset": 0}, ASYMMETRIC, "the zero points are stored as gptq_v2"),
    "7, not symmetric": ({}, ASYMMETRIC | V2, "the zero points are stored as gptq"),
    "7, nothing declared": ({}, None, ""),
    "8, nothing declared": ({"zero_offset": 0}, None, "the zero points are stored as gptq_v2"),
    "varying as gptq": ({"symmetric": False}, ASYMMETRIC, ""),
    "varying as gptq_v2": ({"symmetric": False, "zero_offset": 0}, ASYMMETRIC | V2, ""),
    "varying as GPTQ_V2": ({"symmetric": False, "zero_offset": 0}, {"checkpoint_format": "GPTQ_V2"}, ""),
    "varying v2 as gptq": ({"symmetric": False, "zero_offset": 0}, ASYMMETRIC, "are stored as gptq_v2"),
    "varying gptq as v2": ({"symmetric": False}, ASYMMETRIC | V2, "are stored as gptq; using"),
    "varying as symmetric": ({"symmetric": False}, SYMMETRIC, "symmetric weights, but their zero points vary"),
    "groups of 64 as 128": ({"g_idx": "absent"}, SYMMETRIC | {"group_size": 128}, "have groups of 64 rows"),
    "groups of 64 as one": ({"g_idx": "zeros"}, SYMMETRIC | {"group_size": -1}, "group_size -1, but the weights have"),
    "groups of 64 as text": ({"g_idx": "absent"}, SYMMETRIC | {"group_size": "64"}, "have groups of 64 rows"),
    "groups of 64, unsaid": ({"g_idx": "absent"}, SYMMETRIC | {"group_size": None}, ""),
    "one group as 128": (
        {"size": ROWS, "g_idx": "absent"},
        SYMMETRIC | {"group_size": 128},
        "the weights have one group",
    ),
    "groups of 96": ({"size": 96, "g_idx": "absent"}, SYMMETRIC | {"group_size": 96}, ""),
    "act-order": ({"act_order": True}, SYMMETRIC | {"desc_act": True}, ""),
    "act-order, not declared": ({"act_order": True}, SYMMETRIC, "no act-order, but the weights have it"),
    "in order, declared act-order": (
        {},
        SYMMETRIC | {"desc_act": True},
        "act-order, but the weights' groups are in order",
    ),
    "static groups": ({}, SYMMETRIC | {"desc_act": True, "static_groups": True}, ""),
    "one group, act-order": ({"size": ROWS, "g_idx": "zeros"}, {"group_size": -1, "desc_act": True}, ""),
    "4 bits as 8": ({}, SYMMETRIC | {"bits": 8}, "bits 8, but the weights have 4"),
    "wrong types": (
        {},
        {"bits": 4, "sym": "yes", "desc_act": "no", "group_size": [64]},
        "group_size [64], but the weights",
    ),
}


@pytest.mark.parametrize(("stored", "declared", "note"), CASES.values(), ids=CASES)
def test_the_weights_are_those_that_were_quantized(
    tmp_path: Path, stored: dict[str, Any], declared: dict[str, Any] | None, note: str
) -> None:
    weights = write(tmp_path, declared, **stored)
    info = inspect(tmp_path)
    check(info, weights)
    assert len(info.notes) == bool(note)
    assert note in "".join(info.notes)
    assert not stored.get("act_order") or info.format_name == "GPTQ 4-bit g64 act-order"


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors if value is None else {**tensors, name: value}, folder / "model.safetensors")


def test_layers_may_differ_in_their_groups(tmp_path: Path) -> None:
    weights = write(tmp_path, SYMMETRIC, g_idx="absent")
    parts, *weights["model.layers.1.mlp.up_proj"] = layer_of(np.random.default_rng(1), size=32, g_idx="absent")
    for part, tensor in parts.items():
        change(tmp_path, f"model.layers.1.mlp.up_proj.{part}", tensor)
    info = inspect(tmp_path)
    check(info, weights)
    assert "groups of 32 and 64 rows" in "".join(info.notes)
    assert (info.group_size, why_not(info)) == (None, "")


EIGHTS, SEVENS, THREES = (torch.full((4, 8), code * 0x11111111).to(torch.int32) for code in (8, 7, 3))


@pytest.mark.parametrize(
    ("stored", "declared", "part", "value", "error", "message"),
    [
        ({}, {}, "qzeros", EIGHTS, DamagedModelError, "stores 7 for every zero point in some layers, and 8 for"),
        ({}, {}, "qzeros", THREES, DamagedModelError, "stores 3 for every zero point in some layers, and 7 for"),
        ({}, {}, "qzeros", SEVENS.repeat(1, 2), UnsupportedModelError, "layers.1.mlp.up_proj is 8-bit GPTQ"),
        ({}, {}, "qzeros", SEVENS[1:], DamagedModelError, "qzeros: expected shape [4, 8], found [3, 8]"),
        ({}, {}, "qzeros", None, DamagedModelError, "layers.1.mlp.up_proj.qzeros: the tensor is missing"),
        ({}, {"desc_act": True}, "g_idx", None, DamagedModelError, "up_proj.g_idx, which has the order of the rows"),
        ({"g_idx": "zeros"}, {"desc_act": True}, "bias", None, DamagedModelError, "is all zero"),
    ],
)
def test_what_cannot_be_known_is_refused(
    tmp_path: Path, stored: Any, declared: Any, part: str, value: Any, error: type[ExlError], message: str
) -> None:
    write(tmp_path, SYMMETRIC | declared, **stored)
    if part != "bias":
        change(tmp_path, f"model.layers.1.mlp.up_proj.{part}", value)
    with pytest.raises(error) as caught:
        inspect(tmp_path)
    assert message in caught.value.message
    assert caught.value.hint


def test_groups_that_exllamav2_misreads_run_on_the_cpu(tmp_path: Path) -> None:
    """It sorts the rows by their groups, and then takes the first 64 for the first group, and so on."""
    write(tmp_path, SYMMETRIC, act_order=True)
    assert why_not(inspect(tmp_path)) == ""
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.g_idx"
    change(tmp_path, name, tensors[name].clamp(max=2))
    assert (
        why_not(inspect(tmp_path))
        == "exllamav2 only supports GPTQ groups of equal size, but those of model.layers.1.mlp.up_proj differ"
    )


def test_a_run_notes_contradictions_of_config_json(tmp_path: Path) -> None:
    """The fault as it was reported: 8 stored throughout, gptq declared, nonsense and exit code 0."""
    folder = shutil.copytree(shallow_gptq(), tmp_path / "model")
    args = ["run", str(folder), "--engine", "cpu", "-p", "Tell me a story.", "--temperature", "0", "-n", "24"]
    right = CliRunner().invoke(app, args)
    tensors = load_file(folder / "model.safetensors")
    zeros = {name: tensor + 0x11111111 for name, tensor in tensors.items() if name.endswith("qzeros")}
    save_file(tensors | zeros, folder / "model.safetensors")
    result = CliRunner().invoke(app, args)
    assert (result.exit_code, result.stdout) == (0, right.stdout)
    assert result.stderr.count("checkpoint_format gptq, but the zero points are stored as gptq_v2") == 1
    assert "stored as gptq_v2" in CliRunner().invoke(app, ["show", str(folder)]).stderr
