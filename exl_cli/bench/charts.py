"""The report's charts of generation: against depth, against batch, and its latencies. See `bars` for the others.

Each function gives a chart and the figures that it shows, or None where the result has nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exl_cli.bench import files
from exl_cli.bench.drawing import INK, MUTED, Chart, colour_of, label, svg_of
from exl_cli.bench.outputs import three_digits
from exl_cli.bench.plan import Case
from exl_cli.bench.result import Measured, Result, Run, percentile

_BINS = 60


def depths(result: Result) -> Chart | None:
    """Generation against depth: a line for each run."""

    def place(test: Case, first: Case) -> int | None:
        return test.n_depth if test.n_parallel == 1 and test.n_gen == first.n_gen else None

    return _lines(result, place, ("depth", "Generation against depth", "tokens of context before", "depth"))


def batches(result: Result) -> Chart | None:
    """Throughput against requests at a time: a line for each run."""

    def place(test: Case, first: Case) -> int | None:
        return test.n_parallel if (test.n_gen, test.n_depth) == (first.n_gen, first.n_depth) else None

    return _lines(result, place, ("batch", "Throughput against batch", "requests at a time", "requests"), log=True)


def _lines(
    result: Result, place: Callable[[Case, Case], int | None], words: tuple[str, str, str, str], *, log: bool = False
) -> Chart | None:
    """Tokens per second against a number; None where no run has two points.

    Args:
        result: what was measured.
        place: of a generation and the first one of its run: where it lies on the axis; None for nowhere.
        words: name and title of the chart, the axis, and the axis in a table's head.
        log: the axis doubles from step to step.
    """
    name, title, axis, short = words
    series: list[tuple[Run, dict[int, Measured]]] = []
    for run in result.runs:
        found = run.find("generation")
        at = {place(entry.test, found[0].test): entry for entry in reversed(found)}
        points = {x: at[x] for x in sorted(x for x in at if x is not None)}
        if len(points) > 1:
            series.append((run, points))
    if not series:
        return None
    ticks = sorted({x for _, points in series for x in points})

    def draw(axes: Any) -> None:
        for run, points in series:
            rates, errors = ([getattr(e, part) for e in points.values()] for part in ("avg_ts", "stddev_ts"))
            colour = colour_of(result, run)
            axes.errorbar(list(points), rates, errors, color=colour, marker="o", markersize=4, linewidth=1.6)
        if log:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(axis)
        axes.set_title("tokens/s", loc="left", fontsize=9.5, color=MUTED)
        _name_ends(axes, result, series)

    rows = [
        (f"{tick:,}", *(f"{points[tick].avg_ts:,.1f}" if tick in points else "–" for _, points in series))
        for tick in ticks
    ]
    described = "; ".join(
        f"{label(result, run)}: " + ", ".join(f"{entry.avg_ts:,.1f} tokens/s at {x:,}" for x, entry in points.items())
        for run, points in series
    )
    titles = (short, *(label(result, run) for run, _ in series)) if len(series) > 1 else (short, "tokens/s")
    return Chart(svg_of(name, title, described, 2.7, draw), titles, rows)


def _name_ends(axes: Any, result: Result, series: list[tuple[Run, dict[int, Measured]]]) -> None:
    """Write each line's name at its end, moved up where it would lie on another."""
    if len(series) < 2:
        return
    least = axes.get_ylim()[1] / 14
    height = float("-inf")
    for run, points in sorted(series, key=lambda one: one[1][max(one[1])].avg_ts):
        height = max(points[max(points)].avg_ts, height + least)
        axes.annotate(
            label(result, run),
            (max(points), height),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour_of(result, run),
            va="center",
        )


def latencies(result: Result) -> Chart | None:
    """How the time between tokens is distributed: a row for each generation, for the first of each of several runs."""
    found = [(run, entry) for run in result.runs for entry in run.find("generation") if entry.latencies]
    if len(result.runs) > 1:
        found = [(run, entry) for run, entry in found if entry is run.find("generation")[0]]
    if not found:
        return None
    names = [label(result, run) if len(result.runs) > 1 else entry.test.name for run, entry in found]
    rows = []
    for name, (_, entry) in zip(names, found, strict=True):
        points = files.latency(entry)
        rows.append((name, *(f"{three_digits((points[point] or 0) / 1e6)} ms" for point in ("p5", "median", "p95"))))
    edge = max(percentile(entry.latencies, 99) for _, entry in found) / 1e6 * 1.05

    def draw(axes: Any) -> None:
        for place, (name, (run, entry)) in enumerate(reversed(list(zip(names, found, strict=True)))):
            _ridge(axes, place, [step / 1e6 for step in entry.latencies], edge, colour_of(result, run), name)
        axes.set_ylim(-0.05, len(found))
        axes.set_xlim(0, edge)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds between tokens")

    described = "; ".join(
        f"{name}: 5 % below {low}, median {middle}, 95 % below {high}" for name, low, middle, high in rows
    )
    svg = svg_of("latency", "Time between tokens", described, 0.75 + 0.7 * len(found), draw)
    return Chart(svg, ("", "5 %", "median", "95 %"), rows)


def _ridge(axes: Any, place: int, values: list[float], edge: float, colour: str, name: str) -> None:
    """A histogram that stands on a row, its median marked, its name where it leaves room."""
    counts = [0] * _BINS
    for value in values:
        if value < edge:
            counts[int(value / edge * _BINS)] += 1
    heights = [place + 0.55 * count / (max(counts) or 1) for count in counts]
    edges = [edge * number / _BINS for number in range(_BINS + 1)]
    axes.stairs(heights, edges, baseline=place, fill=True, color=colour, alpha=0.5, linewidth=0)
    middle = percentile(values, 50)
    axes.plot([middle, middle], [place, place + 0.6], color=INK, linewidth=1.2)
    axes.annotate(f"{three_digits(middle)} ms", (middle, place + 0.62), ha="center", va="bottom", fontsize=9)
    right = middle < edge / 2
    axes.annotate(name, (edge if right else 0, place + 0.25), ha="right" if right else "left", color=MUTED)
