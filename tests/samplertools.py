"""What the tests of the sampler share: settings with everything off, logits, and distributions written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exl_cli.engines.sampling.sampler import Sampler
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


def by_top_k(probs: np.ndarray, k: int) -> np.ndarray:
    return kept(probs, ranked(probs)[:k])
