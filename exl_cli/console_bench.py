"""What `exl bench` shows: how far it is, the figures of a result, the differences between two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from exl_cli.bench import files, limits, outputs
from exl_cli.bench.compare import LEAST, LEVEL, Comparison, Figure, Row
from exl_cli.bench.result import Measured, Result, Run, mean
from exl_cli.console import Console, harmless
from exl_cli.console_models import cells, show, table

if TYPE_CHECKING:
    from exl_cli.bench.runner import Progress

_LINE_EVERY_SECONDS = 30.0
_MARKS = {
    "faster": "faster",
    "slower": "SLOWER",
    "same": "no difference",
    "noise": "in the noise",
    "unclear": "too few -r",
}
_STYLES = {"faster": "green", "slower": "bold red", "same": "dim", "noise": "dim", "unclear": "yellow"}
_NAME_WIDTH = 12


class Live:
    """Tells how a benchmark is going; see `bench.runner.Observer`. A bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._bar: Any = None
        self._task: Any = None
        self._last_line = float("-inf")
        self._model = ""

    def start(self) -> None:
        """Show the bar."""
        if self._console.quiet or not self._console.err.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        what = TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3)
        )
        bar = BarColumn(table_column=Column(ratio=1))
        left = TextColumn("{task.fields[left]}", markup=False)
        self._bar = Progress(
            what, bar, MofNCompleteColumn(), left, console=self._console.err, expand=True, transient=True
        )
        self._task = self._bar.add_task("starting", total=None, left="")
        self._bar.start()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, message: str) -> None:
        """See `bench.runner.Observer.note`."""
        self._console.note(message)

    def update(self, progress: Progress) -> None:
        """See `bench.runner.Observer.update`."""
        left = "" if progress.eta_seconds is None else f"{_duration(progress.eta_seconds)} left"
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=harmless(progress.what),
                total=progress.total,
                completed=progress.done,
                left=left,
            )
            return
        now, model = self._clock(), progress.what.rpartition(": ")[0]
        if model != self._model or now - self._last_line >= _LINE_EVERY_SECONDS:
            self._model, self._last_line = model, now
            self._console.note(f"{progress.done}/{progress.total} {progress.what}{left and ', ' + left}")


@contextmanager
def progress(console: Console) -> Iterator[Live]:
    """A `Live` whose bar is gone when it is left, however that happens."""
    live = Live(console)
    live.start()
    try:
        yield live
    finally:
        live.stop()


def tables(console: Console, result: Result) -> None:
    """The whole result, on stdout."""
    for run in result.runs:
        _heading(console, run)
        show(console, _tests(run))
        for name, text in _lines(run):
            _fact(console, name, text)
        console.text("\n")
    _fact(console, "machine", outputs.machine(result))
    settings = result.settings
    _fact(
        console,
        "method",
        f"{settings.repetitions} repetitions in random order, seed {settings.seed}, mean ± deviation; sampling and "
        "decoding are timed, loading and tokenizing are not",
    )


def doubts(console: Console, result: Result) -> None:
    """What to know before trusting the figures, on stderr beside any format."""
    for warning in result.warnings:
        console.note(f"note: {warning}")
    if result.partial:
        console.note(f"partial: {result.partial}")


def _heading(console: Console, run: Run) -> None:
    from rich.text import Text

    facts = [outputs.size_text(run.model["size_bytes"]), outputs.parameters_text(run.model["parameters"])]
    facts += [str(run.engine["name"]), f"cache {run.cache}"]
    console.out.print(Text.assemble((harmless(run.label), "bold"), harmless(f"  {', '.join(facts)}")), soft_wrap=True)


def _tests(run: Run) -> Any:
    energy = any(entry.joules_per_token is not None for entry in run.tests)
    guessed = any(entry.acceptance is not None for entry in run.tests)
    titles = ["test", "tokens/s", "of limit", "ms/token p5 · 50 · 95", "first token"]
    titles += ["J/token"] * energy + ["accepted"] * guessed
    made = table(*titles, right=titles[1:])
    for entry in run.tests:
        if not entry.samples:
            continue
        limit = limits.limit(run, entry)
        row = [entry.test.name, _rate(entry)]
        row += ["-" if limit is None else f"{limit.share:.0%}", _latencies(entry), _ms(mean(entry.first_token_ns))]
        if energy:
            row.append("-" if entry.joules_per_token is None else f"{entry.joules_per_token:.3g}")
        if guessed:
            row.append("-" if entry.acceptance is None else f"{entry.acceptance:.0%}")
        made.add_row(*cells(*row))
    return made


def _rate(entry: Measured) -> str:
    digits = 0 if entry.avg_ts >= 1000 else 1 if entry.avg_ts >= 10 else 2
    return f"{entry.avg_ts:,.{digits}f} ± {entry.stddev_ts:,.{digits}f}"


def _latencies(entry: Measured) -> str:
    found = files.latency(entry)
    if found["median"] is None:
        return "-"
    return " · ".join(outputs.three_digits((found[name] or 0) / 1e6) for name in ("p5", "median", "p95"))


