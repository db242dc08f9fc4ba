"""The report's charts: SVG by matplotlib, coloured by the page's style sheet.

Every colour is drawn as a number that stands for a CSS variable and is replaced by it afterwards: one drawing serves
light, dark and paper. Text stays text. Charts are narrow enough for a phone to show them at full size.

Each chart's function gives None where the result has nothing to draw.
"""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_cli.bench import limits
from exl_cli.bench.outputs import latency, three_digits
from exl_cli.bench.plan import Case
from exl_cli.bench.result import Measured, Result, Run, mean, percentile
from exl_cli.errors import UsageError, param
from exl_cli.system.units import MIB, mib

# Colours to draw with, as in report.mplstyle, and what they become.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
_SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06")
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--rule", _PAPER: "--paper"}
_VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(_SERIES, 1)}

_WIDTH = 4.7

# The parts of a first use, in the order in which they happen; the report's key names them alike.
FIRST_USE = ("import", "load", "first token")

_BINS = 60

# A name, pieces of a length and a colour, and the text at their end.
_Bar = tuple[str, Sequence[tuple[float, str]], str]


@dataclass(frozen=True)
class Chart:
    """A chart and the figures in it."""

    svg: str
    titles: Sequence[str]  # this and the next are the same figures as a table, its first column in words
    rows: Sequence[Sequence[str]]


