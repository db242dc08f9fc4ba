"""Each filter of the sampler against its definition, in float64 from its paper, and against transformers' own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from samplertools import SEEDS_AND_SIZES, by_top_k, dense, kept, make, of, plain, ranked, softmax, some_logits

from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.sampling import FIELDS, Sampling

# --- each filter against its definition


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


# --- values that turn a setting off

OFF = [(name, value) for name, info in FIELDS.items() for value in info.off]


@pytest.mark.parametrize(("name", "value"), OFF)
def test_a_value_that_is_off_leaves_the_models_distribution(name: str, value: float) -> None:
    logits, history = some_logits(1, 60), [3, 3, 7]
    np.testing.assert_allclose(dense(make(60, **{name: value}), logits, history), softmax(logits), rtol=1e-5)
    assert re.search(rf"\b{value:g}\b.* (is|are) off\.", FIELDS[name].help)


def test_every_filter_says_what_turns_it_off() -> None:
    """The rest is a limit, an amount, or a part of a filter that another setting turns on."""
    without = {
        name for name, info in FIELDS.items() if not info.off and not isinstance(getattr(Sampling(), name), bool)
    }
    parts = {"min_temp", "max_temp", "temp_exponent", "mirostat_tau", "mirostat_eta", "xtc_threshold"}
    parts |= {name for name in FIELDS if name.startswith("dry_") and name != "dry_multiplier"}
    assert without == {"temperature", "token_repetition_range"} | parts
