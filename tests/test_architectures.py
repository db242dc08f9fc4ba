"""The CPU engine on tiny models of every architecture, against transformers.

Every kind's config.json is read here; the logits of all of them are compared by
`tests/gpu/architecture_table.py --engine cpu`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from helpers import Recorder, collect, request_for

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.cpu.transformers_model import choose_class
from exl_cli.errors import UnsupportedModelError
from exl_cli.models import memory
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

# transformers has no class of them.
NOT_ON_THE_CPU = [kind for kind, it in architectures.KINDS.items() if "architectures" in it.written]
# Stored otherwise in GPTQ, or named and split otherwise by exllamav2's converter.
APART = [("gpt2", "gptq"), ("gpt-bigcode", "exl2"), ("gpt-bigcode-multi-head", "exl2")]
APART += [(kind, "exl2") for kind in ("gpt2", "phi3", "glm4", "dbrx", "gemma3", "pixtral")]
# Windows, embeddings and names that the engine has a part in, besides the first kind of each architecture.
MORE = ["llama-tied", "qwen2-window", "starcoder2-window", "phi3-longrope", "gpt2-prefix"]


def _cases() -> Iterator[tuple[str, str]]:
    yield from APART
    formats = itertools.cycle(architectures.FORMATS)
    seen = {architectures.KINDS[kind].config["model_type"] for kind, _ in APART}
    for kind, it in architectures.KINDS.items():
        if kind not in NOT_ON_THE_CPU and (it.config["model_type"] not in seen or kind in MORE):
            yield kind, next(formats)
            seen.add(it.config["model_type"])


@pytest.fixture(scope="module", autouse=True)
def _transformers() -> None:
    architectures.imported()


def load(info: ModelInfo) -> EngineThread:
    options = LoadOptions(engine="cpu", max_seq_len=architectures.CONTEXT)
    return EngineThread(loader.load(info, Tokenizer(info.path), options, Recorder()))


def continued(engine: EngineThread, kind: str, fmt: str, prompt: Sequence[int], count: int) -> list[int]:
    """The prompt with what the engine generates, once each token is transformers' choice too."""
    tokens = collect(engine.stream(request_for(prompt, "greedy", count)))[1]
    logits = architectures.step_reference(kind, fmt, [*prompt, *tokens[:-1]], len(prompt) - 1)
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((logits.max(1).values - chosen).max()) <= 1e-4 * float(logits.std())
    return [*prompt, *tokens]


def test_both_config_styles_give_the_models_dimensions() -> None:
    for kind in architectures.KINDS:
        if kind not in NOT_ON_THE_CPU:
            raw = architectures.config_json(kind)
            info = ModelInfo(kind, Path(kind), "gptq", architectures.architecture(kind), 1, 4.0, 256, 1, {}, config=raw)
            actual, expected = choose_class(info)[0].to_dict(), architectures.config_of(kind).to_dict()
            assert differences(actual, expected) == [], kind


def differences(actual: Any, expected: Any, key: str = "") -> list[str]:
    """Where the second says anything else than the first."""
    if not isinstance(expected, dict) or not isinstance(actual, dict):
        same = actual == expected or (actual is None and expected is False)
        return [] if same else [f"{key}: {actual!r}, not {expected!r}"]
    parts = expected.keys() - {"transformers_version", "dtype", "architectures", "vision_config"}
    return [text for part in sorted(parts) for text in differences(actual.get(part), expected[part], f"{key}.{part}")]


@pytest.mark.parametrize(("kind", "fmt"), dict.fromkeys(_cases()))
def test_prompt_and_generated_text_are_what_transformers_computes(kind: str, fmt: str, tmp_path: Path) -> None:
    info = loader.resolve(str(architectures.make(kind, tmp_path / "model", fmt)))
    check_dimensions(info, architectures.config_of(kind).get_text_config())
    engine = load(info)
    short, long = architectures.prompts(kind, fmt)
    expected = architectures.reference(kind, fmt, long)
    error = torch.linalg.vector_norm(engine.logits(long) - expected) / torch.linalg.vector_norm(expected)
    assert error <= 1e-4
    # From the cache, token by token: past the window that the first prompt leaves unfilled, and behind a full one.
    continued(engine, kind, fmt, short, architectures.WINDOW - len(short) + 2)
    continued(engine, kind, fmt, long, 2)


def check_dimensions(info: ModelInfo, config: object) -> None:
    """The estimate of memory reads what transformers reads."""

    def read(*names: str) -> int | None:
        parts = (config, *(getattr(config, part, None) for part in ("attn_config", "ffn_config")))
        return next((value for name in names for part in parts if (value := getattr(part, name, None))), None)

    shape, heads, hidden = memory.shape_of(info), read("num_attention_heads"), read("hidden_size")
    assert shape is not None
    assert (shape.layers, shape.hidden, shape.heads) == (read("num_hidden_layers"), hidden, heads)
    assert (shape.vocabulary, shape.head_dim) == (read("vocab_size"), read("head_dim") or hidden // heads)
    inner = read("moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "n_inner")
    assert shape.inner == (inner or 4 * hidden)
    assert shape.kv_heads == (1 if read("multi_query") else read("num_key_value_heads", "kv_n_heads") or heads)


@pytest.mark.parametrize("kind", NOT_ON_THE_CPU)
def test_what_it_does_not_run_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    info = loader.resolve(str(architectures.make(kind, tmp_path / "model")))
    with pytest.raises(UnsupportedModelError, match=architectures.architecture(kind)):
        load(info)


@pytest.mark.parametrize("kind", ["mistral", "gemma3-text", "phi3-longrope", "llama-dynamic"])
def test_chunks_reuse_and_lengths_that_change_the_embedding_leave_no_trace(kind: str, tmp_path: Path) -> None:
    engine = load(loader.resolve(str(architectures.make(kind, tmp_path / "model", "float16"))))
    ids = [int(i) for i in np.random.default_rng(7).integers(len(architectures.SPECIAL), architectures.VOCAB, 220)]
    continued(engine, kind, "float16", ids[:200], 3)  # more than a chunk of the prompt
    text = continued(engine, kind, "float16", ids[:56], 12)  # through the window and the original length
    continued(engine, kind, "float16", [*text, *ids[:9]], 3)
    continued(engine, kind, "float16", [*text[:40], *ids[100:110]], 3)  # cut, and as short as at first
    error = engine.logits(ids[:64]) - architectures.reference(kind, "float16", ids[:64])
    assert float(error.abs().max()) <= 1e-3
