"""How the report's charts are drawn: SVG by matplotlib, coloured by the page's style sheet.

Every colour is drawn as a number that stands for a CSS variable and is replaced by it afterwards, so that one drawing
serves light, dark and paper. Text stays text. Charts are made narrow, so that a phone can show them at full size.
"""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exl_cli.bench.result import Result, Run
from exl_cli.errors import UsageError

# Colours to draw with, and what they become.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule", PAPER: "--paper"}
_VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)}

_WIDTH = 4.7
_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
}


@dataclass(frozen=True)
class Chart:
    """A chart and the figures in it.

    Attributes:
        svg: an SVG element.
        titles, rows: the same figures as a table, its first column in words.
    """

    svg: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


def require() -> None:
    """Say in time that the report cannot be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--report needs matplotlib, which is not installed", "pip install 'exl-cli[report]'")


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


def colour_of(result: Result, run: Run) -> str:
    """What to draw a run with."""
    return SERIES[result.runs.index(run) % len(SERIES)]


def svg_of(name: str, title: str, description: str, height: float, draw: Callable[[Any], None], rows: int = 1) -> str:
    """An SVG element with a title and a description for those who do not see it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
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
    # matplotlib numbers its elements in every drawing anew; on one page names have to differ.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0] if box else ""} '
        f'role="img" aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return head + svg[svg.index(">", svg.index("<svg")) + 1 :]
