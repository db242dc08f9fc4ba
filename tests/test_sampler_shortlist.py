"""The sampler on vocabularies so large that it looks at the highest logits only: that must make no difference.

So, too, top-p, which looks at candidates that are few and in order one by one, and of many at the likeliest first.
"""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samplertools import make

from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.sampling import Sampling

SIZES = (2047, 2048, 4096, 5000, 32000)
KINDS = (
    "normal",
    "float16",
    "quarters",
    "equal",
    "ascending",
    "descending",
    "falling quarters",
    "negative",
    "few positive",
    "far apart",
)


def logits_of(kind: str, seed: int, size: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0.0, 3.0, size).astype(np.float32)
    match kind:
        case "float16":
            logits = logits.astype(np.float16).astype(np.float32)
        case "quarters":
            logits = np.round(logits * 4) / 4
        case "equal":
            logits[:] = 1.5
        case "ascending":
            logits.sort()
        case "descending":
            logits = -np.sort(-logits)
        case "falling quarters":
            logits = -np.sort(np.round(-logits * 4) / 4)
        case "negative":
            logits -= 50
        case "few positive":
            logits -= 6
        case "far apart":
            logits *= 1000
    return logits


def by_heap(logits: np.ndarray, k: int) -> list[int]:
    """exllamav2's top-k: a heap of the first k, out of which a higher logit pushes the lowest one of the lowest id."""
    pairs = [(value, id_) for id_, value in enumerate(logits.tolist())]
    heap = pairs[:k]
    heapq.heapify(heap)
    for pair in pairs[k:]:
        if pair[0] > heap[0][0]:
            heapq.heapreplace(heap, pair)
    return [id_ for _, id_ in sorted(heap, reverse=True)]


@given(st.sampled_from(KINDS), st.integers(0, 99), st.sampled_from(SIZES), st.sampled_from([2, 3, 50, 400, 513, 1500]))
@settings(max_examples=60, deadline=None)
def test_top_k_is_that_of_a_heap(kind: str, seed: int, size: int, k: int) -> None:
    logits = logits_of(kind, seed, size)
    assert make(size, top_k=k).distribution(logits, ())[0].tolist() == by_heap(logits, k)


@given(
    st.sampled_from(["normal", "quarters", "descending", "falling quarters"]),
    st.integers(0, 2**32),
    st.sampled_from([0, 20, 50]),
    st.floats(0.5, 0.999),
)
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_the_likeliest_and_of_equals_the_highest_ids(kind: str, seed: int, k: int, mass: float) -> None:
    """Whether the candidates come in that order, as after top-k, or not."""
    logits = logits_of(kind, seed, 60)
    ids, probs = make(60, top_k=k).distribution(logits, ())
    order = sorted(range(len(ids)), key=lambda place: (probs[place], ids[place]), reverse=True)
    expected, total = [], 0.0
    for place in order:
        if total < mass and probs[place] >= 0.5 * (1 - mass) / len(ids):
            expected.append(int(ids[place]))
            total += float(probs[place])
    kept, shares = make(60, top_k=k, top_p=mass).distribution(logits, ())
    assert kept.tolist() == expected
    assert shares.sum() == pytest.approx(1.0, abs=1e-5)
    assert (np.diff(shares) <= 0).all()


@given(
    st.sampled_from(KINDS),
    st.integers(0, 99),
    st.sampled_from([*SIZES, 40000]),
    st.sampled_from([0, 3000]),
    st.floats(0.1, 6.0),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 0.999999]),
)
@settings(max_examples=75, deadline=None)
def test_top_p_of_a_large_vocabulary_is_the_beginning_of_all_in_order(
    kind: str, seed: int, size: int, k: int, temperature: float, mass: float
) -> None:
    logits = logits_of(kind, seed, size)
    ids, probs = make(size, top_k=k, temperature=temperature).distribution(logits, ())
    order = np.lexsort((ids, probs))[::-1]
    sums = probs[order].astype(np.float64).cumsum()
    count = int((sums < mass).sum()) + 1
    kept, shares = make(size, top_k=k, temperature=temperature, top_p=mass).distribution(logits, ())
    # Those that together have less than what may be left out never take part: rounding may leave the sum short of it.
    assert kept.tolist() == ids[order][: min(count, len(kept))].tolist()
    assert len(kept) == count or probs[order][len(kept)] <= 0.5 * (1 - mass) / len(ids)
    np.testing.assert_allclose(shares, probs[order][: len(kept)] / sums[len(kept) - 1], rtol=1e-4)


