"""Two results side by side: what differs, by how much, and whether the samples can tell.

A difference counts where two things hold: a permutation test of the repetitions' means finds it at a level of 0.01,
and it is at least 2 %. The test assumes no distribution: it asks how many of the ways to deal all repetitions out to
the two sides would set their means as far apart. With five repetitions on each side that takes samples that do not
overlap; with four it cannot be reached, and the answer is that there are too few to tell. The 2 % are there because
two runs of the same thing differ by more than the repetitions within one of them can know.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exl_cli.bench import limits
from exl_cli.bench.result import Measured, Result, Run, mean

LEVEL, LEAST = 0.01, 0.02
_EXACT_UP_TO = 50_000
_RANDOM_DEALS = 20_000
_QUALITY = 0.01

# "same" is a difference too small to count, "noise" one that chance explains, "unclear" too few repetitions to judge.
Mark = Literal["faster", "slower", "same", "noise", "unclear"]


@dataclass(frozen=True)
class Row:
    """A test that both results have. Model and cache are "a → b" where the two results differ in them."""

    model: str
    cache: str
    test: str
    before: float  # mean tokens per second, as `after`
    after: float
    p: float  # probability that chance alone sets the means so far apart
    mark: Mark
    can_tell: bool  # there are enough repetitions to tell chance from a difference
    # In one of the two the GPU waited for the CPU. How fast that is differs between processes of the same thing, by
    # more than the repetitions within one can show.
    paced_by_cpu: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before

    def fails(self, bound: float) -> bool:
        """Whether the ratio is under a bound and not explained by chance."""
        return self.ratio < bound and not (self.can_tell and self.p >= LEVEL)


@dataclass(frozen=True)
class Figure:
    """A figure that was taken once on each side: no test can tell chance from change."""

    model: str
    cache: str
    name: str
    unit: str  # "s", "MiB" or empty
    before: float
    after: float
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The tests that two results have in common, and the differences between the machines."""

    rows: list[Row]  # in the order of the second result, as the figures
    figures: list[Figure]
    changed: list[tuple[str, Any, Any]]  # names of environment entries with both values
    missing: list[str]  # names of tests that only one of them has
    disturbed: bool  # other programs used much of the processor during one of the two

    @property
    def differs(self) -> bool:
        return any(row.mark in ("faster", "slower") for row in self.rows)

    @property
    def doubtful(self) -> list[str]:
        """Names of tests that are faster or slower, and may be so again for no reason but the processor's pace."""
        return [row.test for row in self.rows if row.paced_by_cpu and row.mark in ("faster", "slower")]


def p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided permutation test of the difference of two means.

    Exact up to 50,000 ways to deal the values out; beyond that 20,000 random ones, from a fixed seed (Phipson and
    Smyth, 2010: the observed one is counted among them).
    """
    values = [*before, *after]
    count = len(before)
    # Sums instead of means: for a given number on each side they order the deals alike.
    total = sum(values)
    observed = abs(sum(before) / count - sum(after) / len(after))
    tolerance = 1e-9 * max(abs(value) for value in values)

    def apart(chosen: float) -> bool:
        return abs(chosen / count - (total - chosen) / len(after)) >= observed - tolerance

    ways = math.comb(len(values), count)
    if ways <= _EXACT_UP_TO:
        return sum(apart(sum(deal)) for deal in itertools.combinations(values, count)) / ways
    deals = random.Random(0)
    hits = sum(apart(sum(deals.sample(values, count))) for _ in range(_RANDOM_DEALS))
    return (hits + 1) / (_RANDOM_DEALS + 1)


def can_tell(before: int, after: int) -> bool:
    """Whether so many repetitions can reach the level at all."""
    # The rarest deals are the observed one and, where the sides are of equal size, its mirror image.
    return (2 if before == after else 1) / math.comb(before + after, before) < LEVEL


def judge(before: Sequence[float], after: Sequence[float]) -> tuple[float, Mark]:
    """The p value of two samples of rates, and what to say of it."""
    p = p_value(before, after)
    change = mean(after) / mean(before) - 1
    if abs(change) < LEAST:
        return p, "same"
    if not can_tell(len(before), len(after)):
        return p, "unclear"
    if p >= LEVEL:
        return p, "noise"
    return p, "faster" if change > 0 else "slower"


def compare(before: Result, after: Result) -> Comparison:
    """Compare the tests that two results have in common.

    Tests belong together by model, cache and shape. Where each result has one model only, or one cache type, the two
    need not be the same: then these are being compared.
    """
    results = (before, after)
    by_model = any(len({run.label for run in result.runs}) > 1 for result in results)
    by_cache = any(len({run.cache for run in result.runs}) > 1 for result in results)

    def key(run: Run) -> tuple[str, str]:
        return run.label if by_model else "", run.cache if by_cache else ""

    old_runs = {key(run): run for run in reversed(before.runs)}
    rows: list[Row] = []
    figures: list[Figure] = []
    missing: list[str] = []
    for run in after.runs:
        if (old := old_runs.pop(key(run), None)) is None:
            missing += [f"{run.where}: {entry.test.name}" for entry in run.tests]
            continue
        model, cache = _arrow(old.label, run.label), _arrow(old.cache, run.cache)
        known = {entry.test: entry for entry in old.tests}
        unmatched = [entry for entry in run.tests if entry.test not in known]
        rows += [_row(known.pop(e.test), e, model, cache) for e in run.tests if e.test in known]
        missing += [f"{model}, cache {cache}: {entry.test.name}" for entry in [*unmatched, *known.values()]]
        figures += [Figure(model, cache, *figure) for figure in _figures(old, run)]
    missing += [f"{old.where}: {entry.test.name}" for old in old_runs.values() for entry in old.tests]
    disturbed = any(limits.disturbed(run) for result in results for run in result.runs)
    names = dict.fromkeys([*before.environment, *after.environment])
    values = [(name, before.environment.get(name), after.environment.get(name)) for name in names]
    return Comparison(rows, figures, [(n, old, new) for n, old, new in values if old != new], missing, disturbed)


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _row(old: Measured, new: Measured, model: str, cache: str) -> Row:
    enough = can_tell(len(old.rates), len(new.rates))
    paced = limits.waits_for_cpu(old) or limits.waits_for_cpu(new)
    return Row(model, cache, new.test.name, old.avg_ts, new.avg_ts, *judge(old.rates, new.rates), enough, paced)


def _figures(old: Run, run: Run) -> Iterator[tuple[str, str, float, float, str]]:
    """The figures that both runs have: what follows model and cache in a `Figure`."""
    if old.cold and run.cold:
        for name, part in (("start to first token", "start_to_token_seconds"), ("load", "load_seconds")):
            yield name, "s", getattr(old.cold, part), getattr(run.cold, part), ""
    names = {"allocator": "GPU memory, allocator", "device": "GPU memory, device", "host": "host memory"}
    for part, name in names.items():
        peaks = getattr(old.memory, part), getattr(run.memory, part)
        if None not in peaks:
            yield f"{name} peak", "MiB", peaks[0] / 2**20, peaks[1] / 2**20, ""
    if old.perplexity and run.perplexity:
        a, b = old.perplexity, run.perplexity
        note = "different output" if abs(b.value / a.value - 1) > _QUALITY else "same quality"
        if (a.sha256, a.tokens, a.window, a.stride) != (b.sha256, b.tokens, b.window, b.stride):
            note = "not comparable: different text, tokenizer or window"
        yield "perplexity", "", a.value, b.value, note
