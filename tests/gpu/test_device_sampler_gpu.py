"""Sampling on a real GPU: the tokens of the CPU's sampler, from the same logits; and whole texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import collect
from samplertools import CASES, plain
from test_output_tokens_gpu import STORY, load

from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Request
from exl_cli.engines.exllamav2.device_sampler import DeviceSampler
from exl_cli.engines.exllamav2.forward_pass import Draw
from exl_cli.engines.sampling.logprobs import token_logprobs
from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling

SEATS = 48


@pytest.mark.parametrize("size", [1003, 32000, 128256])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_tokens_are_those_of_the_cpus_sampler(changes: dict[str, Any], size: int) -> None:
    rng, device = np.random.default_rng(size), torch.device("cuda", 0)
    logits = rng.normal(0.0, 3.0, (SEATS, size + 5)).astype(np.float32)
    there = torch.from_numpy(logits).to(device)
    on_device = DeviceSampler(device, SEATS, size + 5, 600)
    sampling, history = plain(**changes), rng.integers(0, 40, (SEATS, 500)).tolist()
    draws, expected = [], []
    for index in range(SEATS):
        request = Request(history[index], sampling, 20, index, logprobs=3 if index % 4 == 0 else None)
        samplers = [Sampler(sampling, index, vocab_size=size, bias={7: 4.0} if index % 3 == 0 else {}) for _ in "ab"]
        seat = on_device.begin(samplers[0], request)
        assert seat is not None
        banned = {int(logits[index].argmax())} if index % 5 == 0 else ()
        draws.append(Draw(seat, history[index], banned))
        expected.append(samplers[1].sample(logits[index], history[index], banned))
    on_device.launch(there, [*range(SEATS)], draws)
    torch.cuda.synchronize()
    chosen = on_device.collect()
    assert None not in chosen
    same = [one.token == other for one, other in zip(chosen, expected, strict=True)]
    # Ties aside: candidates at the edge of what a filter keeps, and races that are as good as even.
    assert sum(same) >= SEATS - 1
    for index in range(0, SEATS, 4):
        wanted = token_logprobs(logits[index], chosen[index].token, 3, size)
        assert chosen[index].logprobs.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert [id_ for id_, _ in chosen[index].logprobs.top] == [id_ for id_, _ in wanted.top]


def test_logits_that_are_no_numbers_are_left_to_the_cpu() -> None:
    device = torch.device("cuda", 0)
    on_device = DeviceSampler(device, 2, 100, 10)
    logits = torch.randn((2, 100), device=device)
    logits[1, 40] = math.nan
    request = Request([1], plain(), 5, 0)
    draws = [Draw(on_device.begin(Sampler(plain(), 0, vocab_size=100), request), [1], ()) for _ in range(2)]
    on_device.launch(logits, [0, 1], draws)
    torch.cuda.synchronize()
    first, second = on_device.collect()
    assert first is not None
    assert second is None


@pytest.fixture(scope="module", params=["exl2_dir", "gptq_dir"])
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[EngineThread, list[int]]]:
    path: Path = request.getfixturevalue(request.param)
    engine = load(path, sequences=16)
    yield engine, Tokenizer(path).encode(STORY, add_special_tokens=True)
    engine.close()


def texts(engine: EngineThread, ids: list[int], seeds: range, sampling: Sampling) -> list[list[int]]:
    streams = [engine.stream(Request([*ids], sampling, 64, seed)) for seed in seeds]
    return [collect(stream)[1] for stream in streams]


def test_a_seed_gives_the_same_text_alone_and_batched(engine: tuple[EngineThread, list[int]]) -> None:
    thread, ids = engine
    sampling = Sampling()
    alone = [texts(thread, ids, range(seed, seed + 1), sampling)[0] for seed in range(20)]
    same = 0
    for seed in range(20):
        together = texts(thread, ids, range(seed, seed + 16), sampling)
        same += together[0] == alone[seed]
    assert same >= 18


def test_the_device_and_the_cpu_write_the_same(engine: tuple[EngineThread, list[int]], monkeypatch: Any) -> None:
    thread, ids = engine
    sampling = Sampling(top_k=0, top_p=0.9, xtc_probability=0.3, dry_multiplier=0.5)
    device = [texts(thread, ids, range(seed, seed + 1), sampling)[0] for seed in range(10)]
    monkeypatch.setattr(DeviceSampler, "begin", lambda self, sampler, request: None)
    cpu = [texts(thread, ids, range(seed, seed + 1), sampling)[0] for seed in range(10)]
    assert sum(one == other for one, other in zip(device, cpu, strict=True)) >= 9
