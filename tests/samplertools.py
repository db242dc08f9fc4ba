"""Helpers for the sampler tests: neutral settings, logits, distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.sampling import Sampling

SEEDS_AND_SIZES = [(0, 5), (1, 32), (2, 300), (3, 4096), (4, 4096)]
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 0.0, "token_repetition_penalty": 1.0}


# Settings that the GPU's sampler knows.
CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 20},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_k": 40, "top_p": 0.8, "temperature": 0.7},
    {"top_a": 0.2},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical": 0.2},
    {"typical": 0.9},
    {"typical": 0.5, "min_p": 0.01, "temperature": 0.8, "temperature_last": True},
    {"mirostat": True, "mirostat_tau": 2.0},
    {"mirostat": True, "mirostat_tau": 0.1},
    {"min_temp": 0.3, "max_temp": 1.8, "temp_exponent": 0.7},
    {"temperature": 1.5, "temperature_last": True, "top_p": 0.9},
    {"xtc_probability": 0.5, "xtc_threshold": 0.03},
    {"xtc_probability": 1.0, "xtc_threshold": 0.02, "min_p": 0.01},
    {"smoothing_factor": 0.2, "temperature": 1.3},
    {"token_repetition_penalty": 1.3},
    {"token_repetition_penalty": 1.3, "temperature": 0.0},
    {"token_repetition_penalty": 0.8, "token_presence_penalty": 0.4, "token_repetition_range": 9},
    {"token_repetition_penalty": 1.2, "token_repetition_range": 5, "token_repetition_decay": 10},
    {"token_frequency_penalty": 0.7},
    {"token_frequency_penalty": -0.3, "token_repetition_range": 6, "token_repetition_decay": 20},
    {"dry_multiplier": 0.8},
    {"dry_multiplier": 0.8, "dry_range": 25, "dry_allowed_length": 1},
    {"temperature": 0.85, "top_k": 50, "top_p": 0.8, "token_repetition_penalty": 1.05},
]


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


def by_top_k(probs: np.ndarray, k: int) -> np.ndarray:
    return kept(probs, ranked(probs)[:k])
