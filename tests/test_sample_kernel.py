"""The sampling kernel, emulated on the CPU, against the CPU's sampler."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernels.emulated import COMPILER, Emulated
from samplertools import CASES, plain, some_logits

from exl_cli.engines.exllamav2.kernels import sample
from exl_cli.engines.sampling.logprobs import token_logprobs
from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.sampling import Sampling

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to compile the kernels for the CPU")
THREADS = 64
# What the blocks of a row share; never cleared between launches.
MEETING = np.zeros(sample.MEETING_BYTES, dtype=np.uint8)


@pytest.fixture(scope="module")
def kernel(kernels_folder: Path) -> Emulated:
    return Emulated(kernels_folder, sample.FILE, sample.NAME, "Sample", {})


def bits(ids: Collection[int], size: int) -> np.ndarray:
    mask = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
    mask[[*ids]] = 1
    return np.packbits(mask, bitorder="little").view(np.uint32)


def choose(
    kernel: Emulated,
    logits: np.ndarray,
    sampling: Sampling,
    seed: int,
    history: Sequence[int] = (),
    *,
    vocab: int = 0,
    bias: Mapping[int, float] | None = None,
    protected: Collection[int] = (),
    breakers: Collection[int] = (),
    allowed: Collection[int] | None = None,
    logprobs: int | None = None,
    mu: float = 0.0,
    parts: int = 3,
) -> sample.Chosen:
    vocab, bias = vocab or len(logits), bias or {}
    row = sample.row(sampling, seed)
    memory: dict[str, Any] = {
        "history": np.array([*history, 0], dtype=np.int32),
        "breakers": bits(breakers, vocab),
        "is_protected": bits(protected, vocab),
        "edited": np.array([*bias, 0], dtype=np.int32),
        "biases": np.array([*bias.values(), 0], dtype=np.float32),
    }
    if allowed is not None:
        memory["mask"] = bits(allowed, vocab)
    for name, array in memory.items():
        setattr(row, name, array.ctypes.data)
    row.next = memory["history"].ctypes.data + 4 * len(history)
    row.length, row.edits = len(history), len(bias)
    row.top_logprobs = 0 if logprobs is None else logprobs + 1
    row.bits = mu or row.bits
    scratch = np.full(2 * vocab, np.nan, dtype=np.float32)
    chosen = sample.Chosen(top=2**32 - 1)  # whatever lies there
    scores = np.ascontiguousarray(logits, dtype=np.float32)
    argument = sample.SampleArgument(
        *(scores.ctypes.data, ctypes.addressof(row), ctypes.addressof(chosen), MEETING.ctypes.data),
        *(scratch.ctypes.data, len(logits), vocab),
    )
    kernel(argument, (parts, 1), THREADS, seed)
    if chosen.token >= 0:
        assert logprobs is not None or chosen.top == 0
        assert memory["history"][-1] == chosen.token
    return chosen


@pytest.mark.parametrize("size", [5, 300, 1003])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_kernel_samples_the_same_tokens_as_the_cpu(kernel: Emulated, changes: dict[str, Any], size: int) -> None:
    rng = np.random.default_rng(size)
    sampling, tokens = plain(**changes), range(min(size, 12))
    for seed in range(6):
        history = [*rng.choice(tokens, 8), *([1, 2, 3, 4] * 3)[: rng.integers(12)], *rng.choice(tokens, 2), 1, 2, 3]
        history = [int(id_) for id_ in history]
        logits = some_logits(seed, size)
        sampler = Sampler(sampling, seed, vocab_size=size)
        expected = sampler.sample(logits, history)
        got = choose(kernel, logits, sampling, seed, history)
        assert got.token == expected
        if not seed:  # by any number of blocks
            for parts in (1, sample.MOST_PARTS):
                assert choose(kernel, logits, sampling, seed, history, parts=parts).token == expected
        ids, probs = sampler.distribution(logits, history)
        if not sampling.mirostat:
            assert got.prob == pytest.approx(float(probs[ids == expected][0]), rel=1e-4)


def reference(size: int, seed: int, history: Sequence[int], logits: np.ndarray, sampling: Sampling, **more: Any) -> int:
    return Sampler(sampling, seed, vocab_size=size, **more).sample(logits, history)


@pytest.mark.parametrize("seed", range(8))
def test_biases_and_bans_come_after_penalties(kernel: Emulated, seed: int) -> None:
    logits, history = some_logits(seed, 40), [3, 3, 7]
    bias = {3: 5.0, int(logits.argmax()): -math.inf, 9: 4.0, 39: -2.0}
    sampling = plain(token_repetition_penalty=1.3)
    expected = reference(40, seed, history, logits, sampling, bias=bias)
    assert choose(kernel, logits, sampling, seed, history, bias=bias).token == expected


def test_a_mask_leaves_what_it_allows(kernel: Emulated) -> None:
    logits, allowed = some_logits(1, 100), [4, 50, 97]
    for seed in range(8):
        expected = reference(100, seed, [], logits, plain(), bias=dict.fromkeys({*range(100)} - {*allowed}, -math.inf))
        assert choose(kernel, logits, plain(), seed, allowed=allowed).token == expected
    assert choose(kernel, logits, plain(temperature=0.0), 0, allowed=[97]).token == 97
    assert choose(kernel, logits, plain(), 0, allowed=[]).token == sample.FAILED


def test_dry_stops_at_breakers_and_xtc_spares_the_protected(kernel: Emulated) -> None:
    history = [5, 1, 2, 3, 9, 5, 1, 2]
    for seed in range(8):
        logits = some_logits(seed, 12)
        for breakers in ({1}, {3}, {9}):
            dry = plain(dry_multiplier=3.0)
            expected = reference(12, seed, history, logits, dry, breakers=lambda breakers=breakers: breakers)
            assert choose(kernel, logits, dry, seed, history, breakers=breakers).token == expected
        xtc, likeliest = plain(xtc_probability=0.9, xtc_threshold=0.02), {int(logits.argmax())}
        expected = reference(12, seed, history, logits, xtc, protected=lambda likeliest=likeliest: likeliest)
        assert choose(kernel, logits, xtc, seed, history, protected=likeliest).token == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 63, 64, 99])
def test_a_logit_that_is_no_number_fails_unless_it_is_of_no_token(kernel: Emulated, value: float, at: int) -> None:
    logits = some_logits(0, 100)
    logits[at] = value
    assert choose(kernel, logits, plain(), 0).token == sample.FAILED
    if at:
        assert choose(kernel, logits, plain(), 0, vocab=at).token == reference(at, 0, [], logits, plain())


def test_equal_logits_are_drawn_alike_and_greedy_takes_the_first(kernel: Emulated) -> None:
    logits = np.full(90, 1.5, dtype=np.float32)
    assert choose(kernel, logits, plain(temperature=0.0), 0).token == 0
    for changes in ({"top_p": 0.5}, {"top_k": 10}, {"typical": 0.5}, {"min_p": 1.0}, {"max_temp": 2.0}):
        assert choose(kernel, logits, plain(**changes), 1).token == reference(90, 1, [], logits, plain())


def test_extreme_logits(kernel: Emulated) -> None:
    for spread in (1e3, 1e30):
        for changes in CASES:
            logits = some_logits(3, 70) * np.float32(spread)
            expected = reference(70, 5, [1, 2, 1, 2], logits, plain(**changes))
            assert choose(kernel, logits, plain(**changes), 5, [1, 2, 1, 2]).token == expected, changes


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_log_probabilities_are_of_all_the_models_logits(kernel: Emulated, count: int) -> None:
    logits = some_logits(6, 301)
    got = choose(kernel, logits, plain(token_repetition_penalty=2.0), 4, [1, 5], vocab=300, logprobs=count)
    expected = token_logprobs(logits, got.token, count, 300)
    assert got.logit - got.total == pytest.approx(expected.logprob, abs=1e-5)
    tops = sorted(zip(got.logits[: got.top], got.ids[: got.top], strict=True), reverse=True)
    assert [id_ for _, id_ in tops] == [id_ for id_, _ in expected.top]
    assert [logit - got.total for logit, _ in tops] == pytest.approx([each for _, each in expected.top], abs=1e-5)


def test_mirostat_follows_its_surprise(kernel: Emulated) -> None:
    sampling, history = plain(mirostat=True, mirostat_tau=2.0), [0]
    sampler, mu = Sampler(sampling, 3, vocab_size=200), 4.0
    for step in range(10):
        logits = some_logits(step, 200)
        got = choose(kernel, logits, sampling, 3, history, mu=mu)
        assert got.token == sampler.sample(logits, history)
        history.append(got.token)
        mu += 0.1 * (2.0 + math.log2(got.prob))
