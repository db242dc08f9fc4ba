"""The report: one HTML file with everything in it, readable on a screen, light or dark, on paper and on a phone.

It needs no network and no script. Every chart stands beside a table with its figures. `report.html` is the page around
it all, with the style sheet.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from html import escape
from pathlib import Path

from exl_cli.bench import charts, limits, outputs
from exl_cli.bench.charts import Chart, label
from exl_cli.bench.result import Result, Run, mean
from exl_cli.sampling import Sampling

Row = Sequence[object]

# Sampler settings that are shown even where they are the usual ones.
_ALWAYS_SHOWN = ("temperature", "top_k", "top_p", "token_repetition_penalty")


def page(result: Result) -> str:
    """The whole file."""
    keys = "".join(f'<span class="key s{place}">{name}</span> ' for place, name in enumerate(charts.FIRST_USE, 1))
    sections = [
        _warnings(result),
        *(_run(result, run) for run in result.runs),
        _chart(
            "Generation against depth",
            "Each new token attends to all before it, so a longer context costs time at every step.",
            charts.depths(result),
        ),
        _chart(
            "Throughput against batch",
            "Requests that are computed together share one reading of the weights.",
            charts.batches(result),
        ),
        _chart(
            "Time between tokens",
            "How often each time occurs, over all repetitions; the line is the median.",
            charts.latencies(result),
        ),
        _chart(
            "Cold against warm",
            f"<span>What a fresh process does before its first token:</span> {keys}",
            charts.first_use(result),
        ),
        _chart(
            "Share of the limit",
            "Generation against reading weights and KV cache once a step at the measured bandwidth, a prompt against "
            "the measured rate of a large matrix product.",
            charts.shares(result),
        ),
        _chart("Memory", "Peaks, beside the weight files on disk.", charts.memory(result)),
        _perplexity(result),
        _method(result),
        _environment(result),
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
        body="\n".join(section for section in sections if section),
    )


def _warnings(result: Result) -> str:
    notes = [f"Not complete: {result.partial}."] if result.partial else []
    notes += [*result.warnings, *result.skipped]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<aside aria-label="What to know first"><ul>{items}</ul></aside>' if notes else ""


def _run(result: Result, run: Run) -> str:
    """The few numbers that most readers come for, all tests, and what holds them back."""
    if not run.tests:
        return ""
    items = "".join(f"<li><b>{escape(name)}</b> is {escape(text)}</li>" for name, text in limits.verdicts(run))
    holds = f"<h3>What holds it back</h3><ul>{items}</ul>" if items else ""
    title = label(result, run) if len(result.runs) > 1 else "Results"
    return f"<section><h2>{escape(title)}</h2>{_key_figures(run)}{_tests(run)}{holds}</section>"


def _key_figures(run: Run) -> str:
    figures = []
    if entries := run.find("generation"):
        figures.append(("generation", f"{entries[0].avg_ts:,.1f}", "tokens/s", entries[0].test.name))
    if entries := run.find("prompt"):
        figures.append(("prompt", f"{entries[0].avg_ts:,.0f}", "tokens/s", entries[0].test.name))
    if entries := run.find("answer"):
        figures.append(("first token", f"{mean(entries[0].ttft_ns) / 1e6:,.0f}", "ms", "warm"))
    if run.cold is not None:
        figures.append(("from nothing", f"{run.cold.start_to_token_seconds:,.1f}", "s", "to the first token"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{value}</b> {unit}</dd><dd class=quiet>{escape(note)}</dd></div>"
        for name, value, unit, note in figures
    )
    return f'<dl class="key">{cells}</dl>' if cells else ""


def _tests(run: Run) -> str:
    energy = any(entry.joules_per_token is not None for entry in run.tests)
    rows = []
    for entry in run.tests:
        limit, median, joules = limits.limit(run, entry), outputs.latency(entry)["median"], entry.joules_per_token
        row = [
            entry.test.name,
            f"{entry.avg_ts:,.1f}",
            f"{entry.stddev_ts:,.1f}" if len(entry.samples) > 1 else "–",
            "–" if limit is None else f"{limit.share:.0%}",
            "–" if median is None else outputs.three_digits(median / 1e6),
            outputs.three_digits(mean(entry.ttft_ns) / 1e6),
        ]
        rows.append(row + ["–" if joules is None else f"{joules:.3g}"] * energy)
    titles = ["test", "tokens/s", "±", "of limit", "ms/token", "first token, ms", *["J/token"] * energy]
    return _table(titles, rows)


def _chart(title: str, text: str, chart: Chart | None) -> str:
    """A chart beside its figures; nothing where there is none."""
    if chart is None:
        return ""
    figures = f'<div class="pair"><figure>{chart.svg}</figure>{_table(chart.titles, chart.rows)}</div>'
    return _section(title, text if text.startswith("<") else escape(text), figures)


def _section(title: str, text: str, rest: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{text}</p>{rest}</section>"


def _table(titles: Sequence[str], rows: Sequence[Row], words: int = 1) -> str:
    """A table whose first `words` columns are text, the rest numbers."""

    def cell(tag: str, place: int, value: object) -> str:
        kind = "" if place < words else ' class="n"'
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{kind}>{escape(str(value))}</{tag}>"

    head = "".join(cell("th", place, title) for place, title in enumerate(titles))
    body = "".join(f"<tr>{''.join(cell('td', place, value) for place, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _perplexity(result: Result) -> str:
    rows = [
        (run.where, f"{p.value:.4f} ± {p.error:.4f}", f"{p.tokens:,}", f"{p.window:,} / {p.stride:,}")
        for run in result.runs
        if (p := run.perplexity)
    ]
    if not rows:
        return ""
    text = "Lower is better. The same text through each setting: a faster one that computes something else shows here."
    return _section("Perplexity", text, _table(("", "perplexity", "tokens", "window / stride"), rows))


def _method(result: Result) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in outputs.METHOD)
    order = escape(", ".join(result.order))
    return (
        f"<section><h2>How it was measured</h2><ul>{items}</ul>"
        f"<h3>Order of the repetitions</h3><p class=quiet>{order}</p></section>"
    )


def _environment(result: Result) -> str:
    rows: list[Row] = [(name, value) for name, value in result.environment.items() if value is not None]
    for run in result.runs:
        name, facts = label(result, run), ", ".join(f"{k} {v}" for k, v in run.engine.items() if k != "name")
        rows.append((f"engine of {name}", f"{run.engine['name']}: {facts}"))
        commit = f", commit {run.model['commit']}" if run.model.get("commit") else ""
        rows.append((f"model {name}", f"{run.model['architecture']}, {run.model['path']}{commit}"))
        if probe := run.probe:
            speed = f"memory {probe.bytes_per_second / 1e9:,.1f} GB/s over {probe.buffer_bytes / 2**20:,.0f} MiB"
            product = f"{probe.dtype} matrix product {probe.flops / 1e12:,.3g} TFLOP/s"
            rows.append((f"measured limits, {name}", f"{speed}, {product}"))
    usual = Sampling().to_dict()
    shown = {key: value for key, value in result.sampling.items() if key in _ALWAYS_SHOWN or value != usual.get(key)}
    rows.append(("sampling", ", ".join(f"{key} {value}" for key, value in shown.items())))
    return f"<section><h2>Environment</h2>{_table(('', ''), rows, words=2)}</section>"
