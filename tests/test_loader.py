"""Inspecting models without loading them; choice of engine and context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinymodels
import torch
from helpers import Recorder

from exl_cli import loader
from exl_cli.engines.exllamav2.support import why_not
from exl_cli.errors import DamagedModelError, UnsupportedModelError, UsageError
from exl_cli.models.info import ModelInfo, inspect
from exl_cli.models.load_options import LoadOptions, parse_gpu_split
from exl_cli.models.tokenizer import Tokenizer


def make(folder: Path, variant: tinymodels.Variant) -> ModelInfo:
    tinymodels.write(folder / "model", variant)
    return inspect(folder / "model")


def test_the_built_in_model() -> None:
    info = loader.resolve(None)
    assert (info.name, info.format, info.format_name) == ("fable-7m", "exl2", "EXL2 5.0 bpw")
    assert info.parameters == 7_344_384
    assert (info.context_length, info.head_bits, info.has_chat_template) == (1024, 6, True)
    assert 5.0 < info.bits_per_weight < 5.5


@pytest.mark.parametrize("name", tinymodels.VARIANTS)
def test_parameters_are_counted_in_every_format(name: str, tmp_path: Path) -> None:
    variant = tinymodels.VARIANTS[name]
    state = tinymodels.write(tmp_path / "model", variant)
    info = inspect(tmp_path / "model")
    assert info.format == variant.format
    assert info.parameters == sum(tensor.numel() for tensor in state.values())
    assert info.size_bytes == sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("variant", "bits", "name"),
    [
        (tinymodels.Variant("float"), 16.0, "float16"),
        (tinymodels.Variant("float", dtype=torch.bfloat16), 16.0, "float16"),
        # 4 bits, and for each group of 128 a float16 scale and a 4-bit zero point, and 32 bits of g_idx a row.
        (tinymodels.Variant("gptq"), 4 + 20 / 128, "GPTQ 4-bit g128"),
        (tinymodels.Variant("gptq", group_size=32, act_order=True), 4 + 20 / 32, "GPTQ 4-bit g32 act-order"),
        (tinymodels.Variant("gptq", group_size=-1, store_g_idx=False), 4.0, "GPTQ 4-bit"),
        (tinymodels.Variant("exl2", bits=(5,)), 5 + 4 / 128, "EXL2 5.0 bpw"),
    ],
)
def test_bits_per_weight_include_scales(variant: tinymodels.Variant, bits: float, name: str, tmp_path: Path) -> None:
    info = make(tmp_path, variant)
    assert info.bits_per_weight == pytest.approx(bits, abs=0.2)
    assert info.bits_per_weight >= bits
    assert info.format_name == name


def test_old_gptq_reads_quantize_config_json(tmp_path: Path) -> None:
    info = make(tmp_path, tinymodels.Variant("gptq", act_order=True, group_size=64))
    config = json.loads((info.path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (info.path / "config.json").write_text(json.dumps(config))
    (info.path / "quantize_config.json").write_text(
        json.dumps({k: quantization[k] for k in ("bits", "group_size", "desc_act")})
    )
    again = inspect(info.path)
    assert (again.format, again.group_size, again.desc_act) == ("gptq", 64, True)
    assert again.config["quantization_config"]["quant_method"] == "gptq"


def test_gptq_at_other_bits_is_refused_by_its_shapes_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    info = make(tmp_path, tinymodels.Variant("gptq"))
    file = info.path / "model.safetensors"
    tensors = {k: v.repeat(1, 2) if k.endswith("qzeros") else v for k, v in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(UnsupportedModelError, match="8-bit"):
        inspect(info.path)


def test_awq_without_a_config_is_detected_by_its_shapes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    tensors = {"l.qweight": torch.zeros(256, 32, dtype=torch.int32), "l.scales": torch.zeros(2, 256).half()}
    save_file({**tensors, "l.qzeros": torch.zeros(2, 32, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="AWQ"):
        inspect(tmp_path)


def test_a_second_copy_of_the_weights_is_not_counted(tmp_path: Path) -> None:
    info = make(tmp_path, tinymodels.Variant("float"))
    data = (info.path / "model.safetensors").read_bytes()
    (info.path / "consolidated.safetensors").write_bytes(data)
    assert inspect(info.path).size_bytes == len(data)
    assert {tensor.file.name for tensor in inspect(info.path).tensors.values()} == {"model.safetensors"}


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    info = make(tmp_path, tinymodels.Variant("float"))
    index = {"weight_map": {"x": "../../etc/weights.safetensors"}}
    (info.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedModelError, match="outside"):
        inspect(info.path)


@pytest.mark.parametrize(
    ("asked", "needed", "expected"),
    [
        (None, None, 4096),
        (None, 100, 4096),
        (None, 6000, 6000),
        (None, 99_999, 32_768),
        (500, 100, 500),
        (500, 9000, 500),
    ],
)
def test_how_much_context_is_allocated(tmp_path: Path, asked: int | None, needed: int | None, expected: int) -> None:
    info = make(tmp_path, tinymodels.Variant("gptq", config={"max_position_embeddings": 32_768}))
    assert loader.context_to_allocate(info, LoadOptions(max_seq_len=asked), needed) == expected


def test_more_context_than_a_model_has_positions_is_refused(tmp_path: Path) -> None:
    learned = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 1024}
    info = make(tmp_path, tinymodels.Variant("float", config={**learned, "max_position_embeddings": 1024}))
    with pytest.raises(UsageError, match="1,024"):
        loader.context_to_allocate(info, LoadOptions(max_seq_len=2000))


def test_more_context_than_a_model_was_made_for_is_given_with_a_note() -> None:
    info, notes = loader.resolve(None), Recorder()
    engine = loader.load(info, Tokenizer(info.path), LoadOptions(engine="cpu", max_seq_len=2000), notes)
    assert engine.context_length == 2000
    assert any("1,024 tokens" in note for note in notes.notes)
    engine.close()


@pytest.mark.parametrize(
    ("text", "expected"), [("auto", None), ("AUTO", None), ("20,24", (20.0, 24.0)), ("7.5", (7.5,))]
)
def test_gpu_split(text: str, expected: tuple[float, ...] | None) -> None:
    assert parse_gpu_split(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "nan", "inf", "0", "1;2"])
def test_gpu_splits_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="gpu_split"):
        parse_gpu_split(text)


def test_what_exllamav2_cannot_run(tmp_path: Path) -> None:
    assert why_not(loader.resolve(None)) == ""
    assert why_not(make(tmp_path / "a", tinymodels.Variant("gptq", group_size=64))) == ""
    novel = make(tmp_path / "b", tinymodels.Variant("float", config={"architectures": ["NovelForCausalLM"]}))
    assert "NovelForCausalLM" in why_not(novel)
    assert "32 and more" in why_not(make(tmp_path / "d", tinymodels.Variant("gptq", group_size=16)))
    assert "powers of two" in why_not(
        make(tmp_path / "c", tinymodels.Variant("gptq", config={"hidden_size": 256}, group_size=96))
    )
