"""The report: one HTML file with everything in it, readable on a screen, light or dark, on paper and on a phone.

It needs no network and no script. `report.html` is the page around it all, with the style sheet. Every chart stands
beside a table with its figures. Charts are SVG by matplotlib, their text as text, narrow enough for a phone to show
them at full size. Every colour is drawn as a number that stands for a CSS variable and is replaced by it afterwards:
one drawing serves light, dark and paper.
"""

from __future__ import annotations

import importlib.util
import io
import re
import string
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from exl_cli.bench import limits, outputs
from exl_cli.bench.outputs import milliseconds, three_digits
from exl_cli.bench.plan import Case
from exl_cli.bench.result import Measured, Result, Run, mean, percentile
from exl_cli.errors import UsageError, param
from exl_cli.sampling import Sampling
from exl_cli.system.units import MIB, mib

Row = Sequence[object]

# A name, pieces of a length and a colour, and the text at their end.
_Bar = tuple[str, Sequence[tuple[float, str]], str]

# Colours to draw with, as in report.mplstyle, and what they become.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
_SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06")
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--rule", _PAPER: "--paper"}
_VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(_SERIES, 1)}

_WIDTH = 4.7  # of a chart, in inches
_BINS = 60

# The parts of a first use, in the order in which they happen; chart and key name them alike.
_FIRST_USE = ("import", "load", "first token")

# Sampler settings that are shown even where they are the usual ones.
_ALWAYS_SHOWN = ("temperature", "top_k", "top_p", "token_repetition_penalty")


