"""Penalties and DRY, against hand-computed examples and a naive search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samplertools import plain

from exl_cli.engines.sampling.dry import apply_dry, dry_breakers, token_mask
from exl_cli.engines.sampling.filters import penalize
from exl_cli.engines.sampling.sampler import Sampler, xtc_protected

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


def test_dry_matches_end_at_breakers_and_breakers_are_free() -> None:
    assert dry([8, 1, 2, 3, 9, 8, 1, 2], breakers=[8]) == {3: -1.0}
    assert dry([8, 1, 2, 3, 9, 8, 1, 2], breakers=[2]) == {}
    assert dry([8, 1, 2, 3, 9, 8, 1, 2], breakers=[3]) == {}


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
@settings(max_examples=120, deadline=None)
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
    pieces = ["<s>", "a", " the.", "x,", *"!?[](){}>", "\n\n", "\t", '"', "\\", "'", ":", ""]
    assert dry_breakers(pieces, {0, 25}) == {0, *range(2, 16), 25}
    assert xtc_protected(pieces, {0, 25}) == {0, 13, 25}


def test_breakers_are_asked_for_only_when_needed() -> None:
    def never() -> frozenset[int]:
        raise AssertionError

    Sampler(plain(), 0, vocab_size=8, breakers=never, protected=never)
