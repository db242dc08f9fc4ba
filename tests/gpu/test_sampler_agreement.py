"""Our sampler against exllamav2's own: the same logits and history give the same distribution.

Of theirs only the token at a point of the cumulative probabilities can be seen, so that token is looked up in ours.
Left out is what `exl_cli.engines.sampling.sampler` lists as wrong there. Top-p is compared all the same: a nucleus of
n tokens is what exllamav2 keeps for top-k n. XTC is compared where the candidates are sorted: there exllamav2 has it
right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exl_cli.engines.sampling.dry import dry_breakers
from exl_cli.engines.sampling.sampler import Sampler, xtc_protected
from exl_cli.sampling import Sampling

pytestmark = pytest.mark.gpu

SIZES = (4096, 32000)
CASES = 100  # generations for each family of settings and each vocabulary
TOKENS = 3  # drawn one after the other in each, for what is remembered between tokens
ALLOWED = 0.005  # share of the draws that may differ: probabilities are summed in another order there
RESERVED = frozenset(range(8))  # DRY's breakers and XTC's protected tokens

PLAIN: dict[str, Any] = {"temperature": 0.8, "top_k": 0, "top_p": 0.0, "token_repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def upstream() -> SimpleNamespace:
    """torch and the three classes of exllamav2 that are compared with."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    exllamav2 = pytest.importorskip("exllamav2", exc_type=ImportError)
    from exllamav2.generator.sampler import ExLlamaV2Sampler

    return SimpleNamespace(
        torch=torch,
        sampler=ExLlamaV2Sampler,
        config=exllamav2.ExLlamaV2Config,
        tokenizer=exllamav2.ExLlamaV2Tokenizer,
    )


@dataclass(frozen=True)
class SimpleTokenizer:
    """As much of a tokenizer as exllamav2's sampler asks for."""

    actual_vocab_size: int

    def get_vocab_size(self) -> int:
        return self.actual_vocab_size


def their_settings(upstream: SimpleNamespace, sampling: Sampling, **changes: Any) -> Any:
    return upstream.sampler.Settings(
        **{**sampling.to_dict(), **changes},
        dry_sequence_breakers=set(RESERVED),
        xtc_ignore_tokens=RESERVED,
    )


def their_token(
    upstream: SimpleNamespace, settings: Any, logits: np.ndarray, history: list[int], point: float, size: int
) -> int:
    tensor = upstream.torch.tensor(logits, dtype=upstream.torch.float).view(1, 1, -1)  # a copy: it writes into it
    ids = upstream.torch.tensor([history], dtype=upstream.torch.long)
    return int(upstream.sampler.sample(tensor, settings, ids, point, SimpleTokenizer(size))[0].item())


def our_token(sampler: Sampler, logits: np.ndarray, history: list[int], point: float) -> int:
    ids, probs = sampler.distribution(logits, history)
    if (sampler.settings.min_p or sampler.settings.top_a) and not sampler.settings.top_k:
        # exllamav2 drops tokens in place: the last kept one that has not moved yet takes the place of the dropped one.
        is_kept = np.isin(np.arange(sampler.vocab_size), ids)
        places = np.arange(len(ids))
        places[~is_kept[: len(ids)]] = np.flatnonzero(is_kept[len(ids) :])[::-1] + len(ids)
        by_id = np.argsort(ids)
        order = by_id[np.searchsorted(ids[by_id], places)]
        ids, probs = ids[order], probs[order]
    sums = np.cumsum(probs, dtype=np.float64)
    # exllamav2 scales the random number so that rounded sums cannot stay below it.
    point = 0.9998 * point ** math.exp(-sampler.settings.skew) * sums[-1]
    chosen = min(int(np.searchsorted(sums, point, side="right")), len(ids) - 1)
    sampler.observe(float(probs[chosen]))
    return int(ids[chosen])


def new_logits(rng: np.random.Generator, size: int, history: list[int]) -> np.ndarray:
    """Falling with the rank like a language model's, recent tokens among the highest so that penalties matter.
    Flatter ones would make neighbours in a vocabulary of 32,000 trade places by rounding alone."""
    logits = -2.0 * np.log(rng.permutation(size) + 1.0) + rng.normal(0.0, 0.5, size)
    recent = history[-30:]
    logits[recent] = rng.normal(-1.0, 1.0, len(recent))
    logits[recent[-1]] = -30.0  # no token twice in a row: their DRY forgets those
    return logits.astype(np.float32)