def require_matplotlib() -> None:
    """UsageError if matplotlib, which draws the charts, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        problem = f"{param('report')} needs matplotlib, which is not installed"
        raise UsageError(problem, "run pip install 'exl-cli[report]'")


def page(result: Result) -> str:
    """The whole file."""
    report = _Report(result)
    key = "".join(f'<span class="key s{place}">{name}</span> ' for place, name in enumerate(_FIRST_USE, 1))
    every = "Each new token attends to all earlier ones, so a longer context makes every step slower."
    shared = "Requests computed together share one read of the weights."
    often = "Distribution over all repetitions; the line is the median."
    fresh = f"<span>What a new process does before its first token:</span> {key}"
    bounds = "For generation, reading weights and KV cache once per step at the measured bandwidth; for a prompt, "
    bounds += "the measured rate of a large matrix product."
    lower = "Lower is better. Same text for each setting: a faster one with different output shows here."
    sections = [
        report.warnings(),
        *(report.run(run) for run in result.runs),
        _section("Generation by context depth", every, report.depths()),
        _section("Throughput by batch size", shared, report.batches()),
        _section("Time between tokens", often, report.latencies()),
        _section("Cold and warm start", fresh, report.first_use()),
        _section("Share of the limit", bounds, report.shares()),
        _section("Memory", "Peaks, next to the weight files on disk.", report.memory()),
        _section("Perplexity", lower, report.perplexities()),
        report.method(),
        report.environment(),
    ]
    template = string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(", ".join(dict.fromkeys(run.label for run in result.runs)) or "nothing measured"),
        version=escape(result.exl_version),
        machine=escape(outputs.machine(result)),
        started=escape(result.started.replace("T", " ").replace("Z", " UTC")),
        seconds=f"{result.seconds:,.0f}",
        repetitions=outputs.repetitions_text(result.settings.repetitions),
        seed=result.settings.seed,
        body="\n".join(filter(None, sections)),
    )


class _Report:
    """The sections of a result; empty where there is nothing to say."""

    def __init__(self, result: Result) -> None:
        self.result, self.runs = result, result.runs
        self.several = len(self.runs) > 1

    def label(self, run: Run) -> str:
        """What to call a run beside the others: as little as tells them apart."""
        labels = {other.label for other in self.runs}
        parts = []
        if len(labels) > 1:
            parts.append(run.short_name if len({other.short_name for other in self.runs}) == len(labels) else run.label)
        if len({other.cache for other in self.runs}) > 1:
            parts.append(f"cache {run.cache}")
        return ", ".join(parts) or run.short_name

    def name(self, run: Run, rest: str) -> str:
        return f"{self.label(run)}: {rest}" if self.several else rest

    def colour(self, run: Run) -> str:
        """The colour of a run in all charts."""
        return _SERIES[self.runs.index(run) % len(_SERIES)]

    def warnings(self) -> str:
        notes = [f"Incomplete: {self.result.partial}."] if self.result.partial else []
        notes += [*self.result.warnings, *self.result.skipped]
        return f'<aside aria-label="Notes">{_list(map(escape, notes))}</aside>' if notes else ""

    def run(self, run: Run) -> str:
        """The few numbers that most readers come for, all tests, and what holds them back."""
        if not run.tests:
            return ""
        verdicts = [f"<b>{escape(name)}</b> is {escape(text)}" for name, text in limits.verdicts(run)]
        holds = f"<h3>Bottleneck</h3>{_list(verdicts)}" if verdicts else ""
        title = self.label(run) if self.several else "Results"
        tests = _table(*outputs.test_table(run))
        return f"<section><h2>{escape(title)}</h2>{_key_figures(run)}{tests}{holds}</section>"

    def depths(self) -> str:
        words = ("depth", "Generation by context depth", "tokens of context", "depth")
        return self._lines(words, "n_depth", lambda test, first: (test.n_parallel, test.n_gen) == (1, first.n_gen))

    def batches(self) -> str:
        words = ("batch", "Throughput by batch size", "concurrent requests", "requests")
        return self._lines(words, "n_parallel", lambda *tests: len({(t.n_gen, t.n_depth) for t in tests}) == 1)

    def _lines(self, words: tuple[str, str, str, str], field: str, belongs: Callable[[Case, Case], bool]) -> str:
        """Tokens per second against a field of `Case`, a line for each run; empty where none has two points.

        `words` are name and title of the chart, the axis, and the axis in a table's head; `belongs` says whether a
        generation is on the line of the first one of its run.
        """
        name, title, axis, short = words
        series: list[tuple[Run, dict[int, Measured]]] = []
        for run in self.runs:
            entries = run.find("generation")
            on_line = [entry for entry in reversed(entries) if belongs(entry.test, entries[0].test)]
            points = dict(sorted({getattr(entry.test, field): entry for entry in on_line}.items()))
            if len(points) > 1:
                series.append((run, points))
        if not series:
            return ""
        ticks = sorted({x for _, points in series for x in points})

        def draw(axes: Any) -> None:
            for run, points in series:
                rates, errors = (
                    [getattr(entry, part) for entry in points.values()] for part in ("avg_ts", "stddev_ts")
                )
                style = {"color": self.colour(run), "marker": "o", "markersize": 4, "linewidth": 1.6}
                axes.errorbar(list(points), rates, errors, **style)
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
                _write(axes, self.label(run), (max(points), height), (8, 0), color=self.colour(run), va="center")

        rows = [
            (f"{tick:,}", *(f"{points[tick].avg_ts:,.1f}" if tick in points else "–" for _, points in series))
            for tick in ticks
        ]
        heads = [self.label(run) for run, _ in series] if len(series) > 1 else ["tokens/s"]
        return _chart(name, title, (short, *heads), rows, 2.7, draw)

    def latencies(self) -> str:
        """How the time between tokens is distributed: each generation, or the first of each of several runs."""
        most = 1 if self.several else None
        entries = [(run, entry) for run in self.runs for entry in run.find("generation")[:most]]
        if not entries:
            return ""
        names = [self.label(run) if self.several else entry.test.name for run, entry in entries]
        rows = [
            (name, *(milliseconds(entry.latency[point] or 0) for point in ("p5", "median", "p95")))
            for name, (_, entry) in zip(names, entries, strict=True)
        ]
        edge = max(percentile(entry.itl_ns, 99) for _, entry in entries) / 1e6 * 1.05

        def draw(axes: Any) -> None:
            for place, (name, (run, entry)) in enumerate(reversed(list(zip(names, entries, strict=True)))):
                _ridge(axes, place, [step / 1e6 for step in entry.itl_ns], edge, self.colour(run), name)
            axes.set_ylim(-0.05, len(entries))
            axes.set_xlim(0, edge)
            _without_rows(axes)
            axes.set_xlabel("milliseconds between tokens")

        titles = ("", "5 %", "median", "95 %")
        return _chart("latency", "Time between tokens", titles, rows, 0.75 + 0.7 * len(entries), draw)

    def first_use(self) -> str:
        """From the start of a process to the first token, beside the first token of a model that is loaded."""
        bars: list[_Bar] = []
        rows: list[Row] = []
        for run in self.runs:
            if run.cold is None:
                continue
            cold, warm = run.cold, run.find("answer")[:1]
            parts = (cold.import_seconds, cold.load_seconds, cold.first_token_seconds)
            pieces = list(zip(parts, _SERIES, strict=False))
            bars.append((self.name(run, "new process"), pieces, f"{cold.start_to_token_seconds:.2f} s"))
            first, then = "–", "–"
            if warm:
                seconds = mean(warm[0].ttft_ns) / 1e9
                first, then = f"{seconds * 1e3:,.1f} ms", f"{mean([sample.rate for sample in warm[0].samples]):,.1f}"
                bars.append((self.name(run, "loaded and warm"), [(seconds, _SERIES[2])], first))
            rows += [
                (self.name(run, "import"), f"{parts[0]:.2f} s", "–"),
                (self.name(run, "load"), f"{parts[1]:.2f} s", "–"),
                (self.name(run, "first token"), f"{parts[2] * 1e3:,.1f} ms", first),
                (self.name(run, "then, tokens/s"), f"{cold.generation_rate:,.1f}", then),
            ]
        return _bars("first-use", "Time to the first token", ("", "cold", "warm"), rows, bars, "seconds")

    def memory(self) -> str:
        bars: list[_Bar] = []
        for run in self.runs:
            colour = self.colour(run)
            for name, count, paint in (
                ("weight files", run.model["size_bytes"], _MUTED),
                ("GPU, allocated by this process", run.memory.allocator, colour),
                ("GPU, in use by all programs", run.memory.device, colour),
                ("host, resident", run.memory.host, colour),
            ):
                if count is not None:
                    bars.append((self.name(run, name), [(count / MIB, paint)], mib(count)))
        rows = [(name, end.removesuffix(" MiB")) for name, _, end in bars]
        return _bars("memory", "Peak memory", ("", "MiB"), rows, bars, "MiB")

    def shares(self) -> str:
        bars: list[_Bar] = []
        rows: list[Row] = []
        for run, entry in self.result.measured():
            if (limit := limits.limit(run, entry)) is None:
                continue
            taken = entry.step_ns if entry.test.kind == "generation" else entry.avg_ns
            rows.append(
                (self.name(run, entry.test.name), f"{limit.share:.1%}", milliseconds(limit.ns), milliseconds(taken))
            )
            percent = 100 * limit.share
            pieces = [(percent, self.colour(run)), (max(0.0, 100 - percent), _GRID)]
            end = f"{percent:.0f} %" if percent >= 1 else f"{percent:.1f} %"
            bars.append((self.name(run, f"{entry.test.name}, {limit.what}"), pieces, end))
        return _bars("limit", "Share of the hardware's limit", ("", "share", "least", "measured"), rows, bars, "")

    def perplexities(self) -> str:
        rows = [
            (run.where, f"{p.value:.4f} ± {p.error:.4f}", f"{p.tokens:,}", f"{p.window:,} / {p.stride:,}")
            for run in self.runs
            if (p := run.perplexity)
        ]
        return _table(("", "perplexity", "tokens", "window / stride"), rows) if rows else ""

    def method(self) -> str:
        order = f"<h3>Order of the repetitions</h3><p class=quiet>{escape(', '.join(self.result.order))}</p>"
        return f"<section><h2>How it was measured</h2>{_list(map(escape, outputs.METHOD))}{order}</section>"

    def environment(self) -> str:
        rows: list[Row] = [(name, value) for name, value in self.result.environment.items() if value is not None]
        for run in self.runs:
            name, facts = self.label(run), ", ".join(f"{k} {v}" for k, v in run.engine.items() if k != "name")
            rows.append((f"engine of {name}", f"{run.engine.get('name')}: {facts}"))
            commit = f", commit {run.model['commit']}" if run.model.get("commit") else ""
            rows.append((f"model {name}", f"{run.model.get('architecture')}, {run.model['path']}{commit}"))
            if probe := run.probe:
                speed = f"memory {probe.bytes_per_second / 1e9:,.1f} GB/s over {probe.buffer_bytes / MIB:,.0f} MiB"
                product = f"{probe.dtype} matrix product {probe.flops / 1e12:,.3g} TFLOP/s"
                rows.append((f"measured limits, {name}", f"{speed}, {product}"))
        usual, sampling = Sampling().to_dict(), self.result.sampling
        shown = (
            f"{key} {sampling[key]}" for key in sampling if key in _ALWAYS_SHOWN or sampling[key] != usual.get(key)
        )
        rows.append(("sampling", ", ".join(shown)))
        return f"<section><h2>Environment</h2>{_table(('', ''), rows, words=2)}</section>"


def _key_figures(run: Run) -> str:
    figures = []
    if entries := run.find("generation"):
        figures.append(("generation", f"{entries[0].avg_ts:,.1f}", "tokens/s", entries[0].test.name))
    if entries := run.find("prompt"):
        figures.append(("prompt", f"{entries[0].avg_ts:,.0f}", "tokens/s", entries[0].test.name))
    if entries := run.find("answer"):
        figures.append(("first token", f"{mean(entries[0].ttft_ns) / 1e6:,.0f}", "ms", "warm"))
    if run.cold is not None:
        figures.append(("from a cold start", f"{run.cold.start_to_token_seconds:,.1f}", "s", "to the first token"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{value}</b> {unit}</dd><dd class=quiet>{escape(note)}</dd></div>"
        for name, value, unit, note in figures
    )
    return f'<dl class="key">{cells}</dl>' if cells else ""


def _section(title: str, text: str, rest: str) -> str:
    """A section, its text escaped unless it begins with a tag; empty where there is no `rest`."""
    text = text if text.startswith("<") else escape(text)
    return f"<section><h2>{escape(title)}</h2><p>{text}</p>{rest}</section>" if rest else ""


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _table(titles: Sequence[str], rows: Sequence[Row], words: int = 1) -> str:
    """A table whose first `words` columns are text, the rest numbers."""

    def line(tag: str, row: Row) -> str:
        kinds = ["" if place < words else ' class="n"' for place in range(len(row))]
        # A cell may break on a phone, but not before a unit or a deviation.
        texts = (escape(str(value)).replace(" ± ", "&nbsp;±&nbsp;").replace(" ms", "&nbsp;ms") for value in row)
        cells = (f"<{tag}{kind}>{text}</{tag[:2]}>" for kind, text in zip(kinds, texts, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    head, body = line('th scope="col"', titles), "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


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


def _bars(name: str, title: str, titles: Sequence[str], rows: Sequence[Row], bars: Sequence[_Bar], unit: str) -> str:
    """A chart of horizontal bars, each under its name; without a scale where there is no unit."""
    if not bars:
        return ""
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
        _without_rows(axes)
        if unit:
            axes.set_xlim(0, longest * 1.25 or 1)
            axes.set_xlabel(unit)
        else:
            axes.set_xlim(0, longest)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)

    return _chart(name, title, titles, rows, (0.75 if unit else 0.3) + 0.5 * len(bars), draw)


def _without_rows(axes: Any) -> None:
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def _write(axes: Any, text: str, place: tuple[float, float], offset: tuple[int, int], **style: str) -> None:
    """Text at so many points from a place."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", **style)


def _chart(
    name: str, title: str, titles: Sequence[str], rows: Sequence[Row], height: float, draw: Callable[[Any], None]
) -> str:
    """A chart beside its figures, with a title and the figures once more for those who do not see it.

    `name` begins the ids in it and is unique on the page; `height` is in inches; `draw` gets matplotlib's axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    description = "; ".join(
        ", ".join(f"{head} {cell}".strip() for head, cell in zip(titles, row, strict=True)) for row in rows
    )
    with matplotlib.rc_context({"svg.hashsalt": name}, Path(__file__).with_suffix(".mplstyle")):
        figure = Figure(figsize=(_WIDTH, height))
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # matplotlib starts its numbers again in every drawing; on one page names have to differ.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0] if box else ""} '
        f'role="img" aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    svg = head + svg[svg.index(">", svg.index("<svg")) + 1 :]
    return f'<div class="pair"><figure>{svg}</figure>{_table(titles, rows)}</div>'
