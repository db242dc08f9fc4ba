"""The sampling steps, one function each: penalties, softmax, filters, draw.

`sampler` documents the differences from exllamav2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from exl_cli.engines.sampling.dry import BoolArray, FloatArray, IntArray
from exl_cli.sampling import Sampling

# As in exllamav2, sorting drops tokens below this probability: most of a large vocabulary.
_NEGLIGIBLE = 1e-8

# Up to this many candidates, a Python loop beats NumPy's call overhead.
_FEW = 64

# To pack two 32-bit values into a uint64 sort key.
_HALF = np.uint64(32)
_LOWER = np.uint64(0xFFFFFFFF)

# top_p first looks for the nucleus among this many of the most likely tokens.
_HEAD = 512

# `shortlist` arranges logits in this many columns or more, if that gives at least _LEAST_ROWS rows.
_COLUMNS = 1024
_LEAST_ROWS = 4

# Logit of a banned token, as in exllamav2; finite, but unlikely at any temperature.
_RULED_OUT = np.float32(-1e30)


class Candidates(NamedTuple):
    """The tokens that may come next.

    Attributes:
        ids: token ids, [n] with n >= 1.
        probs: probabilities, [n], which sum to 1 up to rounding; a token of probability 0 is never drawn.
    """

    ids: IntArray
    probs: FloatArray


def penalize(logits: FloatArray, history: IntArray, settings: Sampling) -> None:
    """Repetition (Keskar et al. 2019, https://arxiv.org/abs/1909.05858), presence and frequency penalties, in place.

    Repetition and presence penalties use a token's most recent occurrence; the frequency penalty sums over all. Beyond
    `token_repetition_range` tokens back, their strength falls linearly to 0 over `token_repetition_decay` tokens.
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
    logits[tokens] = after  # for repeated indices NumPy keeps the last value, that of the most recent occurrence
    if settings.token_frequency_penalty:
        np.subtract.at(logits, tokens, np.float32(settings.token_frequency_penalty) * strength)


def add_bias(logits: FloatArray, ids: IntArray, bias: FloatArray) -> None:
    """Add biases to the logits of `ids`, in place; -inf bans a token."""
    logits[ids] = np.maximum(logits[ids] + bias, _RULED_OUT)


def all_ruled_out(highest: np.float32) -> bool:
    """Whether every token is banned, given the highest logit."""
    return bool(highest < 0.1 * _RULED_OUT)


def softmax(logits: FloatArray, highest: np.float32, temperature: float, smoothing: float = 0.0) -> FloatArray:
    """Softmax at a temperature. With `smoothing` (kalomaze's quadratic sampling), logits are first replaced by
    -smoothing * (highest - logit) ** 2."""
    scores = logits - highest
    if smoothing > 0:
        with np.errstate(over="ignore"):
            scores *= -scores * (smoothing / temperature)
    else:
        scores *= 1.0 / temperature
    np.exp(scores, out=scores)
    return _normalized(scores)


def lowered(values: FloatArray, bound: np.float32, seen: BoolArray, settings: Sampling) -> FloatArray:
    """`penalize` for a shortlist of logits, if the settings can only lower them and have no range or frequency.

    Args:
        values: logits, [n].
        bound: a lower bound on them.
        seen: mask [n] of tokens in the history.
        settings: repetition penalty >= 1, presence penalty >= 0, unlimited range, no frequency penalty.
    """
    factor = np.float32(1.0) + np.float32(settings.token_repetition_penalty - 1.0)
    after = values / factor
    if not bound > 0:
        # Positive logits are divided, negative ones multiplied; for a factor >= 1 that is the smaller result.
        after = np.minimum(after, values * factor)
    if settings.token_presence_penalty:
        after -= np.float32(settings.token_presence_penalty)
    return np.where(seen, after, values)


def shortlist(logits: FloatArray, count: int) -> tuple[IntArray, np.float32]:
    """Select a superset of the `count` highest logits that is usually not much larger.

    Returns:
        Ascending ids of all logits at or above a bound, and the bound.
    """
    # A full partition is slow for large vocabularies. Instead reshape into columns and take each column's maximum.
    # The `count`-th highest maximum is a bound that at least `count` logits reach. Both passes are vectorized.
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
    """Indices of the k highest of some logits with ascending ids, highest first, ties by descending id.

    float16 logits often tie. For ties at the k-th place, choose as exllamav2's heap does: among the first k ids whose
    logit is high enough, the tied ones, last first.
    """
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
    """Ids of the k highest logits, highest first, for k < n; ties as in `best`."""
    ids, _ = shortlist(logits, k)
    return ids[best(logits[ids], k)]


def top_p(candidates: Candidates, mass: float) -> Candidates:
    """Nucleus sampling: the fewest most likely tokens with a total probability >= `mass`, in descending order."""
    # Tokens below this bound sum to less than (1 - mass) / 2, so none is in the nucleus: skip them when sorting.
    least = 0.5 * (1.0 - mass) / len(candidates.probs)
    if len(candidates.probs) <= _FEW and (count := _sorted_nucleus(candidates.probs.tolist(), mass, least)):
        return _kept(candidates, slice(count))
    # In a large vocabulary the nucleus usually lies within the top few hundred.
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
    """Length of the shortest prefix that sums to at least `mass`; n + 1 if there is none."""
    return int(np.add.accumulate(probs, dtype=np.float64).searchsorted(mass)) + 1


def _sorted_nucleus(probs: list[float], mass: float, least: float) -> int:
    """Size of the nucleus if the candidates are already sorted, as they are after `top_k`; else 0."""
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
    """Tokens of at least this probability in descending order, not renormalized."""
    kept = (candidates.probs >= least).nonzero()[0]
    return _sorted(Candidates(candidates.ids[kept], candidates.probs[kept]))


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
    """Locally typical sampling (https://arxiv.org/abs/2202.00666): the tokens whose surprise is closest to the entropy,
    up to a total probability of `mass`."""
    candidates = descending(candidates)
    surprise = -np.log(candidates.probs)
    order = np.argsort(np.abs(surprise - np.dot(candidates.probs, surprise)), kind="stable")
    sums = np.cumsum(candidates.probs[order], dtype=np.float64)
    return _kept(candidates, order[: int(np.searchsorted(sums, mass)) + 1])


def surprise_limit(candidates: Candidates, bits: float) -> Candidates:
    """Mirostat 2 (Basu et al. 2021, https://arxiv.org/abs/2007.14966): drop tokens with a surprise above `bits`, except
    the most likely one."""
    candidates = descending(candidates)
    return _kept(candidates, slice(max(1, int(np.count_nonzero(candidates.probs >= 2.0**-bits)))))


def retemper(candidates: Candidates, temperature: float) -> Candidates:
    """Apply a temperature to probabilities, relative to the highest one, so that 0 is greedy instead of 0 / 0."""
    relative = candidates.probs / candidates.probs.max()
    return Candidates(candidates.ids, _normalized(relative ** np.float32(1.0 / max(temperature, 1e-9))))


def dynamic_temperature(candidates: Candidates, low: float, high: float, exponent: float) -> Candidates:
    """Dynamic temperature (kalomaze): low + (high - low) * (entropy / maximum entropy) ** exponent."""
    probs = candidates.probs[candidates.probs > 0]
    share = max(0.0, -float(np.dot(probs, np.log(probs)))) / math.log(len(candidates.probs))
    return retemper(candidates, low + (high - low) * share**exponent)


def xtc(candidates: Candidates, probability: float, threshold: float, protected: BoolArray) -> Candidates:
    """XTC ("exclude top choices"): with `probability`, drop all tokens >= `threshold` but the least likely of them.

    Returns the mixture of both outcomes instead of flipping a coin. Protected tokens are neither dropped nor counted.
    """
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
    """Sort by descending probability, then by descending id."""
    # Non-negative floats order like their bit patterns, so a uint64 of (probability, id) sorts both keys at once,
    # several times faster than np.lexsort.
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
    """Draw from the cumulative distribution: the first index whose cumulative share exceeds `point`, in (0, 1)."""
    sums = np.add.accumulate(probs, dtype=np.float64)
    return min(int(sums.searchsorted(point * sums[-1], side="right")), len(sums) - 1)
