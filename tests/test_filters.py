"""Each sampler filter against its definition, computed in float64, and against transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from samplertools import SEEDS_AND_SIZES, dense, kept, make, of, plain, ranked, softmax, some_logits

from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.sampling import FIELDS, Sampling

# --- each filter against its definition


def by_top_a(probs: np.ndarray, factor: float) -> np.ndarray:
    return kept(probs, probs >= factor * probs.max() ** 2)


def by_tail_free(probs: np.ndarray, share: float) -> np.ndarray:
    order = ranked(probs)
    p = probs[order]
    curvature = [abs((p[i + 2] - p[i + 1]) - (p[i + 1] - p[i])) for i in range(len(p) - 2)]
    total, cumulative, n = sum(curvature), 0.0, 1
    for value in curvature:
        cumulative += value / total
        n += cumulative <= share
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


DEFINITIONS: list[tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = [
    ({"top_a": 0.2}, lambda p: by_top_a(p, 0.2)),
    ({"top_a": 1.0}, lambda p: by_top_a(p, 1.0)),
    ({"tfs": 0.6}, lambda p: by_tail_free(p, 0.6)),
    ({"tfs": 0.95}, lambda p: by_tail_free(p, 0.95)),
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


def test_smoothing_squares_the_distance_to_the_highest_logit() -> None:
    logits = some_logits(7, 300)
    expected = softmax(-0.2 * (logits - logits.max()).astype(np.float64) ** 2 / 1.5)
    np.testing.assert_allclose(
        dense(make(300, smoothing_factor=0.2, temperature=1.5), logits), expected, rtol=1e-4, atol=1e-12
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
    ("changes", "chain"),
    [
        ({"temperature": 0.01}, {"TemperatureLogitsWarper": 0.01}),
        ({"temperature": 100.0}, {"TemperatureLogitsWarper": 100.0}),
        ({"top_k": 2}, {"TopKLogitsWarper": 2}),
        ({"top_k": 40}, {"TopKLogitsWarper": 40}),
        ({"top_p": 0.3}, {"TopPLogitsWarper": 0.3}),
        ({"top_p": 0.99}, {"TopPLogitsWarper": 0.99}),
        ({"min_p": 0.02}, {"MinPLogitsWarper": 0.02}),
        ({"min_p": 1.0}, {"MinPLogitsWarper": 1.0}),
        ({"typical": 0.2}, {"TypicalLogitsWarper": 0.2}),
        ({"typical": 0.9}, {"TypicalLogitsWarper": 0.9}),
        ({"token_repetition_penalty": 1.3}, {"RepetitionPenaltyLogitsProcessor": 1.3}),
        # The notebook's.
        (
            {"token_repetition_penalty": 1.05, "temperature": 0.85, "top_k": 50, "top_p": 0.8},
            {
                "RepetitionPenaltyLogitsProcessor": 1.05,
                "TemperatureLogitsWarper": 0.85,
                "TopKLogitsWarper": 50,
                "TopPLogitsWarper": 0.8,
            },
        ),
        (
            {"top_k": 60, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3, "temperature_last": True},
            {
                "TopKLogitsWarper": 60,
                "TopPLogitsWarper": 0.95,
                "MinPLogitsWarper": 0.01,
                "TemperatureLogitsWarper": 1.3,
            },
        ),
    ],
)
def test_same_distribution_as_transformers(
    changes: dict[str, Any], chain: dict[str, float], seed: int, size: int
) -> None:
    import torch
    from transformers.generation import logits_process

    logits = some_logits(seed, size)
    history = np.random.default_rng(seed).integers(0, size, 40).tolist()
    scores = torch.tensor(logits)[None]
    for name, argument in chain.items():
        scores = getattr(logits_process, name)(argument)(torch.tensor([history]), scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    np.testing.assert_allclose(dense(make(size, **changes), logits, history), expected, rtol=1e-3, atol=1e-7)


# --- values that turn a setting off


def off(name: str) -> list[float]:
    """The values that a field's help calls off: "…; 0 and 1 are off."."""
    match = re.search(r"; ([\d.]+)(?: and ([\d.]+))? (?:is|are) off\.$", FIELDS[name].help)
    return [float(value) for value in match.groups() if value] if match else []


OFF = [(name, value) for name in FIELDS for value in off(name)]


@pytest.mark.parametrize(("name", "value"), OFF)
def test_a_value_that_is_off_leaves_the_models_distribution(name: str, value: float) -> None:
    logits, history = some_logits(1, 60), [3, 3, 7]
    np.testing.assert_allclose(dense(make(60, **{name: value}), logits, history), softmax(logits), rtol=1e-5)


def test_every_filter_says_what_turns_it_off() -> None:
    """The rest is a limit, an amount, or a part of a filter that another setting turns on."""
    without = {name for name in FIELDS if not off(name) and not isinstance(getattr(Sampling(), name), bool)}
    parts = {"min_temp", "max_temp", "temp_exponent", "mirostat_tau", "mirostat_eta", "xtc_threshold"}
    parts |= {name for name in FIELDS if name.startswith("dry_") and name != "dry_multiplier"}
    assert without == {"temperature", "token_repetition_range"} | parts
