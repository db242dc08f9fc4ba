"""What `exl bench` shows: how far it is, the figures of a result, the differences between two."""

from __future__ import annotations

import time

from exl_cli.bench import limits, outputs
from exl_cli.bench.compare import LEAST, LEVEL, Comparison, Figure, Row
from exl_cli.bench.outputs import milliseconds
from exl_cli.bench.result import Result, Run, mean
from exl_cli.system.units import mib
from exl_cli.ui.console import Console
from exl_cli.ui.progress import Live

_LINE_EVERY_SECONDS = 30.0
_NAME_WIDTH = 12

_MARKS = {
    "faster": "faster",
    "slower": "SLOWER",
    "same": "no difference",
    "noise": "within noise",
    "unclear": "raise -r",
}
_STYLES = {"faster": "green", "slower": "bold red", "same": "dim", "noise": "dim", "unclear": "yellow"}


class Measuring(Live):
    """A benchmark; see `bench.runner.Observer`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._last_line = float("-inf")
        self._model = ""

    def __enter__(self) -> Measuring:
        if self._console.is_live:
            self._count("starting", 0, None)
        return self

    def update(self, what: str, done: int, total: int, eta_seconds: float | None) -> None:
        left = "" if eta_seconds is None else f"{_duration(eta_seconds)} left"
        if self._console.is_live:
            self._count(what, done, total, left)
            return
        now, model = time.monotonic(), what.rpartition(": ")[0]
        if model != self._model or now - self._last_line >= _LINE_EVERY_SECONDS:
            self._model, self._last_line = model, now
            self.note(f"{done}/{total} {what}{left and ', ' + left}")


def tables(console: Console, result: Result) -> None:
    """The whole result, on stdout."""
    for run in result.runs:
        _heading(console, run)
        if run.tests:
            titles, rows = outputs.test_table(run)
            console.table(console.out, titles, rows, right=titles[1:])
        for name, text in _lines(run):
            _fact(console, name, text)
        console.text("\n")
    _fact(console, "machine", outputs.machine(result))
    count, seed = result.settings.repetitions, result.settings.seed
    order = f"{outputs.repetitions_text(count)} in random order, seed {seed}{', mean ± deviation' * (count > 1)}"
    _fact(console, "method", f"{order}; sampling and decoding are timed, loading and tokenizing are not")


def doubts(console: Console, result: Result) -> None:
    """What to know before trusting the figures, on stderr beside any format."""
    for warning in result.warnings:
        console.note(f"note: {warning}")
    if result.partial:
        console.note(f"partial: {result.partial}")


def _heading(console: Console, run: Run) -> None:
    facts = [outputs.size_text(run.model["size_bytes"]), outputs.parameters_text(run.model["parameters"])]
    facts += [str(run.engine.get("name")), f"cache {run.cache}"]
    console.line((run.label, "bold"), f"  {', '.join(facts)}", to=console.out)


def _lines(run: Run) -> list[tuple[str, str]]:
    lines = []
    if cold := run.cold:
        started = f"import {cold.import_seconds:.1f} s, load {cold.load_seconds:.1f} s"
        first = f"first token {milliseconds(cold.sample.ttft_ns)}, then {cold.generation_rate:,.1f} tokens/s"
        lines.append(("cold", f"{started}, {first}"))
        if warm := run.find("answer"):
            rate = mean([sample.rate for sample in warm[0].samples])
            lines.append(("warm", f"first token {milliseconds(mean(warm[0].ttft_ns))}, then {rate:,.1f} tokens/s"))
    lines.append(("memory", _memory(run)))
    if value := run.perplexity:
        passes = f", {value.step} tokens per pass" if value.step else ""
        lines.append(("perplexity", f"{outputs.perplexity_text(value)}{passes}"))
    if probe := run.probe:
        product = f"{probe.dtype} matrix product {probe.flops / 1e12:,.3g} TFLOP/s"
        lines.append(("limits", f"memory {probe.bytes_per_second / 1e9:,.0f} GB/s, {product}"))
    return lines + limits.verdicts(run)


def _memory(run: Run) -> str:
    parts = [f"{mib(run.memory.host or 0)} resident"]
    if run.memory.allocator is not None:
        by_gpu = ", ".join(f"{name} {mib(peak)}" for name, peak in run.memory.by_gpu.items())
        several = f" ({by_gpu})" if len(run.memory.by_gpu) > 1 else ""
        parts.insert(0, f"GPU {mib(run.memory.allocator)} allocated{several}")
    if run.memory.device is not None:
        parts.insert(1, f"{mib(run.memory.device)} in use on the card")
    return f"{', '.join(parts)} (peaks)"


def comparison(console: Console, result: Comparison, *, on_stdout: bool) -> None:
    """What differs between two results: on stdout as asked-for data, on stderr beside another format."""
    if not on_stdout:
        for row in result.rows:
            console.note(f"{row.test}: {_change(row.before, row.after)}, {_MARKS[row.mark]}")
        return
    pairs = [(row.model, row.cache) for row in result.rows] + [(f.model, f.cache) for f in result.figures]
    for model, cache in dict.fromkeys(pairs):
        _fact(console, "compared", f"{model}, cache {cache}")
        rows = [row for row in result.rows if (row.model, row.cache) == (model, cache)]
        _differences(console, rows)
        for figure in result.figures:
            if (figure.model, figure.cache) == (model, cache):
                _fact(console, figure.name, _figure(figure))
        console.text("\n")
    for name, before, after in result.changed:
        _fact(console, "changed", f"{name}: {before} → {after}")
    for name in result.missing:
        console.note(f"only in one result: {name}")
    if not result.rows:
        console.note("the results have no test in common")
        return
    _fact(console, "verdict", _verdict(result))
    if result.disturbed:
        console.note("other programs used the CPU during one of the runs, which may explain a difference")
    if result.doubtful:
        tests = ", ".join(dict.fromkeys(result.doubtful))
        console.note(
            f"{tests}: the GPU waits for the CPU, whose speed varies from process to process; repeat both runs"
        )


def fails(console: Console, result: Comparison, bound: float) -> bool:
    """Whether a test fell under a share of its old rate, said on stderr test by test."""
    for row in result.rows:
        if row.fails(bound):
            console.note(f"{row.test} is at {row.ratio:.3f} of the saved result, below {bound:g}")
        elif row.ratio < bound:
            console.note(f"{row.test} is at {row.ratio:.3f}, but not significantly; raise -r")
    return any(row.fails(bound) for row in result.rows)


def _verdict(result: Comparison) -> str:
    rule = f"p < {LEVEL:g} in a permutation test and at least {LEAST:.0%}"
    if not result.differs:
        if any(row.mark == "unclear" for row in result.rows):
            return "too few repetitions for a verdict; use -r 5 or more"
        noise = any(row.mark == "noise" for row in result.rows)
        return f"no {'significant ' if noise else ''}difference ({rule})"
    counts = {mark: sum(row.mark == mark for row in result.rows) for mark in ("faster", "slower")}
    parts = [f"{count} {mark}" for mark, count in counts.items() if count]
    return f"{' and '.join(parts)} of {len(result.rows)} tests ({rule})"


def _differences(console: Console, rows: list[Row]) -> None:
    from rich.text import Text

    titles = ["test", "before t/s", "after t/s", "change", "p", ""]
    lines = []
    for row in rows:
        line = row.test, f"{row.before:,.1f}", f"{row.after:,.1f}", f"{row.ratio - 1:+.1%}", f"{row.p:.3f}"
        lines.append((*line, Text(_MARKS[row.mark], style=_STYLES[row.mark])))
    console.table(console.out, titles, lines, right=titles[1:5])


def _figure(figure: Figure) -> str:
    unit = figure.unit and f" {figure.unit}"
    digits = "{:,.4f}" if not figure.unit else "{:,.2f}" if figure.unit == "s" else "{:,.0f}"
    both = f"{digits.format(figure.before)}{unit} → {digits.format(figure.after)}{unit}"
    change = f"{figure.after / figure.before - 1:+.1%}" if figure.before else "new"
    return f"{both} ({change}){figure.note and ', ' + figure.note}"


def _change(before: float, after: float) -> str:
    return f"{before:,.1f} → {after:,.1f} tokens/s ({after / before - 1:+.1%})"


def _fact(console: Console, name: str, text: str) -> None:
    """A line of the form "name  text", wrapped under its text on a terminal."""
    from rich.text import Text

    title = Text(f"  {name:<{_NAME_WIDTH}}", "bold", no_wrap=True)
    console.table(console.out, ("", ""), [(title, text)], box=None, padding=(0, 1, 0, 0))


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"
