"""The CPU engine: every format and layout against transformers with known weights, and the engine's own promises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tinymodels
import torch
from helpers import Recorder, collect, request_for

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Request
from exl_cli.errors import DamagedModelError, PromptError, UnsupportedModelError
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling, build

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


@pytest.mark.parametrize("key", ["fable-7m-exl2", "fable-7m-gptq"])
@pytest.mark.parametrize("prompt", [0, 1])
def test_logits_are_what_exllamav2_computes_on_a_gpu(
    key: str, prompt: int, exl2_dir: Path, gptq_dir: Path, golden_path: Path
) -> None:
    engine, _ = load(exl2_dir if key.endswith("exl2") else gptq_dir)
    with np.load(golden_path) as golden:
        ids = golden[f"{key}.{prompt}.ids"].tolist()
        expected = golden[f"{key}.{prompt}.logits"].astype(np.float32)
    logits = engine.logits(ids).numpy()[-len(expected) :]
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) <= 0.003
    assert np.mean(logits.argmax(1) == expected.argmax(1)) >= 0.95


@pytest.mark.parametrize("key", ["fable-7m-exl2", "fable-7m-gptq"])
@pytest.mark.parametrize("prompt", [0, 1])
def test_greedy_text_is_exllamav2s_up_to_a_near_tie(
    key: str, prompt: int, exl2_dir: Path, gptq_dir: Path, golden_path: Path
) -> None:
    engine, _ = load(exl2_dir if key.endswith("exl2") else gptq_dir)
    with np.load(golden_path) as golden:
        ids, expected = golden[f"{key}.{prompt}.ids"].tolist(), golden[f"{key}.{prompt}.greedy"].tolist()
    tokens = [token for chunk in engine.stream(request_for(ids, "greedy", 64)) for token in chunk.token_ids]
    parted = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)
    if parted is not None:
        logits = engine.logits([*ids, *tokens[:parted]])[-1]
        gap = logits.max() - logits[expected[parted]]
        assert gap < 0.02, f"parts at {parted} where the logits differ by {gap}"


@pytest.fixture(scope="module")
def fable() -> Iterator[tuple[EngineThread, Tokenizer]]:
    engine, tokenizer = load(None)
    yield engine, tokenizer
    engine.close()
    engine.close()


Start = Callable[..., Request]


@pytest.fixture
def start(fable: tuple[EngineThread, Tokenizer]) -> Start:
    _, tokenizer = fable

    def make(
        text: str = "Once upon a time",
        tokens: int = 40,
        sampling: Sampling | None = None,
        seed: int = 7,
        **more: object,
    ) -> Request:
        ids = tokenizer.encode(text, add_special_tokens=True)
        return Request(ids, sampling or Sampling(), tokens, seed, **more)  # type: ignore[arg-type]

    return make


def test_same_seed_same_text_other_seed_other_text(fable: tuple[EngineThread, Tokenizer], start: Start) -> None:
    engine, _ = fable
    first, again, other = (collect(engine.stream(start(seed=seed)))[0] for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_greedy_ignores_the_seed(fable: tuple[EngineThread, Tokenizer], start: Start) -> None:
    engine, _ = fable
    greedy = build({}, "greedy")
    assert (
        collect(engine.stream(start(sampling=greedy, seed=1)))[0]
        == collect(engine.stream(start(sampling=greedy, seed=2)))[0]
    )


def test_the_token_limit_holds_and_is_said(fable: tuple[EngineThread, Tokenizer], start: Start) -> None:
    engine, tokenizer = fable
    text, ids, summary = collect(engine.stream(start(tokens=5)))
    assert (len(ids), summary.new_tokens, summary.finish_reason) == (5, 5, "length")
    assert text == tokenizer.decode([*start().ids, *ids])[len("Once upon a time") :]
    assert summary.prompt_tokens == len(start().ids)
    assert 0 < summary.first_token_seconds <= summary.prompt_seconds + summary.generation_seconds


def test_the_context_is_a_limit_too(fable: tuple[EngineThread, Tokenizer]) -> None:
    engine, _ = fable
    ids = [300] * (engine.context_length - 3)
    _, tokens, summary = collect(engine.stream(request_for(ids, "greedy", 100)))
    assert (len(tokens), summary.finish_reason) == (3, "length")


@pytest.mark.parametrize("length", [1024, 5000])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(
    fable: tuple[EngineThread, Tokenizer], length: int
) -> None:
    engine, _ = fable
    with pytest.raises(PromptError, match=rf"{length:,} tokens.*1,024"):
        next(iter(engine.stream(request_for([300] * length, "greedy", 1))))


def test_a_stop_string_ends_the_text_before_it(fable: tuple[EngineThread, Tokenizer], start: Start) -> None:
    engine, _ = fable
    whole, _, _ = collect(engine.stream(start(tokens=60)))
    stop = whole[40:47]
    text, _, summary = collect(engine.stream(start(tokens=60, stop_strings=(stop,))))
    assert text == whole[: whole.index(stop)]
    assert summary.finish_reason == "stop"


def test_a_stop_id_ends_the_text_and_is_counted(fable: tuple[EngineThread, Tokenizer], start: Start) -> None:
    engine, _ = fable
    _, ids, _ = collect(engine.stream(start(tokens=30)))
    stop = next(token for token in ids[5:] if ids.index(token) >= 5)
    _, stopped, summary = collect(engine.stream(start(tokens=30, stop_ids=frozenset({stop}))))
    assert stopped == ids[: ids.index(stop) + 1]
    assert (summary.finish_reason, summary.new_tokens) == ("stop", len(stopped))


def test_cancelling_keeps_what_came(fable: tuple[EngineThread, Tokenizer], start: Start) -> None:
    engine, _ = fable
    request = start(tokens=500)
    text, summary = "", None
    stream = engine.stream(request)
    for chunk in stream:
        text += chunk.text
        if len(text) > 20:
            stream.cancel()
        summary = chunk.summary
    assert summary is not None
    assert summary.finish_reason == "cancelled"
    assert 20 < len(text) < 200


def test_cancelling_in_the_prompt_gives_no_token(fable: tuple[EngineThread, Tokenizer]) -> None:
    engine, _ = fable
    request = request_for([300] * 1000, "greedy", 10)
    stream = engine.stream(request)
    stream.cancel()
    _, ids, summary = collect(stream)
    assert (ids, summary.finish_reason, summary.first_token_seconds) == ([], "cancelled", 0.0)


def test_closing_early_leaves_the_engine_ready(fable: tuple[EngineThread, Tokenizer], start: Start) -> None:
    engine, _ = fable
    stream = engine.stream(start(tokens=100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert collect(engine.stream(start(tokens=3)))[2].new_tokens == 3


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
        with pytest.raises(PromptError, match=r"'<big>' \(id 4,096\), the model knows ids below 4,096"):
            attempt()


def test_prompts_without_the_stray_token_go_on_working(
    with_a_stray_token: tuple[EngineThread, Tokenizer], gptq_dir: Path
) -> None:
    request = request_for(IDS, "greedy", 12)
    assert collect(with_a_stray_token[0].stream(request))[1] == collect(load(gptq_dir)[0].stream(request))[1]


@pytest.mark.parametrize(
    ("architecture", "kind", "said"),
    [
        ("LlavaForConditionalGeneration", "llava", "reads images as well"),
        ("Mistral3ForConditionalGeneration", "mistral3", "reads images as well"),
        ("Qwen2VLForConditionalGeneration", "qwen2_vl", "reads images as well"),
        ("T5ForConditionalGeneration", "t5", "no model that continues a text"),
        ("OpenAIGPTLMHeadModel", "openai-gpt", "takes no KV cache"),
    ],
)
def test_a_model_of_another_kind_is_called_so(tmp_path: Path, architecture: str, kind: str, said: str) -> None:
    variant = tinymodels.Variant("float", config={"architectures": [architecture], "model_type": kind})
    tinymodels.write(tmp_path / "model", variant)
    with pytest.raises(UnsupportedModelError, match=f"{architecture} .*{said}") as caught:
        load(tmp_path / "model")
    assert "update transformers" not in str(caught.value)
