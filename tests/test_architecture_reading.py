"""Reading config.json for the GPU engine: RoPE as in transformers, unknown keys and tensors refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import architectures
import pytest
import tinymodels
import torch

from exl_cli.engines.exllamav2.support import why_not
from exl_cli.models import architecture
from exl_cli.models.info import ModelInfo, inspect
from exl_cli.models.rope import FULL, ropes

SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn by length": {"factor": None, "original_max_position_embeddings": 128},
    "yarn with its own attention": {"factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.7},
    "yarn with scales": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn with betas": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4, "beta_slow": 0.5},
    "yarn not truncated": {"factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0 + i / 7 for i in range(16)], "long_factor": [2.0 + i for i in range(16)],
        "original_max_position_embeddings": 64,
    },
    "longrope with a factor": {
        "short_factor": [1.0] * 16, "long_factor": [3.0] * 16, "original_max_position_embeddings": 64, "factor": 3.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("length", [64, 65, 512, 513, 1700])
def test_frequencies_are_those_of_transformers(name: str, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = name.partition(" ")[0]
    parameters = {"rope_type": kind, "rope_theta": 5000.0, **SCALED[name]}
    config = LlamaConfig(head_dim=32, max_position_embeddings=512, rope_parameters=dict(parameters))
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    rope = ropes({"rope_parameters": parameters}, 32, 512)[FULL]
    torch.testing.assert_close(torch.tensor(rope.frequencies(length)), expected)
    assert rope.attention_factor == pytest.approx(factor)


def folder_with(tmp_path: Path, **config: Any) -> ModelInfo:
    tinymodels.write(tmp_path / "model", tinymodels.Variant("float"))
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return inspect(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 30.0),
        ("layer_types", ["sliding_attention"] * 2),
        ("partial_rotary_factor", 0.5),
        ("no_rope_layers", [0, 1]),
        ("residual_multiplier", 0.2),
        ("parallel_residual", True),
        ("use_qk_norm", True),
        ("new_attention_temperature", 3.5),
    ],
)
def test_an_unknown_key_that_changes_the_computation_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    assert key in why_not(folder_with(tmp_path, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_dropout", 0.1),
        ("residual_multiplier", 1.0),
        ("use_qk_norm", False),
        ("unsloth_fixed", True),
        ("quantization_notes", "by hand"),
        ("bos_token_id", [1, 2]),
        ("pretraining_tp", 2),
        ("max_window_layers", 28),
        ("layer_types", ["full_attention"] * 2),
    ],
)
def test_a_harmless_key_is_accepted(tmp_path: Path, key: str, value: Any) -> None:
    assert why_not(folder_with(tmp_path, **{key: value})) == ""


def test_unused_weights_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = architectures.make("qwen3", tmp_path / "model", "float16")
    assert why_not(inspect(folder)) == ""
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.mlp.router.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    assert "model.layers.0.mlp.router.weight" in why_not(inspect(folder))


def test_a_quantized_router_is_left_to_the_cpu(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = architectures.make("qwen3-moe", tmp_path / "model", "gptq")
    assert why_not(inspect(folder)) == ""
    weights, router = load_file(folder / "model.safetensors"), "model.layers.0.mlp.gate"
    del weights[f"{router}.weight"]
    # In the shape of the router, an expert's first columns.
    expert = "model.layers.0.mlp.experts.0.gate_proj"
    for part, columns in (("qweight", 8), ("qzeros", 1), ("scales", 8)):
        weights[f"{router}.{part}"] = weights[f"{expert}.{part}"][:, :columns].contiguous()
    save_file(weights, folder / "model.safetensors")
    assert f"{router}.qweight" in why_not(inspect(folder))


def test_a_dynamic_rope_changes_in_small_steps_from_where_it_begins_to_extend(tmp_path: Path) -> None:
    info = folder_with(tmp_path, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    longest = info.context_length
    assert why_not(info, 4 * longest) == ""
    read = architecture.read(info)
    assert read.rope_switches(longest) == []
    switches = read.rope_switches(4 * longest)
    assert switches[0] == longest
    assert all(a < b <= a + a / 16 + 1 for a, b in pairwise([*switches, 4 * longest]))


@pytest.mark.parametrize(
    ("scaling", "extended"),
    [
        (None, 256),
        ({"type": "linear", "factor": 4.0}, 1024),
        ({"type": "dynamic", "factor": 2.0}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "longrope", "factor": 8.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": "4"}, 256),
        ({"type": "yarn", "factor": 0.5}, 256),
    ],
)
def test_how_far_a_scaled_context_reaches(tmp_path: Path, scaling: Any, extended: int) -> None:
    # The published recipe of Qwen 2.5 keeps the original length in max_position_embeddings.
    info = folder_with(tmp_path, max_position_embeddings=256, rope_parameters=None, rope_scaling=scaling)
    assert (info.context_length, info.extended_length) == (256, extended)


def test_every_layer_has_the_window_and_the_rotary_embedding_that_transformers_gives_it(tmp_path: Path) -> None:
    for kind in (
        "gemma2",
        "gemma3-text",
        "gemma3-text-older",
        "cohere2",
        "cohere2-older",
        "qwen2-window",
        "qwen3-window",
    ):
        config = architectures.config_of(kind)
        read = architecture.read(inspect(architectures.make(kind, tmp_path / kind, "float16")))
        expected = [config.sliding_window if it == "sliding_attention" else 0 for it in config.layer_types]
        assert list(read.windows) == expected, kind


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llama", {"layer_types": 5}),
        ("qwen3", {"layer_types": [{}, {}]}),
        ("qwen3", {"layer_types": None, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": "x"}),
        ("qwen3-moe", {"mlp_only_layers": 3}),
        ("gemma2", {"query_pre_attn_scalar": 0}),
    ],
)
def test_values_of_a_wrong_type_are_refused_in_one_line(tmp_path: Path, kind: str, values: dict[str, Any]) -> None:
    folder = architectures.make(kind, tmp_path / "model", "float16")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    assert "invalid value" in why_not(inspect(folder))


PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_their_publishers_write_them_are_read(name: str) -> None:
    config = PUBLISHED[name]
    longest = config.get("max_position_embeddings", 2048)
    info = ModelInfo(name, Path("m"), "gptq", config["architectures"][0], 0, 4.0, longest, 0, {}, config=config)
    read = architecture.read(info)
    assert len(read.windows) == len(read.ropes) == read.layers
