"""Log-probabilities, bans and bias on a GPU; dynamic RoPE beyond the native context."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder, collect

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Request
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build

STORY = "Once upon a time there was a little girl named Lily. She"
GREEDY = build({}, "greedy")


def load(path: Path, engine: str = "exllamav2", **options: Any) -> EngineThread:
    info = loader.resolve(str(path))
    return EngineThread(loader.load(info, Tokenizer(info.path), LoadOptions(engine=engine, **options), Recorder()))


@pytest.fixture(scope="module", params=["off", "ngram"])
def engine(request, exl2_dir: Path) -> Iterator[EngineThread]:
    engine = load(exl2_dir, speculate=request.param, sequences=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ids(exl2_dir: Path) -> list[int]:
    return Tokenizer(exl2_dir).encode(STORY, add_special_tokens=True)


def test_logprobs_are_those_of_the_logits(engine: EngineThread, ids: list[int]) -> None:
    chunks = [*engine.stream(Request(ids, GREEDY, 40, 0, logprobs=2, prompt_logprobs=1))]
    tokens = collect(chunks)[1]
    scored = [*chunks[0].prompt_logprobs, *(it for chunk in chunks for it in chunk.logprobs)]
    every = [*ids, *tokens]
    assert [it.token_id for it in scored] == every[1:]
    expected = torch.log_softmax(engine.logits(every), -1)
    for it, row in zip(scored, expected, strict=False):
        assert it.logprob == pytest.approx(row[it.token_id].item(), abs=0.05)
        assert it.top[0][1] == pytest.approx(row.max().item(), abs=0.05)


def test_banned_strings_never_come(engine: EngineThread, ids: list[int], exl2_dir: Path) -> None:
    tokenizer = Tokenizer(exl2_dir)
    plain, _, _ = collect(engine.stream(Request(ids, GREEDY, 60, 0)))
    words = tuple(sorted({word for word in plain.split() if len(word) > 3})[:4])
    others = [engine.stream(Request([*ids, 300 + n], GREEDY, 60, n)) for n in range(2)]
    text, tokens, _ = collect(engine.stream(Request(ids, GREEDY, 60, 0, banned_strings=words)))
    assert words
    assert not [word for word in words if word.casefold() in text.casefold()]
    assert tokenizer.decode(tokens).strip() == text.strip()
    for other in others:
        collect(other)
    assert engine.pages() is not None
    assert engine.pages()[0] == 0


def test_a_prompt_alone_and_fewest_tokens(engine: EngineThread, ids: list[int]) -> None:
    assert collect(engine.stream(Request(ids, GREEDY, 0, 0)))[1] == []
    stop = collect(engine.stream(Request(ids, GREEDY, 1, 0)))[1][0]
    tokens = collect(engine.stream(Request(ids, GREEDY, 20, 0, stop_ids=frozenset({stop}), min_new_tokens=9)))[1]
    assert stop not in tokens[:9]


@pytest.fixture(scope="module")
def extended(exl2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fable-7m as if it were made for 256 tokens and extended fourfold."""
    folder = tmp_path_factory.mktemp("models") / "extended"
    shutil.copytree(exl2_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    (folder / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 256, "rope_parameters": rope, "rope_scaling": None})
    )
    return folder


def test_dynamic_rotary_embeddings_past_the_native_length(extended: Path) -> None:
    here, there = load(extended, max_seq_len=1024, sequences=2), load(extended, "cpu", max_seq_len=1024)
    prompt = Tokenizer(extended).encode(" ".join([STORY] * 20), add_special_tokens=True)[:250]
    tokens = collect(here.stream(Request(prompt, build({}, "creative"), 700, 1)))[1]
    every = [*prompt, *tokens]
    assert len(every) > 900
    same, error, lengths = 0, 0.0, range(240, len(every), 14)
    for length in lengths:
        expected, logits = there.logits(every[:length])[-1], here.logits(every[:length])[-1]
        same += int(expected.argmax() == logits.argmax())
        error = max(error, float((expected - logits).norm() / expected.norm()))
    print(f"\n{len(lengths)} lengths to {len(every)}: argmax equal {same / len(lengths):.3f}, worst L2 {error:.4f}")
    assert same >= 0.95 * len(lengths)
    # Through the cache, over many changes of the tables, each token is the likeliest after those before it.
    greedy = collect(here.stream(Request(prompt, GREEDY, 400, 0)))[1]
    every = [*prompt, *greedy]
    chosen = [
        int(here.logits(every[:length])[-1].argmax()) == every[length] for length in range(len(prompt), len(every), 5)
    ]
    print(f"greedy tokens that whole prefills choose, too: {sum(chosen)} of {len(chosen)}")
    assert sum(chosen) >= 0.95 * len(chosen)
    here.close()
    there.close()
