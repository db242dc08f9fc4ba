"""The steps from logits to the next token, one function each: penalties, softmax, filters, draw.

The docstring of `sampler` says where a step differs from exllamav2's, and why.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from exl_cli.engines.sampling.dry import BoolArray, FloatArray, IntArray
from exl_cli.sampling import Sampling

# Sorting drops tokens below this probability, here as in exllamav2: in a large vocabulary that is most of them.
_NEGLIGIBLE = 1e-8

# So many candidates are looked at one by one.
_FEW = 64

# Of an integer that holds two.
_HALF = np.uint64(32)
_LOWER = np.uint64(0xFFFFFFFF)

# So many are sorted at first where a nucleus is looked for.
_HEAD = 512

# Above so many logits a column the highest of each column are taken first; see `shortlist`.
_COLUMNS = 1024
_LEAST_ROWS = 4

# The logit of a token that must not be chosen, as exllamav2 has it: no temperature makes it likely.
_RULED_OUT = np.float32(-1e30)


class Candidates(NamedTuple):
    """The tokens that may come next.

    Attributes:
        ids: token ids, shape [n], n at least 1.
        probs: their probabilities, shape [n], of sum 1 up to rounding. Some may be 0: such a token is never drawn.
    """

    ids: IntArray
    probs: FloatArray


def penalize(logits: FloatArray, history: IntArray, settings: Sampling) -> None:
    """Repetition (Keskar et al. 2019, https://arxiv.org/abs/1909.05858), presence and frequency penalties, in place.

    A token is penalized by its nearest occurrence, for its frequency by each. Beyond `token_repetition_range` tokens
    back the penalties fade, by 1 / `token_repetition_decay` of themselves with each further token.
    """
    n, decay = len(history), settings.token_repetition_decay
    sustained = n if settings.token_repetition_range < 0 else settings.token_repetition_range
    tokens = history[max(0, n - sustained - decay) :]
    strength = np.ones(len(tokens), dtype=np.float32)
    if len(tokens) > sustained:
        beyond = np.arange(len(tokens) - 1 - sustained, 0, -1, dtype=np.float32)
        strength[: len(beyond)] -= beyond / decay
    inside = tokens < len(logits)
    tokens, strength = tokens[inside], strength[inside]
    factor = 1.0 + (settings.token_repetition_penalty - 1.0) * strength
    before = logits[tokens]
    after = np.where(before > 0, before / factor, before * factor) - settings.token_presence_penalty * strength
    logits[tokens] = after  # of a repeated index NumPy keeps the last value: that of the nearest occurrence
    if settings.token_frequency_penalty:
        np.subtract.at(logits, tokens, np.float32(settings.token_frequency_penalty) * strength)


def rule_out(logits: FloatArray, ids: IntArray) -> None:
    """Have tokens never chosen, in place. As in exllamav2 their logits stay finite, and all that follows applies."""
    logits[ids] = _RULED_OUT


def add_bias(logits: FloatArray, ids: IntArray, bias: FloatArray) -> None:
    """Add to the logits of tokens, in place; minus infinity rules a token out."""
    logits[ids] = np.maximum(logits[ids] + bias, _RULED_OUT)


def all_ruled_out(highest: np.float32) -> bool:
    """Whether no token is left, told from the highest logit."""
    return bool(highest < 0.1 * _RULED_OUT)


def softmax(logits: FloatArray, highest: np.float32, temperature: float, smoothing: float = 0.0) -> FloatArray:
    """Probabilities at a temperature. Smoothing (kalomaze's quadratic sampling) first squares each logit's distance
    to the highest and scales it."""
    scores = logits - highest
    if smoothing > 0:
        with np.errstate(over="ignore"):
            scores *= -scores * (smoothing / temperature)
    else:
        scores *= 1.0 / temperature
    np.exp(scores, out=scores)
    return _normalized(scores)


def lowered(values: FloatArray, bound: np.float32, seen: BoolArray, settings: Sampling) -> FloatArray:
    """What `penalize` makes of a few logits where it can only lower them, and all at full strength.

    Args:
        values: logits, shape [n].
        bound: none of them is lower.
        seen: which of them are of tokens in the history.
        settings: a repetition penalty of at least 1, a presence penalty of at least 0, no range, none for frequency.
    """
    factor = np.float32(1.0) + np.float32(settings.token_repetition_penalty - 1.0)
    after = values / factor
    if not bound > 0:
        # Divided where positive, else multiplied: with a factor of at least 1 that is the lower of the two.
        after = np.minimum(after, values * factor)
    if settings.token_presence_penalty:
        after -= np.float32(settings.token_presence_penalty)
    return np.where(seen, after, values)


def shortlist(logits: FloatArray, count: int) -> tuple[IntArray, np.float32]:
    """All logits from a bound on that at least `count` logits reach, and as a rule not many more.

    In a large vocabulary a logit is looked at twice, in passes without branches. The vocabulary is laid out in
    columns, and the highest of each column are as many different logits: the bound is the lowest of the `count` highest
    among those.

    Returns:
        Their ids, ascending; and the bound.
    """
    columns = _COLUMNS
    while columns < 4 * count:
        columns *= 2
    rows = len(logits) // columns
    if rows < _LEAST_ROWS:
        bound = np.partition(logits, -count)[-count]
    else:
        maxima = np.maximum.reduce(logits[: rows * columns].reshape(rows, columns), axis=0)
        maxima.partition(columns - count)
        bound = maxima[columns - count]
    return (logits >= bound).nonzero()[0], bound


def best(values: FloatArray, k: int) -> IntArray:
    """The places of the k highest logits among some of ascending ids, highest first and, among equals, the highest id.

    Logits computed in float16 are often equal. Among equals at the end of the list the choice is that of exllamav2's
    heap: the tied tokens among the first k ids that are high enough, from their end."""
    order = values.argsort(kind="stable")[::-1]
    if len(order) == k:
        return order
    lowest = values[order[k - 1]]
    if values[order[k]] != lowest:
        return order[:k]
    above = order[: np.count_nonzero(values > lowest)]
    enough = (values >= lowest).nonzero()[0][:k]
    tied = enough[values[enough] == lowest]
    return np.concatenate([above, tied[::-1][: k - len(above)]])


def top_k(logits: FloatArray, k: int) -> IntArray:
    """The ids of the k highest logits, highest first, k below their number. Equals: see `best`."""
    ids, _ = shortlist(logits, k)
    return ids[best(logits[ids], k)]


def top_p(candidates: Candidates, mass: float) -> Candidates:
    """Nucleus sampling: the fewest likeliest tokens whose probabilities sum to at least `mass`, likeliest first."""
    # All tokens below this bound together have less than what may be left out, so they need no sorting.
    least = 0.5 * (1.0 - mass) / len(candidates.probs)
    if len(candidates.probs) <= _FEW and (count := _sorted_nucleus(candidates.probs.tolist(), mass, least)):
        return _kept(candidates, slice(count))
    # Of a large vocabulary the likeliest are sorted first: as a rule they are enough.
    head = _HEAD
    while head <= len(candidates.probs) // _LEAST_ROWS:
        places, _ = shortlist(candidates.probs, head)
        sorted_ = _sorted(Candidates(candidates.ids[places], candidates.probs[places]))
        count = _reaching(sorted_.probs, mass)
        if count <= len(places):
            return _kept(sorted_, slice(count))
        head *= 8
    candidates = descending(candidates, least)
    return _kept(candidates, slice(_reaching(candidates.probs, mass)))


def _reaching(probs: FloatArray, mass: float) -> int:
    """How many of them, from the first on, sum to at least `mass`; one more than there are where all do not."""
    return int(np.add.accumulate(probs, dtype=np.float64).searchsorted(mass)) + 1


def _sorted_nucleus(probs: list[float], mass: float, least: float) -> int:
    """How many candidates `top_p` keeps, if they are the first ones and in order; 0 where that is not so.

    After `top_k` it nearly always is, and a few numbers are added up sooner than NumPy is asked for it.
    """
    total, last = 0.0, math.inf
    for index, prob in enumerate(probs):
        if not last > prob > 1.01 * least:
            return 0
        total += prob
        if total >= mass:
            return index + 1 if max(probs[index + 1 :], default=0.0) < prob else 0
        last = prob
    return 0


def top_a(candidates: Candidates, factor: float) -> Candidates:
    """Top-a (BlinkDL, RWKV-LM): drop tokens below `factor` times the square of the highest probability."""
    highest = candidates.probs.max()
    return _at_least(candidates, min(factor * highest, 1.0) * highest)


def min_p(candidates: Candidates, share: float) -> Candidates:
    """Drop tokens below `share` of the highest probability (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082)."""
    return _at_least(candidates, share * candidates.probs.max())


def _at_least(candidates: Candidates, threshold: float) -> Candidates:
    return _kept(candidates, candidates.probs >= threshold)


def descending(candidates: Candidates, least: float = _NEGLIGIBLE) -> Candidates:
    """The tokens of at least this probability, likeliest first; their probabilities as they were."""
    weighty = (candidates.probs >= least).nonzero()[0]
    return _sorted(Candidates(candidates.ids[weighty], candidates.probs[weighty]))


def tail_free(candidates: Candidates, share: float) -> Candidates:
    """Tail-free sampling (https://www.trentbrick.com/Tail-Free-Sampling/): cut the sorted probabilities where the
    magnitudes of their second differences, summed from the top, exceed `share` of the total."""
    candidates = descending(candidates)
    curvature = np.abs(np.diff(candidates.probs, 2))
    total = curvature.sum()
    if not total > 0:
        return candidates
    within = int(np.searchsorted(np.cumsum(curvature / total), share, side="right"))
    return _kept(candidates, slice(within + 1))


def typical(candidates: Candidates, mass: float) -> Candidates:
    """Locally typical sampling: the fewest tokens that sum to `mass`, surprise nearest to the entropy first."""
    candidates = descending(candidates)
    surprise = -np.log(candidates.probs)
    order = np.argsort(np.abs(surprise - np.dot(candidates.probs, surprise)), kind="stable")
    sums = np.cumsum(candidates.probs[order], dtype=np.float64)
    return _kept(candidates, order[: int(np.searchsorted(sums, mass)) + 1])


def surprise_limit(candidates: Candidates, bits: float) -> Candidates:
    """Mirostat 2 (Basu et al. 2021, https://arxiv.org/abs/2007.14966): drop tokens whose surprise is above `bits`,
    never the likeliest."""
    candidates = descending(candidates)
    return _kept(candidates, slice(max(1, int(np.count_nonzero(candidates.probs >= 2.0**-bits)))))


def retemper(candidates: Candidates, temperature: float) -> Candidates:
    """Apply a temperature to probabilities. It may be 0, which leaves the likeliest token."""
    relative = candidates.probs / candidates.probs.max()
    return Candidates(candidates.ids, _normalized(relative ** np.float32(1.0 / max(temperature, 1e-9))))


def dynamic_temperature(candidates: Candidates, low: float, high: float, exponent: float) -> Candidates:
    """Dynamic temperature (kalomaze): between `low` and `high` by the entropy's share of its maximum, to a power."""
    probs = candidates.probs[candidates.probs > 0]
    share = max(0.0, -float(np.dot(probs, np.log(probs)))) / math.log(len(candidates.probs))
    return retemper(candidates, low + (high - low) * share**exponent)


def xtc(candidates: Candidates, probability: float, threshold: float, protected: BoolArray) -> Candidates:
    """Exclude top choices: of the tokens of at least the probability `threshold`, all but the least likely are excluded
    with `probability`. Returned is the mixture of that and of no exclusion. Protected tokens count for neither."""
    ids, probs = candidates
    top = np.flatnonzero((probs >= threshold) & (probs > 0) & ~protected[ids])
    if len(top) < 2:
        return candidates
    excluded = np.zeros(len(probs), dtype=np.bool_)
    excluded[top] = True
    excluded[top[probs[top].argmin()]] = False
    without = np.where(excluded, 0, probs)
    return Candidates(ids, (1.0 - probability) * probs + probability * _normalized(without))


def _sorted(candidates: Candidates) -> Candidates:
    """The likeliest first and, among equals, the highest id.

    Positive floats are ordered as their bits are: so one sort of integers does, several times as fast as by two keys.
    """
    keys = candidates.probs.view(np.uint32).astype(np.uint64)
    keys <<= _HALF
    keys |= candidates.ids.view(np.uint64)
    keys.sort()
    keys = keys[::-1]
    return Candidates((keys & _LOWER).view(np.int64), (keys >> _HALF).astype(np.uint32).view(np.float32))


def _normalized(weights: FloatArray) -> FloatArray:
    probs: FloatArray = weights / np.add.reduce(weights)
    return probs


def _kept(candidates: Candidates, which: BoolArray | IntArray | slice) -> Candidates:
    return Candidates(candidates.ids[which], _normalized(candidates.probs[which]))


def draw(probs: FloatArray, point: float) -> int:
    """The index of the first candidate at which the probabilities, summed in order, exceed `point` (above 0, below 1)
    of their sum."""
    sums = np.add.accumulate(probs, dtype=np.float64)
    return min(int(sums.searchsorted(point * sums[-1], side="right")), len(sums) - 1)
