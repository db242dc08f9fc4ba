"""The report's bar charts: first use, memory, share of the limit. See `charts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exl_cli.bench import limits
from exl_cli.bench.drawing import GRID, MUTED, SERIES, Chart, colour_of, label, svg_of
from exl_cli.bench.outputs import three_digits
from exl_cli.bench.result import Result, Run, mean, rate_of

# The parts of a first use, in the order in which they happen; the style sheet's key names them alike.
FIRST_USE = ("import", "load", "first token")

Bar = tuple[str, Sequence[tuple[float, str]], str]


def first_use(result: Result) -> Chart | None:
    """From the start of a process to the first token, beside the first token of a model that is loaded."""
    bars: list[Bar] = []
    rows: list[tuple[str, ...]] = []
    for run in result.runs:
        if run.cold is None:
            continue
        cold, warm = run.cold, run.find("answer")[:1]
        parts = (cold.import_seconds, cold.load_seconds, cold.first_token_seconds)
        whole = f"{cold.start_to_token_seconds:.2f} s"
        bars.append((_name(result, run, "fresh process"), list(zip(parts, SERIES, strict=False)), whole))
        first = "–"
        if warm:
            seconds = mean(warm[0].first_token_ns) / 1e9
            first = f"{seconds * 1e3:,.1f} ms"
            bars.append((_name(result, run, "loaded and warm"), [(seconds, SERIES[2])], first))
        rates = [rate_of(sample) for entry in warm for sample in entry.samples]
        rows += [
            (_name(result, run, "import"), f"{parts[0]:.2f} s", "–"),
            (_name(result, run, "load"), f"{parts[1]:.2f} s", "–"),
            (_name(result, run, "first token"), f"{parts[2] * 1e3:,.1f} ms", first),
            (
                _name(result, run, "then, tokens/s"),
                f"{cold.generation_rate:,.1f}",
                f"{mean(rates):,.1f}" if rates else "–",
            ),
        ]
    if not bars:
        return None
    described = "; ".join(f"{name}: {end}" for name, _, end in bars)
    return Chart(_bars("first-use", "Time to the first token", described, bars, "seconds"), ("", "cold", "warm"), rows)


def memory(result: Result) -> Chart | None:
    """Peaks of memory beside the size of the weight files."""
    bars: list[Bar] = []
    for run in result.runs:
        colour = colour_of(result, run)
        for name, count, paint in (
            ("weight files", run.model["size_bytes"], MUTED),
            ("GPU, allocated by this process", run.memory.allocator, colour),
            ("GPU, in use by everything", run.memory.device, colour),
            ("host, resident", run.memory.host, colour),
        ):
            if count is not None:
                bars.append((_name(result, run, name), [(count / 2**20, paint)], f"{count / 2**20:,.0f} MiB"))
    if not bars:
        return None
    rows = [(name, end.removesuffix(" MiB")) for name, _, end in bars]
    described = "; ".join(f"{name} {end}" for name, _, end in bars)
    return Chart(_bars("memory", "Peak memory", described, bars, "MiB"), ("", "MiB"), rows)


def shares(result: Result) -> Chart | None:
    """How close each test comes to its limit."""
    found = [(run, entry, limit) for run, entry in result.measured() if (limit := limits.limit(run, entry))]
    if not found:
        return None
    rows = []
    for run, entry, limit in found:
        taken = entry.step_ns if entry.test.kind == "generation" else entry.avg_ns
        times = (f"{three_digits(limit.ns / 1e6)} ms", f"{three_digits(taken / 1e6)} ms")
        rows.append((_name(result, run, entry.test.name), f"{limit.share:.1%}", *times))

    def draw(axes: Any) -> None:
        for place, (run, entry, limit) in enumerate(reversed(found)):
            percent = 100 * limit.share
            axes.barh(place, 100, height=0.36, color=GRID)
            axes.barh(place, percent, height=0.36, color=colour_of(result, run))
            text = f"{percent:.0f} %" if percent >= 1 else f"{percent:.1f} %"
            axes.annotate(text, (max(percent, 100), place), xytext=(5, 0), textcoords="offset points", va="center")
            name = _name(result, run, f"{entry.test.name}, {limit.what}")
            axes.annotate(name, (0, place + 0.22), va="bottom", color=MUTED)
        axes.set_ylim(-0.4, len(found) - 0.3)
        axes.set_xlim(0, max(100.0, *(100 * limit.share for *_, limit in found)))
        axes.set_xticks([])
        axes.set_yticks([])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    described = "; ".join(f"{name}: {share} of its limit" for name, share, *_ in rows)
    svg = svg_of("limit", "Share of the hardware's limit", described, 0.3 + 0.5 * len(found), draw)
    return Chart(svg, ("", "share", "least", "measured"), rows)


def _name(result: Result, run: Run, rest: str) -> str:
    return f"{label(result, run)}: {rest}" if len(result.runs) > 1 else rest


def _bars(name: str, title: str, description: str, bars: Sequence[Bar], unit: str) -> str:
    """Horizontal bars, each under its name: pieces of a length and a colour, and what is written at their end."""
    longest = max(sum(length for length, _ in pieces) for _, pieces, _ in bars)

    def draw(axes: Any) -> None:
        for place, (text, pieces, end) in enumerate(reversed(bars)):
            left = 0.0
            for length, colour in pieces:
                axes.barh(place, length, left=left, height=0.36, color=colour)
                left += length
            axes.annotate(end, (left, place), xytext=(5, 0), textcoords="offset points", va="center")
            axes.annotate(text, (0, place + 0.22), va="bottom", color=MUTED)
        axes.set_ylim(-0.4, len(bars) - 0.3)
        axes.set_xlim(0, longest * 1.25 or 1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)

    return svg_of(name, title, description, 0.75 + 0.5 * len(bars), draw)