def _lines(run: Run) -> list[tuple[str, str]]:
    found = []
    if run.cold is not None:
        cold = run.cold
        found.append(
            (
                "cold",
                f"import {cold.import_seconds:.1f} s, load {cold.load_seconds:.1f} s, first token "
                f"{_ms(cold.sample.ttft_ns)}, then {cold.generation_rate:,.1f} tokens/s",
            )
        )
        if warm := run.find("answer"):
            rates = [1e9 * len(s.itl_ns) / sum(s.itl_ns) for s in warm[0].samples if s.itl_ns]
            found.append(("warm", f"first token {_ms(mean(warm[0].first_token_ns))}, then {mean(rates):,.1f} tokens/s"))
    found.append(("memory", _memory(run)))
    if run.perplexity is not None:
        value = run.perplexity
        passes = f", {value.step} tokens a pass" if value.step else ""
        found.append(
            (
                "perplexity",
                f"{value.value:.4f} ± {value.error:.4f} over {value.tokens:,} tokens, window {value.window:,}, "
                f"stride {value.stride:,}{passes}",
            )
        )
    if run.probe is not None:
        found.append(
            (
                "limits",
                f"memory {run.probe.bytes_per_second / 1e9:,.0f} GB/s, {run.probe.dtype} matrix product "
                f"{run.probe.flops / 1e12:,.3g} TFLOP/s",
            )
        )
    found += [(entry.test.name, text) for entry in run.tests if (text := limits.verdict(run, entry))]
    return found


def _memory(run: Run) -> str:
    parts = [f"{(run.memory.host or 0) / 2**20:,.0f} MiB resident"]
    if run.memory.allocator is not None:
        parts.insert(0, f"GPU {run.memory.allocator / 2**20:,.0f} MiB allocated")
    if run.memory.device is not None:
        parts.insert(1, f"{run.memory.device / 2**20:,.0f} MiB in use on the card")
    return f"{', '.join(parts)} (peaks)"


def _fact(console: Console, name: str, text: str) -> None:
    """A line of the form "name  text", wrapped under its text on a terminal."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not console.out.is_terminal:
        console.text(harmless(f"  {name:<{_NAME_WIDTH}} {text}\n"))
        return
    made = Table.grid(padding=(0, 1))
    made.add_column(min_width=_NAME_WIDTH, no_wrap=True)
    made.add_column(overflow="fold")
    made.add_row(Text(harmless(name), style="bold"), Text(harmless(text)))
    console.out.print(Padding(made, (0, 0, 0, 2)))


def comparison(console: Console, found: Comparison, *, on_stdout: bool) -> None:
    """What differs between two results: on stdout as asked-for data, on stderr beside another format."""
    if not on_stdout:
        for row in found.rows:
            console.note(f"{row.test}: {_change(row.before, row.after)}, {_MARKS[row.mark]}")
        return
    pairs = [(row.model, row.cache) for row in found.rows] + [(f.model, f.cache) for f in found.figures]
    for model, cache in dict.fromkeys(pairs):
        _fact(console, "compared", f"{model}, cache {cache}")
        rows = [row for row in found.rows if (row.model, row.cache) == (model, cache)]
        show(console, _differences(rows))
        for figure in found.figures:
            if (figure.model, figure.cache) == (model, cache):
                _fact(console, figure.name, _figure(figure))
        console.text("\n")
    for name, before, after in found.changed:
        _fact(console, "changed", f"{name}: {before} → {after}")
    for name in found.missing:
        console.note(f"only in one of the two: {name}")
    if not found.rows:
        console.note("the two have no test in common")
        return
    _fact(console, "verdict", _verdict(found))
    if found.disturbed:
        console.note("other programs used the processor during one of the two: a difference may be theirs")
    if found.doubtful:
        tests = ", ".join(dict.fromkeys(found.doubtful))
        console.note(
            f"{tests}: the GPU waits for the CPU there, whose pace differs from one process to the next; repeat both"
        )


def fails(console: Console, found: Comparison, bound: float) -> bool:
    """Whether a test fell under a share of its old rate, said on stderr test by test."""
    failing = found.failing(bound)
    for row in found.rows:
        if row in failing:
            console.note(f"{row.test} is at {row.ratio:.3f} of the saved result, under {bound:g}")
        elif row.ratio < bound:
            console.note(f"{row.test} is at {row.ratio:.3f}, which its repetitions cannot tell from chance; raise -r")
    return bool(failing)


def _verdict(found: Comparison) -> str:
    rule = f"p < {LEVEL:g} in a permutation test and at least {LEAST:.0%}"
    if not found.differs:
        if any(row.mark == "unclear" for row in found.rows):
            return "too few repetitions to tell; use -r 5 or more"
        noise = any(row.mark == "noise" for row in found.rows)
        return f"no difference{' that stands out from the noise' if noise else ''} ({rule})"
    counts = {mark: sum(row.mark == mark for row in found.rows) for mark in ("faster", "slower")}
    parts = [f"{count} {mark}" for mark, count in counts.items() if count]
    return f"{' and '.join(parts)} of {len(found.rows)} tests ({rule})"


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


def _ms(nanoseconds: float) -> str:
    return f"{outputs.three_digits(nanoseconds / 1e6)} ms"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"