def plain_history(rng: np.random.Generator, size: int) -> list[int]:
    return rng.integers(len(RESERVED), size, 60).tolist()


def repeating_history(rng: np.random.Generator, size: int) -> list[int]:
    """Few different tokens, breakers among them, the end a copy of an earlier part; no token twice in a row and no
    repeat as long as dry_max_ngram, where exllamav2 applies no penalty."""
    words = [0, 1, *rng.integers(len(RESERVED), size, 12).tolist()]
    history: list[int] = []
    while len(history) < 90:
        word = int(rng.choice(words))
        if not history or word != history[-1]:
            history.append(word)
    start, length = int(rng.integers(0, 60)), int(rng.integers(2, 10))
    copied = history[start : start + length]
    return history + copied if copied[0] != history[-1] else history + copied[1:]


def tied(rng: np.random.Generator, size: int, history: list[int]) -> np.ndarray:
    """Logits with many equal ones, as float16 makes them."""
    return np.round(new_logits(rng, size, history) * 4) / 4


@dataclass(frozen=True)
class Family:
    """A kind of settings: how to make some, and on which logits and history."""

    make: Callable[[np.random.Generator], dict[str, Any]]
    history: Callable[[np.random.Generator, int], list[int]] = plain_history
    logits: Callable[[np.random.Generator, int, list[int]], np.ndarray] = new_logits
    padding: int = 0


FAMILIES = {
    "temperature": Family(lambda r: {"temperature": r.uniform(0.1, 1.2)}),
    "padded": Family(lambda r: {"temperature": r.uniform(0.6, 1.2)}, padding=64),
    "greedy": Family(lambda r: {"temperature": 0.0, "token_repetition_penalty": r.uniform(1.0, 2.0)}),
    "top_k": Family(lambda r: {"top_k": int(r.integers(1, 400))}),
    "top_k_tied": Family(lambda r: {"top_k": int(r.integers(2, 80))}, logits=tied),
    "min_p": Family(lambda r: {"min_p": r.uniform(0.02, 0.5), "temperature": r.uniform(0.5, 2.0)}),
    "min_p_of_top_k": Family(lambda r: {"min_p": r.uniform(0.1, 0.5), "top_k": 200}),
    "top_a": Family(lambda r: {"top_a": r.uniform(0.05, 0.9)}),
    "tfs": Family(lambda r: {"tfs": r.uniform(0.5, 0.99), "temperature": r.uniform(0.5, 1.2)}),
    "mirostat": Family(lambda r: {"mirostat": True, "mirostat_tau": r.uniform(1.0, 6.0), "mirostat_eta": 0.5}),
    "dynamic": Family(
        lambda r: {"min_temp": r.uniform(0.3, 0.8), "max_temp": r.uniform(1.0, 2.0), "temp_exponent": r.uniform(0.5, 2)}
    ),
    "temperature_last": Family(lambda r: {"temperature": r.uniform(0.5, 2.0), "temperature_last": True, "min_p": 0.1}),
    "smoothing": Family(lambda r: {"smoothing_factor": r.uniform(0.05, 0.5), "temperature": r.uniform(0.5, 1.5)}),
    "skew": Family(lambda r: {"skew": r.uniform(-2.0, 2.0), "top_k": int(r.integers(0, 2)) * 100}),
    "repetition": Family(lambda r: {"token_repetition_penalty": r.uniform(0.8, 2.0)}),
    "fading": Family(
        lambda r: {
            "token_repetition_penalty": r.uniform(1.0, 2.0),
            "token_repetition_range": int(r.integers(0, 30)),
            "token_repetition_decay": int(r.integers(0, 50)),
            "token_frequency_penalty": r.uniform(-1.0, 2.0),
            "token_presence_penalty": r.uniform(-1.0, 2.0),
        },
        history=repeating_history,
    ),
    "dry": Family(
        lambda r: {
            "dry_multiplier": r.uniform(0.5, 3.0),
            "dry_base": r.uniform(1.0, 2.0),
            "dry_allowed_length": int(r.integers(1, 4)),
            "dry_range": int(r.choice([0, 40, 70])),
        },
        history=repeating_history,
    ),
    "xtc_of_top_k": Family(
        lambda r: {"xtc_probability": r.uniform(0.1, 1.0), "xtc_threshold": r.uniform(0.02, 0.2), "top_k": 100}
    ),
    "many": Family(
        lambda r: {
            "temperature": r.uniform(0.6, 1.4),
            "top_k": 400,
            "min_p": 0.15,
            "tfs": 0.97,
            "mirostat": True,
            "mirostat_tau": 4.0,
            "min_temp": 0.7,
            "max_temp": 1.4,
            "skew": r.uniform(-0.5, 0.5),
            "token_repetition_penalty": r.uniform(1.0, 1.3),
            "dry_multiplier": 0.8,
        },
        history=repeating_history,
    ),
}


