"""The sampler as a whole: distributions, mirostat, bans, refused input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samplertools import by_top_k, dense, make, of, softmax, some_logits

from exl_cli.engines.sampling.filters import draw
from exl_cli.engines.sampling.noise import exponential
from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.errors import EngineError
from exl_cli.sampling import Sampling

# --- mirostat


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.5])
def test_mirostat_holds_the_surprise_at_tau(tau: float) -> None:
    logits = some_logits(8, 500)  # of more than 3.5 bits of entropy
    sampler = make(500, mirostat=True, mirostat_tau=tau, mirostat_eta=0.1)
    surprise = []
    for position in range(1000):
        probs = dense(sampler, logits)
        surprise.append(-math.log2(probs[sampler.sample(logits, range(position))]))
    assert np.mean(surprise[300:]) == pytest.approx(tau, abs=0.05)


# --- drawing


def test_the_least_noise_over_probability_wins() -> None:
    logits = some_logits(9, 64)
    sampler, probs, ids = make(64, seed=123), softmax(logits), np.arange(64)
    expected = [int((exponential(123, position, ids) / probs).argmin()) for position in range(200)]
    assert [sampler.sample(logits, range(position)) for position in range(200)] == expected
    assert len({*expected}) > 10


def test_what_was_drawn_before_does_not_matter() -> None:
    logits = some_logits(9, 64)
    sampler = make(64, seed=1)
    tokens = [sampler.sample(logits, range(position)) for position in range(20)]
    assert [sampler.sample(logits, range(position)) for position in reversed(range(20))] == tokens[::-1]
    assert [make(64, seed=2).sample(logits, range(position)) for position in range(20)] != tokens


def test_a_small_change_of_the_logits_changes_few_tokens() -> None:
    """Also where it changes which of two tokens is the likelier, or one at the end of the candidates."""
    same = 0
    for position in range(1000):
        logits = some_logits(position, 300)
        noise = np.random.default_rng(position).normal(0.0, 1e-3, 300).astype(np.float32)
        sampler = make(300, top_p=0.9)
        same += sampler.sample(logits, range(position)) == sampler.sample(logits + noise, range(position))
    assert same >= 995


@pytest.mark.parametrize(("point", "index"), [(1e-9, 0), (0.2, 0), (0.26, 1), (0.9999, 2)])
def test_a_draw_in_order(point: float, index: int) -> None:
    assert draw(np.array([0.25, 0.5, 0.25], dtype=np.float32), point) == index


def chi_square(tokens: list[int], probs: np.ndarray) -> float:
    counts = np.bincount(tokens, minlength=len(probs))
    assert not counts[probs == 0].any()
    support = probs > 0
    expected = probs[support] * len(tokens)
    return float(((counts[support] - expected) ** 2 / expected).sum())


def test_frequencies_match_the_distribution() -> None:
    logits = some_logits(10, 1000)
    sampler = make(1000, seed=1, top_k=11, temperature=1.5)
    tokens = [sampler.sample(logits, range(position)) for position in range(5_000)]
    assert chi_square(tokens, by_top_k(softmax(logits / 1.5), 11)) < 29.59  # 0.1 % point for 10 degrees of freedom


@pytest.mark.parametrize("skew", [-0.8, 0.5])
def test_skew_raises_the_cumulated_probabilities_to_a_power(skew: float) -> None:
    logits = of(0.1, 0.5, 0.15, 0.25)
    sampler = make(4, seed=2, skew=skew)
    cumulated = np.array([0.0, 0.5, 0.75, 0.9, 1.0]) ** math.exp(skew)  # likeliest first: tokens 1, 3, 2, 0
    expected = np.diff(cumulated)[[3, 0, 2, 1]]
    tokens = [sampler.sample(logits, range(position)) for position in range(5_000)]
    assert chi_square(tokens, expected) < 16.27  # 0.1 % point for 3 degrees of freedom


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.0, 5.0),
        "temperature_last": st.booleans(),
        "top_k": st.integers(0, 70),
        "top_p": st.floats(0.0, 1.0),
        "top_a": st.floats(0.0, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "tfs": st.floats(0.0, 1.0),
        "typical": st.floats(0.0, 1.0),
        "mirostat": st.booleans(),
        "skew": st.floats(-3.0, 3.0),
        "smoothing_factor": st.floats(0.0, 3.0),
        "max_temp": st.floats(0.0, 3.0),
        "temp_exponent": st.floats(0.1, 3.0),
        "xtc_probability": st.floats(0.0, 1.0),
        "xtc_threshold": st.floats(0.0, 0.5),
        "token_repetition_penalty": st.floats(0.5, 3.0),
        "token_repetition_range": st.integers(-1, 12),
        "token_repetition_decay": st.integers(0, 12),
        "token_frequency_penalty": st.floats(-2.0, 2.0),
        "dry_multiplier": st.floats(0.0, 2.0),
    },
)


@given(SETTINGS, st.integers(0, 2**32), st.sampled_from([1, 2, 3, 64]), st.sampled_from([0.0, 1e-3, 2.0, 60.0]))
@settings(max_examples=60, deadline=None)
def test_any_settings_draw_from_a_distribution_and_again_the_same(
    changes: dict[str, Any], seed: int, size: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(0.0, 1.0, (4, size)) * spread).astype(np.float32)
    runs = []
    for _ in range(2):
        sampler, history = make(size, seed=seed, **changes), [0, 0]
        for row in logits:
            probs = dense(sampler, row, history)
            assert probs.sum() == pytest.approx(1.0, abs=1e-3)
            token = sampler.sample(row, history)
            assert probs[token] > 0
            history.append(token)
        runs.append(history)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "changes", [{"top_k": 1}, {"temperature": 0.0}, {"temperature": 0.009, "temperature_last": True}]
)
def test_greedy_takes_the_likeliest_whatever_the_seed(changes: dict[str, Any]) -> None:
    for seed in range(5):
        logits = some_logits(seed, 4096)
        sampler = make(4096, seed=seed, mirostat=True, xtc_probability=1.0, **changes)
        assert sampler.sample(logits, ()) == logits.argmax()


def test_greedy_heeds_penalties() -> None:
    assert make(3, temperature=0.0, token_repetition_penalty=2.0).sample(np.array([3.0, 2.0, 1.0]), [0]) == 1


def test_last_temperature_near_zero_takes_the_likeliest_survivor() -> None:
    logits = of(*[0.07] * 10, 0.3)
    assert dense(make(11, temperature=0.01, temperature_last=True), logits).argmax() == 10
    assert dense(make(11, max_temp=1e-6), logits)[10] == pytest.approx(1.0)
    certain = np.array([0.0, 500.0, 0.0], dtype=np.float32)  # of no entropy, so at a temperature of 0
    assert dense(make(3, max_temp=1.0), certain).tolist() == [0.0, 1.0, 0.0]


# --- what may be chosen, and what the caller gives


def test_tokens_beyond_the_vocabulary_are_never_chosen() -> None:
    logits = np.array([1.0, 9.0, 1.0, 1.0, 50.0, np.nan], dtype=np.float32)
    for changes in ({}, {"temperature": 0.0}, {"top_k": 3}, {"smoothing_factor": 1.0}):
        assert {make(4, **changes).sample(logits, range(position)) for position in range(50)} <= set(range(4))


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 2}, {"token_repetition_penalty": 1.5}])
@pytest.mark.parametrize(("size", "at"), [(4, 2), (4096, 0), (4096, 7), (4096, 4095)])
@pytest.mark.parametrize(("value", "words"), [(math.nan, "NaN: 1 of"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_a_logit_that_is_no_number_is_refused(
    changes: dict[str, Any], size: int, at: int, value: float, words: str
) -> None:
    logits = some_logits(0, size)
    logits[at] = value
    with pytest.raises(EngineError, match=words) as error:
        make(size, **changes).sample(logits, [0])
    assert error.value.hint


@pytest.mark.parametrize("shape", [(0,), (1, 4)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        make(4).sample(np.zeros(shape, dtype=np.float32), ())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logits_are_left_as_they_were(dtype: type[np.floating[Any]]) -> None:
    logits = some_logits(12, 64).astype(dtype)
    before = logits.copy()
    Sampler(Sampling(dry_multiplier=1.0), 0, vocab_size=64).sample(logits, [1, 2, 1, 2])
    np.testing.assert_array_equal(logits, before)


def test_a_history_that_grows_gives_what_a_new_one_gives() -> None:
    logits, rng = some_logits(13, 50), np.random.default_rng(0)
    changes = {"token_frequency_penalty": 0.1, "dry_multiplier": 0.5, "token_repetition_range": 300}
    sampler, history = make(50, **changes), []
    for _ in range(60):  # past the first allocations
        history += rng.integers(0, 50, 11).tolist()
        np.testing.assert_array_equal(dense(sampler, logits, history), dense(make(50, **changes), logits, history))
    shorter = history[100:200]
    np.testing.assert_array_equal(dense(sampler, logits, shorter), dense(make(50, **changes), logits, shorter))
