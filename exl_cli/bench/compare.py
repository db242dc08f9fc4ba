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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exl_cli.bench import limits
from exl_cli.bench.result import Measured, Result, Run, mean

LEVEL, LEAST = 0.01, 0.02
_EXACT_UP_TO = 50_000
_RANDOM_DEALS = 20_000
_QUALITY = 0.01

Mark = Literal["faster", "slower", "same", "noise", "unclear"]


@dataclass(frozen=True)
class Row:
    """A test that both results have.

    Attributes:
        model, cache, test: what was measured, in words; "a → b" where the two results differ in it.
        before, after: mean tokens per second.
        p: probability that chance alone sets the means so far apart.
        mark: "same" is a difference too small to count, "noise" one that chance explains, "unclear" too few repetitions
            to tell.
        by_chance: there are enough repetitions to tell, and they say that chance explains the difference.
        paced_by_cpu: in one of the two the GPU waited for the CPU. How fast that is differs between processes of the
            same thing, by more than the repetitions within one can show.
    """

    model: str
    cache: str
    test: str
    before: float
    after: float
    p: float
    mark: Mark
    by_chance: bool
    paced_by_cpu: bool = False

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before


@dataclass(frozen=True)
class Figure:
    """A figure that was taken once on each side, so that no test can tell chance from change.

    Attributes:
        model, cache: as in `Row`.
        name: what it is.
        unit: "s", "MiB" or empty.
        before, after: the two.
        note: what is to be said of it.
    """

    model: str
    cache: str
    name: str
    unit: str
    before: float
    after: float
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """What two results have in common, and what is different about the machines.

    Attributes:
        rows, figures: in the order of the second result.
        changed: names of environment entries with both values.
        disturbed: whether other programs used much of the processor during one of the two.
        missing: names of tests that only one of them has.
    """

    rows: list[Row]
    figures: list[Figure]
    changed: list[tuple[str, Any, Any]]
    missing: list[str]
    disturbed: bool = False

    @property
    def differs(self) -> bool:
        """Whether any test is faster or slower."""
        return any(row.mark in ("faster", "slower") for row in self.rows)

    @property
    def doubtful(self) -> list[str]:
        """Names of tests that are faster or slower, and may be so again for no reason but the processor's pace."""
        return [row.test for row in self.rows if row.paced_by_cpu and row.mark in ("faster", "slower")]

    def failing(self, bound: float) -> list[Row]:
        """Rows whose ratio is under a bound and not explained by chance."""
        return [row for row in self.rows if row.ratio < bound and not row.by_chance]


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
    need not be the same: that is then what is being compared.
    """
    by_model, by_cache = _several(before, after, _model), _several(before, after, _cache)

    def key(run: Run) -> tuple[str, str]:
        return _model(run) if by_model else "", _cache(run) if by_cache else ""

    old_runs = {key(run): run for run in reversed(before.runs)}
    rows, figures, missing = [], [], []
    seen: set[tuple[str, str]] = set()
    for run in after.runs:
        old = old_runs.get(key(run))
        if old is None or key(run) in seen:
            missing += [f"{run.label}, cache {run.cache}: {entry.test.name}" for entry in run.tests if entry.samples]
            continue
        seen.add(key(run))
        where = _arrow(old.label, run.label), _arrow(old.cache, run.cache)
        found, unmatched = _rows(old, run, *where)
        rows += found
        missing += unmatched
        figures += _figures(old, run, *where)
    missing += [
        f"{old.label}, cache {old.cache}: {entry.test.name}"
        for name, old in old_runs.items()
        if name not in seen
        for entry in old.tests
        if entry.samples
    ]
    disturbed = any(limits.disturbed(run) for run in [*before.runs, *after.runs])
    return Comparison(rows, figures, _changed(before.environment, after.environment), missing, disturbed)


def _model(run: Run) -> str:
    return run.label


def _cache(run: Run) -> str:
    return run.cache


def _several(before: Result, after: Result, part: Callable[[Run], str]) -> bool:
    return any(len({part(run) for run in result.runs}) > 1 for result in (before, after))


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _rows(old: Run, run: Run, model: str, cache: str) -> tuple[list[Row], list[str]]:
    known = {entry.test: entry for entry in old.tests if entry.samples}
    measured = [entry for entry in run.tests if entry.samples]
    rows = [_row(known[entry.test], entry, model, cache) for entry in measured if entry.test in known]
    both = {entry.test for entry in measured} & set(known)
    names = [entry.test.name for entry in [*measured, *known.values()] if entry.test not in both]
    return rows, [f"{model}, cache {cache}: {name}" for name in names]


def _row(old: Measured, new: Measured, model: str, cache: str) -> Row:
    p, mark = judge(old.rates, new.rates)
    by_chance = can_tell(len(old.rates), len(new.rates)) and p >= LEVEL
    paced = limits.waits_for_cpu(old) or limits.waits_for_cpu(new)
    return Row(model, cache, new.test.name, old.avg_ts, new.avg_ts, p, mark, by_chance, paced)


def _figures(old: Run, run: Run, model: str, cache: str) -> list[Figure]:
    found = []

    def add(name: str, unit: str, before: float | None, after: float | None, note: str = "") -> None:
        if before is not None and after is not None:
            found.append(Figure(model, cache, name, unit, before, after, note))

    if old.cold and run.cold:
        add("start to first token", "s", old.cold.start_to_token_seconds, run.cold.start_to_token_seconds)
        add("load", "s", old.cold.load_seconds, run.cold.load_seconds)
    memory = [("GPU memory, allocator", old.memory.allocator, run.memory.allocator)]
    memory += [
        ("GPU memory, device", old.memory.device, run.memory.device),
        ("host memory", old.memory.host, run.memory.host),
    ]
    for name, before, after in memory:
        add(f"{name} peak", "MiB", before and before / 2**20, after and after / 2**20)
    if old.perplexity and run.perplexity:
        a, b = old.perplexity, run.perplexity
        if (a.sha256, a.tokens, a.window, a.stride) != (b.sha256, b.tokens, b.window, b.stride):
            note = "not comparable: another text, tokenizer or window"
        else:
            note = "computes something else" if abs(b.value / a.value - 1) > _QUALITY else "same quality"
        add("perplexity", "", a.value, b.value, note)
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*before, *after])
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]
