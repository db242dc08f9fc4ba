"""config.json files that are damaged, incomplete or contradict the weights."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinymodels
import torch
from helpers import Recorder
from safetensors.torch import save_file

from exl_cli import loader
from exl_cli.errors import DamagedModelError, ModelNotFoundError, UsageError
from exl_cli.models import memory
from exl_cli.models.chat_template import load_chat_template
from exl_cli.models.config import context_length_of
from exl_cli.models.info import ModelInfo, inspect
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    tinymodels.write(folder, tinymodels.Variant("float"))
    return folder


def altered(whole: Path, folder: Path, **config: Any) -> Path:
    """The model with other values in its config.json."""
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**json.loads((whole / "config.json").read_text()), **config}))
    return folder


def load(folder: Path) -> None:
    info = loader.resolve(str(folder))
    loader.load(info, Tokenizer(info.path), LoadOptions(engine="cpu"), Recorder()).close()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_act", "bogus", "bogus"),
        ("hidden_act", None, "hidden_act"),
        ("hidden_size", 257, "257"),
        ("hidden_size", "256", "hidden_size"),
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", -1, "hidden_size"),
        ("num_attention_heads", 0, "num_attention_heads"),
        ("num_attention_heads", 3, "attention heads"),
        ("num_attention_heads", None, "num_attention_heads"),
        ("num_key_value_heads", 0, "num_key_value_heads"),
        ("num_key_value_heads", 1, r"k_proj.weight is \[128, 256\], but should be \[64, 256\]"),
        ("num_hidden_layers", "x", "num_hidden_layers"),
        ("num_hidden_layers", True, "num_hidden_layers"),
        ("vocab_size", "4096", "vocab_size"),
        ("vocab_size", 10**7, r"weight is \[4096, 256\], but should be \[10000000, 256\]"),
        ("intermediate_size", 10**12, r"weight is \[256, 512\], but should be \[256, 1000000000000\]"),
        ("vocab_size", 100, r"embed_tokens.weight is \[4096, 256\], but should be \[100, 256\]"),
        ("max_position_embeddings", None, "max_position_embeddings"),
        ("max_position_embeddings", 0, "max_position_embeddings"),
        ("eos_token_id", 2.0, "eos_token_id"),
        ("bos_token_id", [], "bos_token_id"),
        ("head_dim", 0, "head_dim"),
        ("head_dim", 7, "head_dim"),
        ("rope_scaling", {"rope_type": "bogus"}, "bogus"),
        ("rope_scaling", {"rope_type": "linear"}, "factor"),
        ("text_config", 5, "text_config"),
        ("attention_bias", "x", "attention_bias"),
        ("sliding_window", "x", "sliding_window"),
        ("architectures", [5], "does not name an architecture"),
    ],
)
def test_values_that_describe_no_model_are_named(
    whole: Path, tmp_path: Path, field: str, value: Any, said: str
) -> None:
    with pytest.raises(DamagedModelError, match=said) as caught:
        load(altered(whole, tmp_path / "model", **{field: value}))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "config", [{"text_config": None}, {"text_config": {}, "return_dict": False, "torch_dtype": "x"}]
)
def test_values_that_do_not_matter_do_no_harm(whole: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    load(altered(whole, tmp_path / "model", **config))


@pytest.mark.parametrize("name", ["float16", "gptq", "exl2-5-and-4"])
@pytest.mark.parametrize("count", [1, 3, 10**9])
def test_a_count_of_layers_that_the_weights_deny_is_refused(tmp_path: Path, name: str, count: int) -> None:
    tinymodels.write(tmp_path / "model", tinymodels.VARIANTS[name])
    with pytest.raises(DamagedModelError, match=f"the weights have 2 layers, but config.json says {count:,}"):
        inspect(altered(tmp_path / "model", tmp_path / "other", num_hidden_layers=count))


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "mtp_num_hidden_layers"])
def test_layers_that_predict_further_tokens_may_follow(whole: Path, tmp_path: Path, key: str) -> None:
    for count in (1, 2):  # stored, or left out
        folder = altered(whole, tmp_path / str(count), num_hidden_layers=count, **{key: 1})
        assert inspect(folder).format == "float"


def test_layers_of_a_vision_tower_are_not_counted(whole: Path, tmp_path: Path) -> None:
    folder = altered(whole, tmp_path / "model")
    tensors = {f"vision_tower.encoder.layers.{i}.weight": torch.zeros(2, 2) for i in range(30)}
    save_file(tensors, folder / "vision.safetensors")
    assert inspect(folder).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "kind", "prefix", "layers"),
    [
        ("GPT2LMHeadModel", "gpt2", "h.", "n_layer"),
        ("GPTBigCodeForCausalLM", "gpt_bigcode", "transformer.h.", "n_layer"),
        ("DbrxForCausalLM", "dbrx", "transformer.blocks.", "n_layers"),
    ],
)
def test_bits_are_those_of_the_layers_whatever_these_are_called(
    tmp_path: Path, architecture: str, kind: str, prefix: str, layers: str
) -> None:
    config = {"architectures": [architecture], "model_type": kind, layers: 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({f"{prefix}{i}.w": torch.zeros(8, 8).half() for i in range(2)}, tmp_path / "model.safetensors")
    info = inspect(tmp_path)
    assert (info.format_name, info.bits_per_weight) == ("float16", 16.0)
    (tmp_path / "config.json").write_text(json.dumps({**config, layers: 1}))
    with pytest.raises(DamagedModelError, match="2 layers"):
        inspect(tmp_path)


def known(config: dict[str, Any]) -> ModelInfo:
    context = context_length_of(config)
    return ModelInfo("m", Path("m"), "exl2", "A", 0, 4.0, context, 4_000_000_000, {}, config=config)


KINDS = ("gemma", "gemma2", "gemma3", "gemma3_text", "llama", "mistral", "cohere", "cohere2", "starcoder2", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_config_keys_have_transformers_defaults(kind: str) -> None:
    from transformers import AutoConfig

    oracle = AutoConfig.for_model(kind).get_text_config()
    info = known({"model_type": kind})
    assert bool(info.text_config("tie_word_embeddings")) == oracle.tie_word_embeddings
    if info.text_config("hidden_size") is None:
        return
    shape = memory.shape_of(info)
    assert shape is not None
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.inner, shape.vocabulary) == (
        oracle.num_hidden_layers,
        oracle.hidden_size,
        oracle.num_attention_heads,
        oracle.num_key_value_heads,
        oracle.head_dim,
        oracle.intermediate_size,
        oracle.vocab_size,
    )
    assert info.context_length == oracle.max_position_embeddings


def test_a_nearly_empty_gemma_3_config_has_a_context_and_an_estimate() -> None:
    # config.json of google/gemma-3-12b-it, but for its vision part.
    text = {"hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text", "num_attention_heads": 16}
    text |= {"num_hidden_layers": 48, "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    info = known({"model_type": "gemma3", "text_config": {**text, "sliding_window": 1024}})
    shape = memory.shape_of(info)
    assert shape is not None
    assert (info.context_length, shape.layers, shape.head_dim, shape.vocabulary) == (131_072, 48, 256, 262_208)
    assert memory.estimate(info, 4096) is not None


def test_a_gemma_that_does_not_say_so_has_a_tied_head_before_it_is_downloaded() -> None:
    # exllamav2 makes a matrix of its own of it, which the files do not hold.
    tied, untied = (
        memory.estimate(replace(known({"model_type": "gemma2", **said}), format="gptq"), 4096)
        for said in ({}, {"tie_word_embeddings": False})
    )
    assert tied is not None
    assert untied is not None
    assert tied.weights - untied.weights == 2 * 256_000 * 2304


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product(("config.json", "tokenizer.json"), ("deep", "pipe", "device", "folder")),
        *(("generation_config.json", "pipe"), ("tokenizer_config.json", "device")),
    ],
)
def test_a_json_file_that_is_none_is_refused_by_name(whole: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = altered(whole, tmp_path / "model")
    (folder / name).unlink()
    if kind == "deep":
        (folder / name).write_bytes(DEEP)
    elif kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(DamagedModelError, match=name.replace(".", r"\.")):
        load(folder)


def test_byte_order_marks_of_windows_editors_are_read_over(whole: Path, tmp_path: Path) -> None:
    folder = altered(whole, tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(b"\xef\xbb\xbf" + content)
    load(folder)
    assert load_chat_template(folder) is not None


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_called_empty(name: str) -> None:
    with pytest.raises(UsageError, match="model name is empty"):
        loader.resolve(name)


def test_a_folder_that_is_no_model_is_not_called_damaged(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a model folder;"):
        loader.resolve(str(tmp_path))
    for name in ("b", "a"):
        altered(whole, tmp_path / name)
    with pytest.raises(ModelNotFoundError, match="is not a model folder, but contains model folders") as caught:
        loader.resolve(str(tmp_path))
    assert caught.value.hint == f"give one of them: {tmp_path / 'a'}, {tmp_path / 'b'}"
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(DamagedModelError, match=r"config\.json is missing"):
        loader.resolve(str(tmp_path / "a"))
