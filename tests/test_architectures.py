"""The CPU engine on tiny models of every architecture and config variant, against transformers on the same weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import architectures
import numpy as np
import pytest
import torch
from helpers import Recorder, collect, request_for

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.errors import UnsupportedModelError
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

# Each kind in one of the formats, each format with a third of them; and all that are stored otherwise in EXL2.
FORMATS = itertools.cycle(architectures.FORMATS)
APART = ("phi3", "glm4", "dbrx", "gpt2", "gpt-bigcode", "gpt-bigcode-multi-head", "cohere", "gemma3")
# TODO
CASES = [(kind, fmt) for kind, fmt in zip(architectures.KINDS, FORMATS, strict=False) if kind != "llama-dynamic"]
CASES += [(kind, fmt) for kind in APART for fmt in ("gptq", "exl2") if (kind, fmt) not in CASES]
# In transformers neither as a class of its own nor under another name, or made for images as well.
NOT_ON_THE_CPU = (
    "yi",
    "orion",
    "minicpm",
    "index",
    "internlm2",
    "qwen2-vl",
    "qwen2.5-vl",
    "llava",
    "pixtral",
    "mistral3",
)


def load(folder: Path) -> EngineThread:
    info = loader.resolve(str(folder))
    return EngineThread(loader.load(info, Tokenizer(info.path), LoadOptions(engine="cpu"), Recorder()))


@pytest.mark.parametrize(("kind", "fmt"), CASES)
def test_prompt_and_generated_text_are_what_transformers_computes(kind: str, fmt: str, tmp_path: Path) -> None:
    folder = architectures.make(kind, tmp_path / "model", fmt)
    if kind.removesuffix("-older") in NOT_ON_THE_CPU:
        with pytest.raises(UnsupportedModelError, match=architectures.architecture(kind)):
            load(folder)
        return
    engine = load(folder)
    short, long = architectures.prompts(kind, fmt)
    expected = architectures.reference(kind, fmt, long)
    error = torch.linalg.vector_norm(engine.logits(long) - expected) / torch.linalg.vector_norm(expected)
    assert error <= 1e-4
    # Past the window that the prompt leaves unfilled, each token from the cache.
    for prompt, count in ((short, architectures.WINDOW - len(short) + 4), (long, 4)):
        tokens = collect(engine.stream(request_for(prompt, "greedy", count)))[1]
        logits = architectures.step_reference(kind, fmt, [*prompt, *tokens[:-1]], len(prompt) - 1)
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((logits.max(1).values - chosen).max()) <= 1e-4 * float(logits.std())


@pytest.mark.parametrize("kind", ["mistral", "gemma3-text", "phi3-longrope", "llama-dynamic"])
def test_chunks_reuse_and_lengths_that_change_the_embedding_leave_no_trace(kind: str, tmp_path: Path) -> None:
    engine = load(architectures.make(kind, tmp_path / "model", "float16"))
    ids = [int(i) for i in np.random.default_rng(7).integers(len(architectures.SPECIAL), architectures.VOCAB, 220)]

    if engine.context_length < 210:
        pytest.skip("its context is not extended yet")

    def go(prompt: list[int], count: int) -> list[int]:
        tokens = collect(engine.stream(request_for(prompt, "greedy", count)))[1]
        logits = architectures.step_reference(kind, "float16", [*prompt, *tokens[:-1]], len(prompt) - 1)
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((logits.max(1).values - chosen).max()) <= 1e-4 * float(logits.std())
        return [*prompt, *tokens]

    go(ids[:200], 4)  # more than a chunk of the prompt
    text = go(ids[:56], 16)  # through the window and the original length
    go([*text, *ids[:9]], 4)  # continued
    go([*text[:40], *ids[100:110]], 4)  # cut, and shorter than the original length again