def draws(upstream: SimpleNamespace, family: Family, size: int) -> Iterator[tuple[bool, str]]:
    """For each draw whether the two agree, and the case in words."""
    for seed in range(CASES):
        rng = np.random.default_rng([size, seed])
        sampling = Sampling(**{**PLAIN, **family.make(rng)})
        history = family.history(rng, size)
        ours = Sampler(sampling, seed, vocab_size=size, breakers=lambda: RESERVED, protected=lambda: RESERVED)
        theirs, points = their_settings(upstream, sampling), random.Random(seed)
        for _ in range(TOKENS):
            logits, point = family.logits(rng, size + family.padding, history), points.random()
            token = our_token(ours, logits, history, point)
            expected = their_token(upstream, theirs, logits, history, point, size)
            words = f"vocabulary {size}, seed {seed}, draw {point!r} at {len(history)} tokens, {sampling.brief()}: "
            yield token == expected, words + f"ours {token}, theirs {expected}"
            history = [*history, expected]


@pytest.mark.parametrize("name", FAMILIES)
def test_same_tokens(upstream: SimpleNamespace, name: str) -> None:
    results = [result for size in SIZES for result in draws(upstream, FAMILIES[name], size)]
    different = [words for agree, words in results if not agree]
    assert len(different) <= ALLOWED * len(results), f"{len(different)} of {len(results)}:\n" + "\n".join(different)


def nucleus_size(logits: np.ndarray, history: list[int], sampling: Sampling) -> int:
    """How many tokens the notebook's settings leave, counted in float64 from their definitions."""
    scores = logits.astype(np.float64)
    for token in set(history):
        scores[token] *= sampling.token_repetition_penalty ** (-1 if scores[token] > 0 else 1)
    best = np.sort(scores / sampling.temperature)[::-1][: sampling.top_k]
    probs = np.exp(best - best[0])
    total, n = 0.0, 0
    while total < sampling.top_p and n < len(probs):
        total += probs[n] / probs.sum()
        n += 1
    return n


@pytest.mark.parametrize("size", SIZES)
def test_same_tokens_of_the_nucleus(upstream: SimpleNamespace, size: int) -> None:
    sampling, different = Sampling(), []
    for seed in range(300):
        rng = np.random.default_rng([size, seed])
        history = plain_history(rng, size)
        logits = new_logits(rng, size, history)
        theirs = their_settings(upstream, sampling, top_k=nucleus_size(logits, history, sampling), top_p=0.0)
        point = random.Random(seed).random()
        token = our_token(Sampler(sampling, seed, vocab_size=size), logits, history, point)
        expected = their_token(upstream, theirs, logits, history, point, size)
        if token != expected:
            different.append(f"seed {seed}, top_k {theirs.top_k}: ours {token}, theirs {expected}")
    assert len(different) <= ALLOWED * 300, "\n".join(different)


def test_their_top_p_still_drops_the_second_token(upstream: SimpleNamespace) -> None:
    """Why top-p cannot be compared directly; were this to fail, it could."""
    logits = np.full(32, -100.0, dtype=np.float32)
    logits[:4] = [math.log(p) for p in (0.5, 0.35, 0.1, 0.05)]
    sampling = Sampling(**{**PLAIN, "temperature": 1.0, "top_p": 0.8})
    points = [(i + 0.5) / 200 for i in range(200)]
    drawn = {their_token(upstream, their_settings(upstream, sampling), logits, [1], point, 32) for point in points}
    assert drawn == {0, 2, 3}
    assert {Sampler(sampling, seed, vocab_size=32).sample(logits, [1]) for seed in range(200)} == {0, 1}


def test_same_breakers_and_protected_tokens(upstream: SimpleNamespace, exl2_dir: Path) -> None:
    tokenizer = upstream.tokenizer(upstream.config(str(exl2_dir)))
    pieces = tokenizer.get_id_to_piece_list(include_special_tokens=True)
    special = set(tokenizer.extended_id_to_piece)
    assert dry_breakers(pieces, special) == upstream.sampler.get_dry_default_sequence_breaker_tokens(tokenizer)
    assert xtc_protected(pieces, special) == upstream.sampler.get_default_xtc_mask_tokens(tokenizer)
