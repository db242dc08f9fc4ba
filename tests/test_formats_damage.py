"""Damaged EXL2 and GPTQ tensors: one clear line that names the tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_formats import Unpack, a_gptq_layer, an_exl2_layer
from torch import Tensor

from exl_cli.errors import DamagedModelError
from exl_cli.models.formats import gptq
from exl_cli.models.formats.headers import TensorHeader
from exl_cli.models.formats.quantized_layers import quantized_layers

LAYER = "model.layers.0.mlp.up_proj"

_DTYPES = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.float32: "F32",
}

Damage = Callable[[dict[str, Tensor]], object]


def replace(key: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def put(key: str, index: Any, value: float) -> Damage:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return replace(key, change)


def remove(key: str) -> Damage:
    return lambda tensors: tensors.pop(key)


# The layer has 64 rows of 6 bits, 64 of 5 and 72 of 4, which begin at rows 0, 12 and 22 of q_weight's 31.
EXL2_DAMAGE: list[tuple[str, Damage, str]] = [
    *((key, remove(key), "missing") for key in ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm")),
    ("q_weight", replace("q_weight", lambda t: t.long()), "expected I32, found I64"),
    ("q_weight", replace("q_weight", lambda t: t[0]), "expected 2 dimensions, none of them 0, found shape [64]"),
    ("q_weight", replace("q_weight", lambda t: t[:, :0]), "found shape [31, 0]"),
    ("q_weight", replace("q_weight", lambda t: t[:, :60]), "a multiple of 8 columns, found 60"),
    ("q_scale", replace("q_scale", lambda t: t[:, 1:]), "expected shape [3, 8], found [3, 7]"),
    ("q_scale", replace("q_scale_max", lambda t: t[1:]), "expected shape [2, 8], found [3, 8]"),
    ("q_scale_max", replace("q_scale_max", lambda t: t.float()), "expected F16, found F32"),
    ("q_scale_max", put("q_scale_max", 1, math.nan), "not finite"),
    ("q_groups", replace("q_groups", lambda t: t[:-1]), "expected shape [6], found [5]"),
    ("q_groups", put("q_groups", 2, 7), "group 1 has 7 bits"),
    ("q_groups", put("q_groups", 2, 0), "group 1 has 0 bits"),
    ("q_groups", put("q_groups", 1, 2), "are not ascending"),
    ("q_groups", put("q_groups", 3, 22), "are not ascending"),
    ("q_groups", put("q_groups", 5, 11), "are not ascending"),
    ("q_groups", put("q_groups", 5, 31), "are not ascending"),
    ("q_groups", put("q_groups", 3, -1), "are not ascending"),
    ("q_groups", put("q_groups", 3, 11), "does not have a whole number of rows"),
    ("q_groups", replace("q_weight", lambda t: t[:-1]), "fill 30 rows of q_weight, but not 200 rows"),
    ("q_groups", replace("q_weight", lambda t: torch.cat([t, t])), "fill 62 rows of q_weight, but not 200 rows"),
    ("q_groups", replace("q_invperm", lambda t: torch.arange(128).int()), "but not 128 rows"),
    ("q_invperm", put("q_invperm", 0, 200), "not a permutation of 0 to 199"),
    ("q_invperm", replace("q_invperm", lambda t: t % 199), "not a permutation"),
    ("q_invperm", replace("q_invperm", lambda t: -t), "not a permutation"),
    ("q_invperm", replace("q_invperm", lambda t: t.float()), "expected I16 or I32, found F32"),
]

# The layer has 200 rows in groups of 64, four of them.
GPTQ_DAMAGE: list[tuple[str, Damage, str]] = [
    *((key, remove(key), "missing") for key in ("qweight", "qzeros", "scales")),
    ("qweight", replace("qweight", lambda t: t.short()), "expected I32, found I16"),
    ("qweight", replace("qweight", lambda t: t.flatten()), "expected 2 dimensions"),
    ("scales", replace("scales", lambda t: t.int()), "expected F16 or BF16 or F32, found I32"),
    ("scales", replace("scales", lambda t: t[:, 1:]), "expected shape [4, 64], found [4, 63]"),
    ("scales", put("scales", (2, 5), math.inf), "not finite"),
    ("qzeros", replace("qzeros", lambda t: t[1:]), "expected shape [4, 8], found [3, 8]"),
    ("qzeros", replace("qzeros", lambda t: t[:, 1:]), "expected shape [4, 8], found [4, 7]"),
    ("scales", replace("qweight", lambda t: t[:, :60]), "expected shape [4, 60], found [4, 64]"),
    ("g_idx", replace("g_idx", lambda t: t[1:]), "expected shape [200], found [199]"),
    ("g_idx", put("g_idx", 7, 4), "refers to groups 0 to 4, but scales has 0 to 3"),
    ("g_idx", put("g_idx", 7, -1), "refers to groups -1 to 3"),
    ("g_idx", replace("g_idx", lambda t: t.float()), "expected I32 or I64, found F32"),
]


def read(format_: str, tensors: dict[str, Tensor], unpack: Unpack) -> None:
    """Read a layer as both engines do: its header before any weight."""
    shown = {f"{LAYER}.{key}": (_DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    quantized_layers({name: TensorHeader(name, *each, 0, Path()) for name, each in shown.items()}, format_)
    unpack(tensors, name=LAYER)


def check_damage(format_: str, layer: tuple[dict[str, Tensor], Unpack], damage: Damage, key: str, message: str) -> None:
    tensors, unpack = layer
    damage(tensors)
    with pytest.raises(DamagedModelError) as caught:
        read(format_, tensors, unpack)
    assert caught.value.message.startswith(f"{LAYER}.{key}: ")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("key", "damage", "message"), EXL2_DAMAGE)
def test_damaged_exl2_layers(key: str, damage: Damage, message: str) -> None:
    check_damage("exl2", an_exl2_layer(), damage, key, message)


@pytest.mark.parametrize(("key", "damage", "message"), GPTQ_DAMAGE)
def test_damaged_gptq_layers(key: str, damage: Damage, message: str) -> None:
    check_damage("gptq", a_gptq_layer(), damage, key, message)


@pytest.mark.parametrize(
    ("groups", "group_size", "message"),
    [
        (4, 128, "has 4 groups, but 200 rows in groups of 128 need a different number"),
        (4, -1, "has 4 groups, but 200 rows in groups of 200 need a different number"),
        (150, None, "has 150 groups, which cannot divide 200 rows"),
    ],
)
def test_gptq_groups_that_do_not_fit_the_rows(groups: int, group_size: int | None, message: str) -> None:
    tensors, _ = a_gptq_layer()
    del tensors["g_idx"]
    tensors["scales"] = torch.ones(groups, 64)
    tensors["qzeros"] = torch.zeros(groups, 8, dtype=torch.int32)
    with pytest.raises(DamagedModelError) as caught:
        gptq.unpack(tensors, zero_offset=1, group_size=group_size, name=LAYER)
    assert caught.value.message == f"{LAYER}.scales: {message}"
