"""The sampler against the definitions of what it does: written here in float64 from their papers, by hand on small
examples, and transformers' own processors where they mean the same."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_cli.engines.dry import apply_dry, dry_breakers, token_mask
from exl_cli.engines.filters import draw, penalize
from exl_cli.engines.sampler import Sampler, xtc_protected
from exl_cli.errors import EngineError
from exl_cli.sampling import Sampling

SEEDS_AND_SIZES = [(0, 5), (1, 32), (2, 300), (3, 4096), (4, 4096)]
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 0.0, "token_repetition_penalty": 1.0}


def plain(**changes: Any) -> Sampling:
    """Settings with everything off but the changes."""
    return Sampling(**{**OFF, **changes})


def make(size: int, seed: int = 0, **changes: Any) -> Sampler:
    return Sampler(plain(**changes), seed, vocab_size=size)


def some_logits(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 3.0, size).astype(np.float32)


def of(*probs: float) -> np.ndarray:
    """Logits that give these probabilities."""
    return np.log(np.array(probs, dtype=np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def dense(sampler: Sampler, logits: np.ndarray, history: Sequence[int] = ()) -> np.ndarray:
    """The sampler's distribution over the whole vocabulary."""
    ids, probs = sampler.distribution(logits, history)
    assert len(set(ids.tolist())) == len(ids)
    result = np.zeros(len(logits))
    result[ids] = probs
    return result


def kept(probs: np.ndarray, tokens: Any) -> np.ndarray:
    """The distribution with only these tokens left."""
    result = np.zeros_like(probs)
    result[tokens] = probs[tokens]
    return result / result.sum()


def ranked(probs: np.ndarray) -> list[int]:
    return sorted(range(len(probs)), key=lambda i: -probs[i])


# --- each filter against its definition


def by_top_k(probs: np.ndarray, k: int) -> np.ndarray:
    return kept(probs, ranked(probs)[:k])


def by_top_p(probs: np.ndarray, mass: float) -> np.ndarray:
    nucleus: list[int] = []
    for token in ranked(probs):
        if probs[nucleus].sum() >= mass:
            break
        nucleus.append(token)
    return kept(probs, nucleus)


def by_top_a(probs: np.ndarray, factor: float) -> np.ndarray:
    return kept(probs, probs >= factor * probs.max() ** 2)


def by_min_p(probs: np.ndarray, share: float) -> np.ndarray:
    return kept(probs, probs >= share * probs.max())


def by_tail_free(probs: np.ndarray, share: float) -> np.ndarray:
    order = ranked(probs)
    p = probs[order]
    curvature = [abs((p[i + 2] - p[i + 1]) - (p[i + 1] - p[i])) for i in range(len(p) - 2)]
    total, cumulative, n = sum(curvature), 0.0, 1
    for value in curvature:
        cumulative += value / total
        n += cumulative <= share
    return kept(probs, order[:n])


def by_typical(probs: np.ndarray, mass: float) -> np.ndarray:
    entropy = -(probs * np.log(probs)).sum()
    order = sorted(range(len(probs)), key=lambda i: abs(-math.log(probs[i]) - entropy))
    n, total = 0, 0.0
    while total < mass:
        total += probs[order[n]]
        n += 1
    return kept(probs, order[:n])


def by_mirostat(probs: np.ndarray, tau: float) -> np.ndarray:
    """The first token's: mu starts at 2 tau."""
    surprise = -np.log2(probs)
    return kept(probs, surprise <= max(2 * tau, surprise.min()))


def by_last_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    return softmax(np.log(probs) / temperature)


def by_dynamic_temperature(probs: np.ndarray, low: float, high: float, exponent: float) -> np.ndarray:
    entropy = -(probs * np.log(probs)).sum() / math.log(len(probs))
    return softmax(np.log(probs) / (low + (high - low) * entropy**exponent))


def by_xtc(probs: np.ndarray, probability: float, threshold: float) -> np.ndarray:
    top = [i for i in ranked(probs) if probs[i] >= threshold]
    rest = [i for i in range(len(probs)) if i not in top[:-1]]
    return (1 - probability) * probs + probability * kept(probs, rest)


