"""Fused forward passes, batching and speculation on a GPU: none changes the text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tinymodels
import torch
from helpers import Recorder, collect, request_for

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

NEAR_TIE = 0.05  # of logits, between two kernels' rounding


def load(path: Path, engine: str = "exllamav2", **options: object) -> EngineThread:
    info = loader.resolve(str(path))
    return EngineThread(loader.load(info, Tokenizer(info.path), LoadOptions(engine=engine, **options), Recorder()))


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> EngineThread:
    return load(request.getfixturevalue("exl2_dir"), "cpu")


def is_greedy(reference: EngineThread, ids: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether each token is the likeliest after those before it, up to a near tie."""
    logits = reference.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logits.max(1).values - chosen).max()) < NEAR_TIE


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [[int(i) for i in rng.integers(100, 4000, rng.integers(5, 300))] for _ in range(count)]


@pytest.mark.parametrize("count", [3, 16, 70])
def test_a_batch_gives_each_request_its_own_text(exl2_dir: Path, reference: EngineThread, count: int) -> None:
    engine = load(exl2_dir, max_seq_len=400, sequences=count)
    asked = prompts(count)
    streams = [engine.stream(request_for(ids, "greedy", 40)) for ids in asked]
    tokens: list[list[int]] = [[] for _ in streams]
    running = list(enumerate(streams))
    while running:
        for index, stream in list(running):
            chunk = next(stream)
            tokens[index] += chunk.token_ids
            if chunk.summary is not None:
                running.remove((index, stream))
    for ids, found in zip(asked, tokens, strict=True):
        assert len(found) == 40
        assert is_greedy(reference, ids, found)


@pytest.mark.parametrize("options", [{}, {"speculate": "ngram"}])
def test_requests_that_outgrow_the_cache_get_their_own_text(
    exl2_dir: Path, reference: EngineThread, options: dict[str, str]
) -> None:
    engine = load(exl2_dir, max_seq_len=1024, **options)
    # Four pages: for four of them as they begin, and for two as they end.
    rng = np.random.default_rng(1)
    asked = [[int(i) for i in rng.integers(100, 4000, 150)] for _ in range(6)]
    streams = [engine.stream(request_for(ids, "greedy", 300)) for ids in asked]
    for ids, stream in zip(asked, streams, strict=True):
        _, tokens, summary = collect(stream)
        assert summary.new_tokens == len(tokens) == 300
        assert is_greedy(reference, ids, tokens)
    assert engine.pages() == (0, 4)


@pytest.mark.parametrize("options", [{"speculate": "ngram"}, {"draft": "fable-7m"}])
def test_speculation_does_not_change_the_text(exl2_dir: Path, reference: EngineThread, options: dict[str, str]) -> None:
    if "draft" in options:
        options = {"draft": str(exl2_dir)}
    engine = load(exl2_dir, **options)
    ids = Tokenizer(exl2_dir).encode(
        "One day a fox met a fox. The fox said: fox, fox, fox, fox, fox", add_special_tokens=True
    )
    for _ in range(2):
        _, tokens, summary = collect(engine.stream(request_for(ids, "greedy", 80)))
        assert is_greedy(reference, ids, tokens)
    print(f"\n{options}: {summary.accepted_tokens} of {summary.drafted_tokens} accepted {summary.note}")
    assert 0 <= summary.accepted_tokens <= summary.drafted_tokens


def test_a_model_that_the_kernels_do_not_take_runs_through_exllamav2s_modules(tmp_path: Path) -> None:
    variant = tinymodels.Variant("float")
    state = tinymodels.write(tmp_path / "model", variant, seed=3)
    engine = load(tmp_path / "model")
    assert "exllamav2's modules" in engine.facts["kernels"]
    ids = [1, 40, 300, 4000, 17, 250, 999, 31, 2048, 5, 77, 640]
    expected = tinymodels.reference_logits(state, variant, ids)
    for step in (1, 5, 12):
        for _ in range(3):  # as it is, captured, and replayed
            logits = engine.cached_logits(ids, step)
            error = float(((logits - expected).norm(dim=1) / expected.norm(dim=1)).median())
            assert error < 0.01


@pytest.fixture
def torch_attention() -> Iterator[None]:
    os.environ["EXL_ATTENTION"] = "torch"
    yield
    del os.environ["EXL_ATTENTION"]


@pytest.mark.usefixtures("torch_attention")
def test_without_kernels_for_attention_the_text_is_the_same(exl2_dir: Path, reference: EngineThread) -> None:
    engine = load(exl2_dir)
    assert engine.facts["attention"].startswith("torch")
    (ids,) = prompts(1)
    _, tokens, _ = collect(engine.stream(request_for(ids, "greedy", 20)))
    assert is_greedy(reference, ids, tokens)


def test_a_full_context_is_filled_to_its_last_token(exl2_dir: Path, reference: EngineThread) -> None:
    """The last passes are filled up with tokens that lie behind the end."""
    engine = load(exl2_dir, max_seq_len=1024)
    ids = [int(i) for i in np.random.default_rng(5).integers(100, 4000, 1010)]
    _, tokens, _ = collect(engine.stream(request_for(ids, "greedy", 100)))
    assert len(tokens) == 14
    assert is_greedy(reference, ids, tokens)