def require_matplotlib() -> None:
    """Say in time that no chart can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        problem = f"{param('report')} needs matplotlib, which is not installed"
        raise UsageError(problem, "pip install 'exl-cli[report]'")


def label(result: Result, run: Run) -> str:
    """What to call a run beside the others: as little as tells them apart."""
    runs = result.runs
    parts = []
    if len({other.label for other in runs}) > 1:
        alone = len({other.short_name for other in runs}) == len({other.label for other in runs})
        parts.append(run.short_name if alone else run.label)
    if len({other.cache for other in runs}) > 1:
        parts.append(f"cache {run.cache}")
    return ", ".join(parts) or run.short_name


def depths(result: Result) -> Chart | None:
    """Generation against depth: a line for each run."""
    words = ("depth", "Generation against depth", "tokens of context before", "depth")
    return _lines(result, words, "n_depth", lambda test, first: (test.n_parallel, test.n_gen) == (1, first.n_gen))


def batches(result: Result) -> Chart | None:
    """Throughput against requests at a time, in steps that double: a line for each run."""
    words = ("batch", "Throughput against batch", "requests at a time", "requests")
    return _lines(result, words, "n_parallel", lambda *tests: len({(t.n_gen, t.n_depth) for t in tests}) == 1)


def _lines(
    result: Result, words: tuple[str, str, str, str], field: str, belongs: Callable[[Case, Case], bool]
) -> Chart | None:
    """Tokens per second against a field of the tests; None where no run has two points.

    Args:
        result: what was measured.
        words: name and title of the chart, the axis, and the axis in a table's head.
        field: of a `Case`.
        belongs: whether a generation is on the line of the first one of its run.
    """
    name, title, axis, short = words
    series: list[tuple[Run, dict[int, Measured]]] = []
    for run in result.runs:
        entries = run.find("generation")
        on_line = [entry for entry in reversed(entries) if belongs(entry.test, entries[0].test)]
        points = dict(sorted({getattr(entry.test, field): entry for entry in on_line}.items()))
        if len(points) > 1:
            series.append((run, points))
    if not series:
        return None
    ticks = sorted({x for _, points in series for x in points})

    def draw(axes: Any) -> None:
        for run, points in series:
            rates, errors = ([getattr(e, part) for e in points.values()] for part in ("avg_ts", "stddev_ts"))
            colour = _colour(result, run)
            axes.errorbar(list(points), rates, errors, color=colour, marker="o", markersize=4, linewidth=1.6)
        if field == "n_parallel":
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(axis)
        axes.set_title("tokens/s", loc="left", fontsize=9.5, color=_MUTED)
        if len(series) < 2:
            return
        # Each line's name at its end, moved up where it would lie on another.
        least, height = axes.get_ylim()[1] / 14, float("-inf")
        for run, points in sorted(series, key=lambda line: line[1][max(line[1])].avg_ts):
            height = max(points[max(points)].avg_ts, height + least)
            end, colour = (max(points), height), _colour(result, run)
            _write(axes, label(result, run), end, (8, 0), color=colour, va="center")

    rows = [
        (f"{tick:,}", *(f"{points[tick].avg_ts:,.1f}" if tick in points else "–" for _, points in series))
        for tick in ticks
    ]
    titles = (short, *(label(result, run) for run, _ in series)) if len(series) > 1 else (short, "tokens/s")
    return _chart(name, title, titles, rows, 2.7, draw)


def latencies(result: Result) -> Chart | None:
    """How the time between tokens is distributed: a row for each generation, for the first of each of several runs."""
    several = len(result.runs) > 1
    entries = [(run, entry) for run in result.runs for entry in run.find("generation")[: 1 if several else None]]
    if not entries:
        return None
    names = [label(result, run) if several else entry.test.name for run, entry in entries]
    rows = [
        (name, *(f"{three_digits((latency(entry)[point] or 0) / 1e6)} ms" for point in ("p5", "median", "p95")))
        for name, (_, entry) in zip(names, entries, strict=True)
    ]
    edge = max(percentile(entry.itl_ns, 99) for _, entry in entries) / 1e6 * 1.05

    def draw(axes: Any) -> None:
        for place, (name, (run, entry)) in enumerate(reversed(list(zip(names, entries, strict=True)))):
            _ridge(axes, place, [step / 1e6 for step in entry.itl_ns], edge, _colour(result, run), name)
        axes.set_ylim(-0.05, len(entries))
        axes.set_xlim(0, edge)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds between tokens")

    titles = ("", "5 %", "median", "95 %")
    return _chart("latency", "Time between tokens", titles, rows, 0.75 + 0.7 * len(entries), draw)


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
    axes.plot([middle, middle], [place, place + 0.6], color=_INK, linewidth=1.2)
    axes.annotate(f"{three_digits(middle)} ms", (middle, place + 0.62), ha="center", va="bottom", fontsize=9)
    right = middle < edge / 2
    axes.annotate(name, (edge if right else 0, place + 0.25), ha="right" if right else "left", color=_MUTED)


def first_use(result: Result) -> Chart | None:
    """From the start of a process to the first token, beside the first token of a model that is loaded."""
    bars: list[_Bar] = []
    rows: list[tuple[str, ...]] = []
    for run in result.runs:
        if run.cold is None:
            continue
        cold, warm = run.cold, run.find("answer")[:1]
        parts = (cold.import_seconds, cold.load_seconds, cold.first_token_seconds)
        whole = f"{cold.start_to_token_seconds:.2f} s"
        bars.append((_name(result, run, "fresh process"), list(zip(parts, _SERIES, strict=False)), whole))
        first, then = "–", "–"
        if warm:
            seconds = mean(warm[0].ttft_ns) / 1e9
            first, then = f"{seconds * 1e3:,.1f} ms", f"{mean([sample.rate for sample in warm[0].samples]):,.1f}"
            bars.append((_name(result, run, "loaded and warm"), [(seconds, _SERIES[2])], first))
        rows += [
            (_name(result, run, "import"), f"{parts[0]:.2f} s", "–"),
            (_name(result, run, "load"), f"{parts[1]:.2f} s", "–"),
            (_name(result, run, "first token"), f"{parts[2] * 1e3:,.1f} ms", first),
            (_name(result, run, "then, tokens/s"), f"{cold.generation_rate:,.1f}", then),
        ]
    return _bars("first-use", "Time to the first token", ("", "cold", "warm"), rows, bars, "seconds")


def memory(result: Result) -> Chart | None:
    """Peaks of memory beside the size of the weight files."""
    bars: list[_Bar] = []
    for run in result.runs:
        colour = _colour(result, run)
        for name, count, paint in (
            ("weight files", run.model["size_bytes"], _MUTED),
            ("GPU, allocated by this process", run.memory.allocator, colour),
            ("GPU, in use by everything", run.memory.device, colour),
            ("host, resident", run.memory.host, colour),
        ):
            if count is not None:
                bars.append((_name(result, run, name), [(count / MIB, paint)], mib(count)))
    rows = [(name, end.removesuffix(" MiB")) for name, _, end in bars]
    return _bars("memory", "Peak memory", ("", "MiB"), rows, bars, "MiB")


def shares(result: Result) -> Chart | None:
    """How close each test comes to its limit."""
    bars: list[_Bar] = []
    rows = []
    for run, entry in result.measured():
        if (limit := limits.limit(run, entry)) is None:
            continue
        taken = entry.step_ns if entry.test.kind == "generation" else entry.avg_ns
        times = (f"{three_digits(limit.ns / 1e6)} ms", f"{three_digits(taken / 1e6)} ms")
        rows.append((_name(result, run, entry.test.name), f"{limit.share:.1%}", *times))
        percent = 100 * limit.share
        pieces = [(percent, _colour(result, run)), (max(0.0, 100 - percent), _GRID)]
        name = _name(result, run, f"{entry.test.name}, {limit.what}")
        bars.append((name, pieces, f"{percent:.0f} %" if percent >= 1 else f"{percent:.1f} %"))
    return _bars("limit", "Share of the hardware's limit", ("", "share", "least", "measured"), rows, bars, "")


def _bars(
    name: str, title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], bars: Sequence[_Bar], unit: str
) -> Chart | None:
    """Horizontal bars, each under its name; without a scale where there is no unit."""
    if not bars:
        return None
    longest = max(sum(length for length, _ in pieces) for _, pieces, _ in bars)

    def draw(axes: Any) -> None:
        for place, (text, pieces, end) in enumerate(reversed(bars)):
            left = 0.0
            for length, colour in pieces:
                axes.barh(place, length, left=left, height=0.36, color=colour)
                left += length
            _write(axes, end, (left, place), (5, 0), va="center")
            axes.annotate(text, (0, place + 0.22), va="bottom", color=_MUTED)
        axes.set_ylim(-0.4, len(bars) - 0.3)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        if unit:
            axes.set_xlim(0, longest * 1.25 or 1)
            axes.set_xlabel(unit)
        else:
            axes.set_xlim(0, longest)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)

    return _chart(name, title, titles, rows, (0.75 if unit else 0.3) + 0.5 * len(bars), draw)


def _name(result: Result, run: Run, rest: str) -> str:
    return f"{label(result, run)}: {rest}" if len(result.runs) > 1 else rest


def _colour(result: Result, run: Run) -> str:
    return _SERIES[result.runs.index(run) % len(_SERIES)]


def _write(axes: Any, text: str, place: tuple[float, float], offset: tuple[int, int], **style: str) -> None:
    """Text at so many points from a place."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", **style)


def _chart(
    name: str,
    title: str,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    height: float,
    draw: Callable[[Any], None],
) -> Chart:
    """A chart of these figures, with a title and the figures once more for those who do not see it.

    Args:
        name: begins the ids in it, and differs from those of the page's other charts.
        title: what it shows.
        titles, rows: see `Chart`.
        height: in inches.
        draw: draws into matplotlib's axes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    description = "; ".join(
        ", ".join(f"{head} {cell}".strip() for head, cell in zip(titles, row, strict=True)) for row in rows
    )
    with matplotlib.rc_context({"svg.hashsalt": name}, Path(__file__).with_name("report.mplstyle")):
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # matplotlib starts its numbers again in every drawing; on one page names have to differ.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0] if box else ""} '
        f'role="img" aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return Chart(head + svg[svg.index(">", svg.index("<svg")) + 1 :], titles, rows)