def in_turn(probs: np.ndarray, *steps: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Each step on what the last one left."""
    for step in steps:
        left = np.flatnonzero(probs)
        changed = step(probs[left])
        probs = np.zeros_like(probs)
        probs[left] = changed
    return probs


DEFINITIONS: list[tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = [
    ({"top_k": 2}, lambda p: by_top_k(p, 2)),
    ({"top_k": 40}, lambda p: by_top_k(p, 40)),
    ({"top_p": 0.3}, lambda p: by_top_p(p, 0.3)),
    ({"top_p": 0.99}, lambda p: by_top_p(p, 0.99)),
    ({"top_a": 0.2}, lambda p: by_top_a(p, 0.2)),
    ({"top_a": 1.0}, lambda p: by_top_a(p, 1.0)),
    ({"min_p": 0.02}, lambda p: by_min_p(p, 0.02)),
    ({"min_p": 1.0}, lambda p: by_min_p(p, 1.0)),
    ({"tfs": 0.6}, lambda p: by_tail_free(p, 0.6)),
    ({"tfs": 0.95}, lambda p: by_tail_free(p, 0.95)),
    ({"typical": 0.2}, lambda p: by_typical(p, 0.2)),
    ({"typical": 0.9}, lambda p: by_typical(p, 0.9)),
    ({"mirostat": True, "mirostat_tau": 2.5}, lambda p: by_mirostat(p, 2.5)),
    ({"mirostat": True, "mirostat_tau": 0.1}, lambda p: by_mirostat(p, 0.1)),
    ({"temperature": 0.4, "temperature_last": True}, lambda p: by_last_temperature(p, 0.4)),
    ({"min_temp": 0.3, "max_temp": 1.8, "temp_exponent": 0.7}, lambda p: by_dynamic_temperature(p, 0.3, 1.8, 0.7)),
    (
        {"min_temp": 0.3, "max_temp": 1.8, "temperature": 0.5, "temperature_last": True},  # not both
        lambda p: by_dynamic_temperature(p, 0.3, 1.8, 1.0),
    ),
    ({"xtc_probability": 0.5, "xtc_threshold": 0.03}, lambda p: by_xtc(p, 0.5, 0.03)),
    ({"xtc_probability": 1.0, "xtc_threshold": 0.02}, lambda p: by_xtc(p, 1.0, 0.02)),
    (
        {"top_k": 60, "top_p": 0.95, "min_p": 0.01, "tfs": 0.99, "temperature": 1.3, "temperature_last": True},
        lambda p: in_turn(
            p,
            lambda p: by_top_k(p, 60),
            lambda p: by_top_p(p, 0.95),
            lambda p: by_min_p(p, 0.01),
            lambda p: by_tail_free(p, 0.99),
            lambda p: by_last_temperature(p, 1.3),
        ),
    ),
]


@pytest.mark.parametrize(("seed", "size"), SEEDS_AND_SIZES)
@pytest.mark.parametrize(("changes", "definition"), DEFINITIONS, ids=[str(changes) for changes, _ in DEFINITIONS])
def test_filter_keeps_what_its_definition_keeps(
    changes: dict[str, Any], definition: Callable[[np.ndarray], np.ndarray], seed: int, size: int
) -> None:
    logits = some_logits(seed, size)
    np.testing.assert_allclose(dense(make(size, **changes), logits), definition(softmax(logits)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{"top_p": 1.0}, {"tfs": 1.0}, {"typical": 1.0}, {"top_k": 300}, {"top_k": 10**9}])
def test_a_filter_that_keeps_everything_changes_nothing(changes: dict[str, Any]) -> None:
    logits = some_logits(5, 300)
    np.testing.assert_allclose(dense(make(300, **changes), logits), softmax(logits), rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.7, 100.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = some_logits(6, 300)
    np.testing.assert_allclose(
        dense(make(300, temperature=temperature), logits), softmax(logits / temperature), rtol=2e-4, atol=1e-12
    )


def test_smoothing_squares_the_distance_to_the_highest_logit() -> None:
    logits = some_logits(7, 300)
    expected = softmax(-0.2 * (logits - logits.max()).astype(np.float64) ** 2 / 1.5)
    np.testing.assert_allclose(
        dense(make(300, smoothing_factor=0.2, temperature=1.5), logits), expected, rtol=1e-4, atol=1e-12
    )


def test_top_p_keeps_the_token_that_reaches_the_threshold() -> None:
    np.testing.assert_allclose(
        dense(make(4, top_p=0.8), of(0.5, 0.35, 0.1, 0.05)), [0.5 / 0.85, 0.35 / 0.85, 0, 0], rtol=1e-5
    )


def test_min_p_that_drops_nothing_adds_nothing() -> None:
    probs = dense(make(4, min_p=0.01, top_k=3), of(0.3, 0.3, 0.25, 0.15))
    np.testing.assert_allclose(probs, [0.3 / 0.85, 0.3 / 0.85, 0.25 / 0.85, 0], rtol=1e-5)


def test_xtc_leaves_the_least_likely_of_the_top_choices() -> None:
    probs = dense(make(4, xtc_probability=1.0, xtc_threshold=0.15), of(0.1, 0.4, 0.2, 0.3))
    np.testing.assert_allclose(probs, [1 / 3, 0, 2 / 3, 0], rtol=1e-5)


def test_xtc_needs_two_top_choices() -> None:
    np.testing.assert_allclose(
        dense(make(3, xtc_probability=1.0, xtc_threshold=0.5), of(0.7, 0.2, 0.1)), [0.7, 0.2, 0.1], rtol=1e-5
    )


def test_xtc_does_not_count_protected_tokens() -> None:
    logits = of(0.4, 0.3, 0.2, 0.1)
    sampler = Sampler(
        plain(xtc_probability=1.0, xtc_threshold=0.15), 0, vocab_size=4, protected=lambda: frozenset({0, 2})
    )
    np.testing.assert_allclose(
        dense(sampler, logits), [0.4, 0.3, 0.2, 0.1], rtol=1e-5
    )  # only token 1 is left to exclude


# --- transformers' processors as a second opinion


@pytest.mark.parametrize(("seed", "size"), SEEDS_AND_SIZES)
@pytest.mark.parametrize(
    ("changes", "name", "argument"),
    [
        ({"temperature": 0.7}, "TemperatureLogitsWarper", 0.7),
        ({"top_k": 7}, "TopKLogitsWarper", 7),
        ({"top_p": 0.9}, "TopPLogitsWarper", 0.9),
        ({"min_p": 0.05}, "MinPLogitsWarper", 0.05),
        ({"typical": 0.6}, "TypicalLogitsWarper", 0.6),
        ({"token_repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor", 1.3),
    ],
)
def test_same_distribution_as_transformers(
    changes: dict[str, Any], name: str, argument: float, seed: int, size: int
) -> None:
    import torch
    from transformers.generation import logits_process

    logits = some_logits(seed, size)
    history = np.random.default_rng(seed).integers(0, size, 40).tolist()
    processor = getattr(logits_process, name)(argument)
    scores = processor(torch.tensor([history]), torch.tensor(logits)[None].clone())
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    np.testing.assert_allclose(dense(make(size, **changes), logits, history), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("seed", "size"), SEEDS_AND_SIZES)
def test_notebook_settings_are_the_chain_of_transformers(seed: int, size: int) -> None:
    import torch
    from transformers.generation import logits_process as lp

    logits, history = some_logits(seed, size), [1, 2, 3, 1]
    scores = torch.tensor(logits)[None]
    for step in (
        lp.RepetitionPenaltyLogitsProcessor(1.05),
        lp.TemperatureLogitsWarper(0.85),
        lp.TopKLogitsWarper(50),
        lp.TopPLogitsWarper(0.8),
    ):
        scores = step(torch.tensor([history]), scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    np.testing.assert_allclose(
        dense(Sampler(Sampling(), 0, vocab_size=size), logits, history), expected, rtol=1e-3, atol=1e-7
    )


# --- penalties


def penalized(logits: list[float], history: list[int], **changes: Any) -> list[float]:
    array = np.array(logits, dtype=np.float32)
    penalize(array, np.array(history, dtype=np.int64), plain(**changes))
    return [round(float(x), 5) for x in array]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    assert penalized([2.0, -2.0, 1.0], [0, 1, 0, 0], token_repetition_penalty=2.0) == [1.0, -4.0, 1.0]


def test_frequency_counts_and_presence_does_not() -> None:
    changes = {"token_frequency_penalty": 0.5, "token_presence_penalty": 0.25}
    assert penalized([2.0, -2.0, 1.0], [0, 1, 0, 0], **changes) == [2 - 0.25 - 1.5, -2 - 0.25 - 0.5, 1.0]


def test_penalties_reach_as_far_as_the_range() -> None:
    changes = {"token_presence_penalty": 1.0, "token_repetition_range": 2}
    assert penalized([0.0] * 5, [0, 1, 2, 3], **changes) == [0, 0, -1, -1, 0]
    assert penalized([0.0] * 5, [0, 1, 2, 3], **{**changes, "token_repetition_range": 0}) == [0, 0, 0, 0, 0]


def test_penalties_fade_over_the_decay() -> None:
    # Two tokens at full strength, then four more: the first of them still full, each further one a quarter less.
    changes = {"token_repetition_range": 2, "token_repetition_decay": 4}
    history = [0, 1, 2, 3, 4, 5, 6]
    assert penalized([0.0] * 8, history, token_presence_penalty=1.0, **changes) == [
        0,
        -0.25,
        -0.5,
        -0.75,
        -1,
        -1,
        -1,
        0,
    ]
    assert penalized([3.0] * 8, history, token_repetition_penalty=2.0, **changes) == [
        3, 2.4, 2.0, round(3 / 1.75, 5), 1.5, 1.5, 1.5, 3,
    ]  # fmt: skip


def test_nearest_occurrence_decides_and_each_counts_for_frequency() -> None:
    changes = {"token_repetition_range": 1, "token_repetition_decay": 4}
    history = [7, 0, 1, 2, 0]  # token 0: at distance 0, full; at distance 3, half
    assert penalized([0.0] * 8, history, token_presence_penalty=1.0, **changes)[0] == -1
    assert penalized([0.0] * 8, history, token_frequency_penalty=1.0, **changes)[0] == -1.5


def test_tokens_beyond_the_logits_are_not_penalized() -> None:
    assert penalized([1.0, 1.0], [5, 0, 9], token_repetition_penalty=2.0) == [0.5, 1.0]


# --- DRY


def dry(history: list[int], breakers: Sequence[int] = (), size: int = 40, **changes: Any) -> dict[int, float]:
    """The penalties, those that are not 0."""
    logits = np.zeros(size, dtype=np.float32)
    apply_dry(logits, np.array(history), token_mask(breakers, size), plain(dry_multiplier=1.0, dry_base=2.0, **changes))
    return {i: float(x) for i, x in enumerate(logits) if x}


@pytest.mark.parametrize(
    ("history", "penalties"),
    [
        ([1, 2, 3, 9, 2], {}),  # a match of 1 is allowed
        ([1, 2, 3, 9, 1, 2], {3: -1.0}),  # 2 ** (2 - 2)
        ([8, 1, 2, 3, 9, 8, 1, 2], {3: -2.0}),  # 2 ** (3 - 2)
        ([7, 8, 1, 2, 3, 9, 7, 8, 1, 2], {3: -4.0}),
        ([1, 2, 3, 1, 2, 3, 9, 1, 2], {3: -2.0}),  # twice a match of 2
        ([1, 2, 3, 1, 2, 4, 9, 1, 2], {3: -1.0, 4: -1.0}),
        ([8, 1, 2, 3, 1, 2, 4, 9, 8, 1, 2], {3: -2.0}),  # the longest match alone
        ([5, 5, 5, 5], {5: -2.0}),  # a run: "5 5 5" came before
        ([1, 2], {}),
        ([1], {}),
        ([], {}),
    ],
)
def test_dry_penalizes_what_would_extend_a_repeat(history: list[int], penalties: dict[int, float]) -> None:
    assert dry(history) == penalties


def test_dry_allowed_length_is_free() -> None:
    history = [7, 8, 1, 2, 3, 9, 7, 8, 1, 2]
    assert dry(history, dry_allowed_length=4) == {3: -1.0}
    assert dry(history, dry_allowed_length=5) == {}


def test_dry_matches_end_at_breakers_and_breakers_are_free() -> None:
    assert dry([8, 1, 2, 3, 9, 8, 1, 2], breakers=[8]) == {3: -1.0}
    assert dry([8, 1, 2, 3, 9, 8, 1, 2], breakers=[2]) == {}
    assert dry([8, 1, 2, 3, 9, 8, 1, 2], breakers=[3]) == {}


def test_dry_looks_back_as_far_as_its_range() -> None:
    history = [1, 2, 3, *range(10, 30), 1, 2]  # "1 2 3" begins 24 tokens before the last
    assert dry(history, dry_range=24) == {3: -1.0}
    assert dry(history, dry_range=23) == {}


def test_dry_counts_no_more_than_max_ngram() -> None:
    history = [*range(10), 30, *range(9)]
    assert dry(history, dry_max_ngram=20) == {9: -(2.0**7)}
    assert dry(history, dry_max_ngram=5) == {9: -(2.0**3)}


def test_dry_treats_ids_beyond_the_vocabulary_as_breakers() -> None:
    assert dry([50, 1, 2, 3, 9, 50, 1, 2]) == {3: -1.0}
    assert dry([1, 2, 50, 9, 1, 2]) == {}


def test_dry_penalty_stays_finite() -> None:
    history = [*range(39), *range(38)]
    logits = np.zeros(40, dtype=np.float32)
    apply_dry(
        logits, np.array(history), token_mask((), 40), plain(dry_multiplier=9.0, dry_base=100.0, dry_max_ngram=500)
    )
    assert np.isfinite(logits).all()
    assert logits.argmin() == 38


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 4), st.integers(2, 8), st.sampled_from([0, 9, 15]))
@settings(max_examples=300, deadline=None)
def test_dry_agrees_with_a_search_by_slices(history: list[int], allowed: int, longest: int, reach: int) -> None:
    n, breakers = len(history), {0}
    first = max(0, n - 1 - reach) if reach else 0
    expected: Counter[int] = Counter()
    for length in range(min(longest, n - 1), allowed - 1, -1):
        end = history[n - length :]
        starts = [i for i in range(first, n - length) if history[i : i + length] == end]
        if starts and not breakers & set(end):
            expected.update(history[i + length] for i in starts if history[i + length] not in breakers)
            break
    else:
        length = 0
    penalties = dry(history, breakers=[0], dry_allowed_length=allowed, dry_max_ngram=longest, dry_range=reach)
    assert penalties == {token: -(2.0 ** (length - allowed)) * count for token, count in expected.items()}


def test_default_breakers_and_protected_tokens() -> None:
    pieces = [
        "<s>",
        "a",
        " the.",
        "x,",
        "!",
        "?",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        ">",
        "\n\n",
        "\t",
        '"',
        "\\",
        "'",
        ":",
        "",
    ]
    assert dry_breakers(pieces, {0, 25}) == {0, *range(2, 16), 25}
    assert xtc_protected(pieces, {0, 25}) == {0, 13, 25}


def test_breakers_are_asked_for_only_when_needed() -> None:
    def never() -> frozenset[int]:
        raise AssertionError

    Sampler(plain(), 0, vocab_size=8, breakers=never, protected=never)


# --- mirostat


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.5])
def test_mirostat_holds_the_surprise_at_tau(tau: float) -> None:
    logits = some_logits(8, 500)  # of more than 3.5 bits of entropy
    sampler = make(500, mirostat=True, mirostat_tau=tau, mirostat_eta=0.1)
    surprise = []
    for _ in range(1500):
        probs = dense(sampler, logits)
        surprise.append(-math.log2(probs[sampler.sample(logits, ())]))
    assert np.mean(surprise[500:]) == pytest.approx(tau, abs=0.05)


# --- drawing


def test_one_random_number_a_token_laid_against_the_cumulated_probabilities() -> None:
    logits = some_logits(9, 64)
    sampler, points = make(64, seed=123), random.Random(123)
    cumulated = np.cumsum(softmax(logits))
    expected = [int(np.searchsorted(cumulated, points.random() * 0.9998)) for _ in range(200)]
    assert [sampler.sample(logits, ()) for _ in range(200)] == expected


@pytest.mark.parametrize(("point", "index"), [(0.0, 1), (0.2, 1), (0.26, 2), (0.9999, 3)])
def test_a_draw_never_picks_what_has_no_probability(point: float, index: int) -> None:
    assert draw(np.array([0.0, 0.25, 0.5, 0.2499, 0.0], dtype=np.float32), point) == index


def chi_square(tokens: list[int], probs: np.ndarray) -> float:
    counts = np.bincount(tokens, minlength=len(probs))
    assert not counts[probs == 0].any()
    support = probs > 0
    expected = probs[support] * len(tokens)
    return float(((counts[support] - expected) ** 2 / expected).sum())


def test_frequencies_match_the_distribution() -> None:
    logits = some_logits(10, 1000)
    sampler = make(1000, seed=1, top_k=11, temperature=1.5)
    tokens = [sampler.sample(logits, ()) for _ in range(20_000)]
    assert chi_square(tokens, by_top_k(softmax(logits / 1.5), 11)) < 29.59  # 0.1 % point for 10 degrees of freedom


@pytest.mark.parametrize("skew", [-0.8, 0.5])
def test_skew_raises_the_cumulated_probabilities_to_a_power(skew: float) -> None:
    logits = of(0.1, 0.5, 0.15, 0.25)
    sampler = make(4, seed=2, skew=skew)
    cumulated = np.array([0.0, 0.5, 0.75, 0.9, 1.0]) ** math.exp(skew)  # likeliest first: tokens 1, 3, 2, 0
    expected = np.diff(cumulated)[[3, 0, 2, 1]]
    tokens = [sampler.sample(logits, ()) for _ in range(20_000)]
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
@settings(max_examples=250, deadline=None)
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


def test_another_seed_gives_other_tokens() -> None:
    logits = some_logits(11, 100)
    first, second = (make(100, seed=seed) for seed in (1, 2))
    assert [first.sample(logits, ()) for _ in range(50)] != [second.sample(logits, ()) for _ in range(50)]


@pytest.mark.parametrize(
    "changes", [{"top_k": 1}, {"temperature": 0.0}, {"temperature": 0.009, "temperature_last": True}]
)
def test_greedy_takes_the_likeliest_whatever_the_seed(changes: dict[str, Any]) -> None:
    for seed in range(20):
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


def test_banned_tokens_and_those_beyond_the_vocabulary_are_never_chosen() -> None:
    logits = np.array([1.0, 9.0, 1.0, 1.0, 50.0, np.nan], dtype=np.float32)
    for changes in ({}, {"temperature": 0.0}, {"top_k": 3}, {"smoothing_factor": 1.0}):
        sampler = Sampler(plain(**changes), 0, vocab_size=4, banned=[1, 3, 77])
        assert {sampler.sample(logits, ()) for _ in range(50)} <= {0, 2}


def test_something_must_be_left_to_choose() -> None:
    with pytest.raises(ValueError, match="banned"):
        Sampler(plain(), 0, vocab_size=2, banned=[0, 1])


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 2}, {"token_repetition_penalty": 1.5}])
@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, "NaN: 1 of 4"), (math.inf, "infinite"), (-math.inf, "infinite")]
)
def test_logits_that_are_no_numbers_are_refused(changes: dict[str, Any], value: float, words: str) -> None:
    logits = np.array([1.0, 2.0, value, 0.0], dtype=np.float32)
    with pytest.raises(EngineError, match=words) as error:
        make(4, **changes).sample(logits, [0])
    assert error.value.hint


@pytest.mark.parametrize("shape", [(0,), (1, 4)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        make(4).sample(np.zeros(shape, dtype=np.float32), ())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logits_are_left_as_they_were(dtype: type[np.floating[Any]]) -> None:
    logits = some_logits(12, 64).astype(dtype)
    before = logits.copy()
    Sampler(Sampling(dry_multiplier=1.0), 0, vocab_size=64, banned=[3]).sample(logits, [1, 2, 1, 2])
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


def test_min_p_fills_the_places_of_dropped_tokens_from_the_end() -> None:
    """exllamav2's partition; a random number is laid against this order."""
    ids, _ = make(6, min_p=0.5).distribution(of(0.3, 0.02, 0.02, 0.27, 0.37, 0.02), ())
    assert ids.tolist() == [0, 4, 3]


def test_equal_logits_at_the_end_of_top_k() -> None:
    """exllamav2's heap: it fills with the first k, a higher logit pushes out the lowest of the lowest id."""
    ids, _ = make(6, top_k=3).distribution(np.array([1, 1, 1, 2, 1, 0], dtype=np.float32), ())
    assert ids.tolist() == [3, 2, 1]
