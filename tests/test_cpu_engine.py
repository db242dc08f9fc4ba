"""The CPU engine: every format and layout against transformers with known weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinymodels
import torch
from helpers import Recorder, collect, request_for

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.errors import DamagedModelError, PromptError, UnsupportedModelError
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

IDS = [1, 40, 300, 4000, 17, 250, 999, 31, 2048, 5, 77, 640]


def load(path: Path | None) -> tuple[EngineThread, Tokenizer]:
    info = loader.resolve(None if path is None else str(path))
    tokenizer = Tokenizer(info.path)
    return EngineThread(loader.load(info, tokenizer, LoadOptions(engine="cpu"), Recorder())), tokenizer


@pytest.mark.parametrize("name", tinymodels.VARIANTS)
def test_logits_are_those_of_transformers_with_the_same_weights(name: str, tmp_path: Path) -> None:
    variant = tinymodels.VARIANTS[name]
    state = tinymodels.write(tmp_path / "model", variant, seed=3)
    engine, _ = load(tmp_path / "model")
    expected = tinymodels.reference_logits(state, variant, IDS)
    torch.testing.assert_close(engine.logits(IDS), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module", params=["fable-7m-exl2", "fable-7m-gptq"])
def fable(request: pytest.FixtureRequest, exl2_dir: Path, gptq_dir: Path) -> Iterator[tuple[str, EngineThread]]:
    engine, _ = load({"fable-7m-exl2": exl2_dir, "fable-7m-gptq": gptq_dir}[request.param])
    yield request.param, engine
    engine.close()
    engine.close()


@pytest.mark.parametrize("prompt", [0, 1])
def test_logits_and_greedy_text_are_exllamav2s_on_a_gpu(
    fable: tuple[str, EngineThread], prompt: int, golden_path: Path
) -> None:
    key, engine = fable
    with np.load(golden_path) as golden:
        ids, greedy = (golden[f"{key}.{prompt}.{name}"].tolist() for name in ("ids", "greedy"))
        expected = golden[f"{key}.{prompt}.logits"].astype(np.float32)
    logits = engine.logits(ids).numpy()[-len(expected) :]
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) <= 0.003
    assert np.mean(logits.argmax(1) == expected.argmax(1)) >= 0.95
    _, tokens, _ = collect(engine.stream(request_for(ids, "greedy", 32)))
    parted = next((i for i, (a, b) in enumerate(zip(tokens, greedy[:32], strict=True)) if a != b), None)
    if parted is not None:  # at a near tie
        last = engine.logits([*ids, *tokens[:parted]])[-1]
        assert last.max() - last[greedy[parted]] < 0.02


def test_a_prompt_that_leaves_no_room_is_refused_and_a_limit_is_the_context_too(
    fable: tuple[str, EngineThread],
) -> None:
    _, engine = fable
    with pytest.raises(PromptError, match=r"1,024 tokens.*1,024"):
        engine.stream(request_for([300] * 1024, "greedy", 1))
    _, tokens, summary = collect(engine.stream(request_for([300] * 1021, "greedy", 100)))
    assert (len(tokens), summary.finish_reason) == (3, "length")
    assert 0 < summary.first_token_seconds <= summary.prompt_seconds + summary.generation_seconds


def test_cancelling_in_the_prompt_gives_no_token(fable: tuple[str, EngineThread]) -> None:
    stream = fable[1].stream(request_for([300, *range(1000)], "greedy", 10))
    stream.cancel()
    _, ids, summary = collect(stream)
    assert (ids, summary.finish_reason, summary.first_token_seconds) == ([], "cancelled", 0.0)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tinymodels.write(tmp_path / "model", tinymodels.VARIANTS["gptq"])
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, file)
    with pytest.raises(DamagedModelError, match=r"model\.layers\.1\.input_layernorm\.weight"):
        load(tmp_path / "model")


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    variant = tinymodels.Variant("float", config={"architectures": ["NovelForCausalLM"], "model_type": "novel"})
    tinymodels.write(tmp_path / "model", variant)
    with pytest.raises(UnsupportedModelError, match="NovelForCausalLM"):
        load(tmp_path / "model")


def test_what_transformers_computes_without_sdpa_runs_too(tmp_path: Path) -> None:
    import transformers

    oracle = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=4096,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            # As large as to matter, unlike the logits of a model that was never trained.
            initializer_range=0.3,
            sliding_window=8,
            max_position_embeddings=256,
            attn_implementation="eager",
        )
    ).eval()
    tinymodels.write(tmp_path / "model", tinymodels.Variant("float"))
    oracle.save_pretrained(tmp_path / "model")
    engine, _ = load(tmp_path / "model")
    with torch.inference_mode():
        expected = oracle(torch.tensor([IDS])).logits[0]
    assert engine.facts["attention"] == "eager"
    torch.testing.assert_close(engine.logits(IDS), expected, rtol=1e-3, atol=1e-3)
    _, tokens, _ = collect(engine.stream(request_for(IDS, "greedy", 1)))
    assert tokens == [int(expected[-1].argmax())]


@pytest.fixture(scope="module")
def with_a_stray_token(gptq_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineThread, Tokenizer]:
    """fable-7m with a tokenizer of one token more than it has embeddings."""
    folder = tmp_path_factory.mktemp("stray") / "model"
    shutil.copytree(gptq_dir, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 4096, "content": "<big>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load(folder)


def test_a_token_that_the_model_does_not_know_is_refused_by_name(
    with_a_stray_token: tuple[EngineThread, Tokenizer],
) -> None:
    engine, tokenizer = with_a_stray_token
    ids = tokenizer.encode("hello <big>", add_special_tokens=True)
    assert 4096 in ids
    for attempt in (lambda: engine.stream(request_for(ids, "greedy", 1)), lambda: engine.logits(ids)):
        with pytest.raises(PromptError, match=r"'<big>' \(id 4,096\), but the model only has ids below 4,096"):
            attempt()


def test_prompts_without_the_stray_token_go_on_working(
    with_a_stray_token: tuple[EngineThread, Tokenizer], gptq_dir: Path
) -> None:
    request = request_for(IDS, "greedy", 12)
    assert collect(with_a_stray_token[0].stream(request))[1] == collect(load(gptq_dir)[0].stream(request))[1]


@pytest.mark.parametrize(
    ("architecture", "kind", "said"),
    [
        ("AyaVisionForConditionalGeneration", "aya_vision", "is multimodal"),
        ("LlavaNextForConditionalGeneration", "llava_next", "is multimodal"),
        ("T5ForConditionalGeneration", "t5", "is not a text-generation model"),
        ("OpenAIGPTLMHeadModel", "openai-gpt", "has no KV cache"),
    ],
)
def test_a_model_of_another_kind_is_called_so(tmp_path: Path, architecture: str, kind: str, said: str) -> None:
    variant = tinymodels.Variant("float", config={"architectures": [architecture], "model_type": kind})
    tinymodels.write(tmp_path / "model", variant)
    with pytest.raises(UnsupportedModelError, match=f"{architecture} .*{said}") as caught:
        load(tmp_path / "model")
    assert "update transformers" not in str(caught.value)