@pytest.mark.parametrize(("mass", "kept"), [(0.5, [0]), (0.75, [0, 1]), (0.76, [0, 1, 2])])
def test_top_p_stops_at_its_mass_exactly(mass: float, kept: list[int]) -> None:
    logits = np.log(np.array([8, 4, 2, 1, 1], dtype=np.float32))
    assert make(5).distribution(logits, ())[1].tolist() == [0.5, 0.25, 0.125, 0.0625, 0.0625]
    assert make(5, top_p=mass).distribution(logits, ())[0].tolist() == kept


# Grow by so many likely tokens and so many of any kind, or keep only so many.
CHANGES = st.one_of(
    st.tuples(st.integers(10, 120), st.integers(0, 60)), st.integers(0, 200), st.tuples(st.just(0), st.just(1))
)


@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**32),
    st.sampled_from(SIZES[1:]),
    st.lists(CHANGES, min_size=1, max_size=6),
    st.fixed_dictionaries(
        {
            "top_k": st.sampled_from([2, 50, 400]),
            "token_repetition_penalty": st.sampled_from([1.0, 1.05, 1.3, 30.0]),
            "token_presence_penalty": st.sampled_from([0.0, 0.5, 20.0]),
        },
        optional={
            "temperature": st.floats(0.02, 3.0),
            "temperature_last": st.booleans(),
            "top_p": st.floats(0.0, 1.0),
            "min_p": st.floats(0.0, 0.3),
            "smoothing_factor": st.floats(0.0, 1.0),
        },
    ),
)
@settings(max_examples=60, deadline=None)
def test_a_range_beyond_the_history_equals_no_range(
    kind: str, seed: int, size: int, changes: list[Any], options: dict[str, Any]
) -> None:
    """A reach as long as the history is another way through the sampler, by the whole vocabulary."""
    rng = np.random.default_rng(seed)
    sampler, history = Sampler(Sampling(**options), seed, vocab_size=size), [0]
    for number, change in enumerate(changes):
        logits = logits_of(kind, seed % 1000 + number, size)
        if isinstance(change, int):
            del history[change:]
        else:
            likely, any_ = change
            history += rng.permutation(logits.argsort()[-2 * likely - 1 :])[:likely].tolist()
            history += rng.integers(0, size + 9, any_).tolist()
        other = Sampler(Sampling(**options, token_repetition_range=10**6), seed, vocab_size=size)
        (ids, probs), (other_ids, other_probs) = (one.distribution(logits, history) for one in (sampler, other))
        assert ids.tolist() == other_ids.tolist()
        assert probs.tobytes() == other_probs.tobytes()


@pytest.mark.parametrize("raising", [{"token_presence_penalty": -50.0}, {"token_repetition_penalty": 0.01}])
def test_a_penalty_that_raises_reaches_tokens_far_down(raising: dict[str, Any]) -> None:
    logits = np.arange(4096, dtype=np.float32) / 100
    ids, _ = make(4096, top_k=2, **raising).distribution(logits, [2000])
    assert ids.tolist() == [2000, 4095]


def test_padding_beyond_the_vocabulary_takes_no_part() -> None:
    logits = logits_of("normal", 1, 4096)
    logits[4090:] = [math.nan, math.inf, 1e30, 1e30, 1e30, -math.inf]
    ids, _ = make(4090, top_k=50).distribution(logits, ())
    assert ids.tolist() == by_heap(logits[:4090], 50)
