"""Log-probabilities, bans, bias, minimum length and cache salts on the CPU engine, against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Recorder, collect
from shallow import shallow

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Chunk, Request, TokenLogprobs
from exl_cli.errors import UsageError
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build

STORY = "Once upon a time there was a little girl named Lily. She"


@pytest.fixture(scope="module")
def fable() -> Iterator[tuple[EngineThread, Tokenizer]]:
    info = loader.resolve(str(shallow()))
    tokenizer = Tokenizer(info.path)
    engine = EngineThread(loader.load(info, tokenizer, LoadOptions(engine="cpu"), Recorder()))
    yield engine, tokenizer
    engine.close()


def run(fable: tuple[EngineThread, Tokenizer], prompt: str = STORY, new: int = 12, **fields: Any) -> list[Chunk]:
    engine, tokenizer = fable
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    request = Request(ids, build({}, fields.pop("preset", "greedy")), new, 0, **fields)
    return [*engine.stream(dataclasses.replace(request, stop_ids=fields.get("stop_ids", tokenizer.eos_ids)))]


def agree(found: tuple[TokenLogprobs, ...], ids: list[int], expected: torch.Tensor, count: int) -> None:
    assert [it.token_id for it in found] == ids
    for it, row in zip(found, expected, strict=True):
        assert it.logprob == pytest.approx(row[it.token_id].item(), abs=1e-3)
        assert len(it.top) == count
        best = row.topk(count)
        assert [logprob for _, logprob in it.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert [row[id_].item() for id_, _ in it.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("preset", ["greedy", "creative"])
def test_logprobs_are_those_of_log_softmax_whatever_the_settings(fable, preset: str) -> None:
    chunks = run(fable, preset=preset, logprobs=3, prompt_logprobs=2)
    _, tokens, summary = collect(chunks)
    prompt = fable[1].encode(STORY, add_special_tokens=True)
    expected = torch.log_softmax(fable[0].logits([*prompt, *tokens]), -1)
    found = tuple(it for chunk in chunks for it in chunk.logprobs)
    agree(found, tokens, expected[len(prompt) - 1 : -1], 3)
    agree(chunks[0].prompt_logprobs, prompt[1:], expected[: len(prompt) - 1], 2)
    assert summary.reused_tokens == 0
    assert not any(chunk.prompt_logprobs for chunk in chunks[1:])


def test_a_long_prompts_logprobs_are_computed_in_pieces(fable) -> None:
    prompt = " ".join([STORY] * 30)
    chunks = run(fable, prompt, 0, prompt_logprobs=0)
    ids = fable[1].encode(prompt, add_special_tokens=True)
    agree(chunks[0].prompt_logprobs, ids[1:], torch.log_softmax(fable[0].logits(ids), -1)[:-1], 0)
    assert collect(chunks)[1:][0] == []


def test_bias_forces_and_forbids(fable) -> None:
    word = fable[1].encode(" cat", add_special_tokens=False)[0]
    assert collect(run(fable, new=4, logit_bias={word: 100}))[1] == [word] * 4
    first = collect(run(fable, new=1))[1][0]
    assert first not in collect(run(fable, preset="creative", new=20, logit_bias={first: float("-inf")}))[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"logit_bias": {4096: 1.0}}, "logit_bias names the token 4,096"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names the token -1"),
        ({"logit_bias": {1: 101.0}}, "must be between -100 and 100, got 101"),
        ({"logit_bias": {1: float("nan")}}, "must be between -100 and 100, got nan"),
        ({"logprobs": -1}, "logprobs must be at least 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be at least 0"),
        ({"min_new_tokens": 13}, "min_new_tokens is 13, max_new_tokens 12"),
        ({"banned_strings": ("a", "")}, "banned_strings contains an empty string"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fable, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run(fable, **fields)
