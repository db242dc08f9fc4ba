"""What `exl bench --compare` shows: the differences between two results."""

from __future__ import annotations

from typing import Any

from exl_cli.bench.compare import LEAST, LEVEL, Comparison, Figure, Row
from exl_cli.ui.bench import fact
from exl_cli.ui.console import Console
from exl_cli.ui.models import cells, show, table

_MARKS = {
    "faster": "faster",
    "slower": "SLOWER",
    "same": "no difference",
    "noise": "in the noise",
    "unclear": "too few -r",
}
_STYLES = {"faster": "green", "slower": "bold red", "same": "dim", "noise": "dim", "unclear": "yellow"}


def comparison(console: Console, result: Comparison, *, on_stdout: bool) -> None:
    """What differs between two results: on stdout as asked-for data, on stderr beside another format."""
    if not on_stdout:
        for row in result.rows:
            console.note(f"{row.test}: {_change(row.before, row.after)}, {_MARKS[row.mark]}")
        return
    pairs = [(row.model, row.cache) for row in result.rows] + [(f.model, f.cache) for f in result.figures]
    for model, cache in dict.fromkeys(pairs):
        fact(console, "compared", f"{model}, cache {cache}")
        rows = [row for row in result.rows if (row.model, row.cache) == (model, cache)]
        show(console, _differences(rows))
        for figure in result.figures:
            if (figure.model, figure.cache) == (model, cache):
                fact(console, figure.name, _figure(figure))
        console.text("\n")
    for name, before, after in result.changed:
        fact(console, "changed", f"{name}: {before} → {after}")
    for name in result.missing:
        console.note(f"only in one of the two: {name}")
    if not result.rows:
        console.note("the two have no test in common")
        return
    fact(console, "verdict", _verdict(result))
    if result.disturbed:
        console.note("other programs used the processor during one of the two: a difference may be theirs")
    if result.doubtful:
        tests = ", ".join(dict.fromkeys(result.doubtful))
        console.note(
            f"{tests}: the GPU waits for the CPU there, whose pace differs from one process to the next; repeat both"
        )


def fails(console: Console, result: Comparison, bound: float) -> bool:
    """Whether a test fell under a share of its old rate, said on stderr test by test."""
    failing = result.failing(bound)
    for row in result.rows:
        if row in failing:
            console.note(f"{row.test} is at {row.ratio:.3f} of the saved result, under {bound:g}")
        elif row.ratio < bound:
            console.note(f"{row.test} is at {row.ratio:.3f}, which its repetitions cannot tell from chance; raise -r")
    return bool(failing)


def _verdict(result: Comparison) -> str:
    rule = f"p < {LEVEL:g} in a permutation test and at least {LEAST:.0%}"
    if not result.differs:
        if any(row.mark == "unclear" for row in result.rows):
            return "too few repetitions to tell; use -r 5 or more"
        noise = any(row.mark == "noise" for row in result.rows)
        return f"no difference{' that stands out from the noise' if noise else ''} ({rule})"
    counts = {mark: sum(row.mark == mark for row in result.rows) for mark in ("faster", "slower")}
    parts = [f"{count} {mark}" for mark, count in counts.items() if count]
    return f"{' and '.join(parts)} of {len(result.rows)} tests ({rule})"


def _differences(rows: list[Row]) -> Any:
    from rich.text import Text

    titles = ["test", "before t/s", "after t/s", "change", "p", ""]
    made = table(*titles, right=titles[1:5])
    for row in rows:
        line = cells(row.test, f"{row.before:,.1f}", f"{row.after:,.1f}", f"{row.ratio - 1:+.1%}", f"{row.p:.3f}")
        made.add_row(*line, Text(_MARKS[row.mark], style=_STYLES[row.mark]))
    return made


def _figure(figure: Figure) -> str:
    unit = figure.unit and f" {figure.unit}"
    digits = "{:,.4f}" if not figure.unit else "{:,.2f}" if figure.unit == "s" else "{:,.0f}"
    both = f"{digits.format(figure.before)}{unit} → {digits.format(figure.after)}{unit}"
    change = f"{figure.after / figure.before - 1:+.1%}" if figure.before else "new"
    return f"{both} ({change}){figure.note and ', ' + figure.note}"


def _change(before: float, after: float) -> str:
    return f"{before:,.1f} → {after:,.1f} tokens/s ({after / before - 1:+.1%})"
