"""The report: one HTML file with everything in it, readable on a screen, light or dark, on paper and on a phone.

It needs no network and no script. Every chart stands beside a table with its figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from exl_cli.bench import bars, charts, files, limits, outputs
from exl_cli.bench.drawing import Chart, label
from exl_cli.bench.result import Result, Run, mean
from exl_cli.bench.style import STYLE
from exl_cli.sampling import Sampling

Row = Sequence[object]

# Sampler settings that are told even where they are the usual ones.
_ALWAYS_SAID = ("temperature", "top_k", "top_p", "token_repetition_penalty")


def page(result: Result) -> str:
    """The whole file."""
    title = ", ".join(dict.fromkeys(run.label for run in result.runs)) or "nothing measured"
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
        _chart("Cold against warm", _first_use_key(), bars.first_use(result)),
        _chart(
            "Share of the limit",
            "Generation against reading weights and KV cache once a step at the measured bandwidth, a prompt against "
            "the measured rate of a large matrix product.",
            bars.shares(result),
        ),
        _chart("Memory", "Peaks, beside the weight files on disk.", bars.memory(result)),
        _perplexity(result),
        _method(result),
        _environment(result),
    ]
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="exl {escape(result.exl_version)}">
<title>{escape(title)}: benchmark</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kind">exl bench</p>
<h1>{escape(title)}</h1>
<p>{escape(outputs.machine(result))}</p>
<p class="quiet">{escape(result.started.replace("T", " ").replace("Z", " UTC"))}, {result.seconds:,.0f} s,
exl {escape(result.exl_version)}, {outputs.repetitions_text(result.settings.repetitions)},
seed {result.settings.seed}</p>
</header>
{body}
</main>
</body>
</html>
"""


def _warnings(result: Result) -> str:
    notes = [f"Not complete: {result.partial}."] if result.partial else []
    notes += [*result.warnings, *result.skipped]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<aside aria-label="What to know first"><ul>{items}</ul></aside>' if notes else ""


def _run(result: Result, run: Run) -> str:
    """What one run found: the few numbers that most readers come for, all tests, and what holds them back."""
    if not any(entry.samples for entry in run.tests):
        return ""
    verdicts = [(entry.test.name, text) for entry in run.tests if (text := limits.verdict(run, entry))]
    items = "".join(f"<li><b>{escape(name)}</b> is {escape(text)}</li>" for name, text in verdicts)
    holds = f"<h3>What holds it back</h3><ul>{items}</ul>" if items else ""
    title = label(result, run) if len(result.runs) > 1 else "Results"
    return f"<section><h2>{escape(title)}</h2>{_key_figures(run)}{_tests(run)}{holds}</section>"


def _key_figures(run: Run) -> str:
    figures = []
    if found := run.find("generation"):
        figures.append(("generation", f"{found[0].avg_ts:,.1f}", "tokens/s", found[0].test.name))
    if found := run.find("prompt"):
        figures.append(("prompt", f"{found[0].avg_ts:,.0f}", "tokens/s", found[0].test.name))
    if found := run.find("answer"):
        figures.append(("first token", f"{mean(found[0].first_token_ns) / 1e6:,.0f}", "ms", "warm"))
    if run.cold is not None:
        figures.append(("from nothing", f"{run.cold.start_to_token_seconds:,.1f}", "s", "to the first token"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{value}</b> {unit}</dd><dd class=quiet>{escape(note)}</dd></div>"
        for name, value, unit, note in figures
    )
    return f'<dl class="key">{cells}</dl>' if cells else ""


def _tests(run: Run) -> str:
    titles = ["test", "tokens/s", "±", "of limit", "ms/token", "first token, ms"]
    energy = any(entry.joules_per_token is not None for entry in run.tests)
    rows = []
    for entry in run.tests:
        if not entry.samples:
            continue
        limit, median = limits.limit(run, entry), files.latency(entry)["median"]
        row = [entry.test.name, f"{entry.avg_ts:,.1f}", f"{entry.stddev_ts:,.1f}" if len(entry.samples) > 1 else "–"]
        row += [
            "–" if limit is None else f"{limit.share:.0%}",
            "–" if median is None else outputs.three_digits(median / 1e6),
        ]
        row.append(outputs.three_digits(mean(entry.first_token_ns) / 1e6))
        if energy:
            row.append("–" if entry.joules_per_token is None else f"{entry.joules_per_token:.3g}")
        rows.append(row)
    return _table([*titles, *(["J/token"] * energy)], rows)


def _chart(title: str, text: str, chart: Chart | None) -> str:
    """A chart beside its figures; nothing where there is none."""
    if chart is None:
        return ""
    return (
        f"<section><h2>{escape(title)}</h2><p>{text if text.startswith('<') else escape(text)}</p>"
        f'<div class="pair"><figure>{chart.svg}</figure>{_table(chart.titles, chart.rows)}</div></section>'
    )


def _table(titles: Sequence[str], rows: Sequence[Row], words: int = 1) -> str:
    """A table whose first `words` columns are text, the rest numbers."""

    def cell(tag: str, place: int, value: object) -> str:
        kind = "" if place < words else ' class="n"'
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{kind}>{escape(str(value))}</{tag}>"

    head = "".join(cell("th", place, title) for place, title in enumerate(titles))
    body = "".join(f"<tr>{''.join(cell('td', place, value) for place, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _first_use_key() -> str:
    keys = "".join(f'<span class="key s{place}">{name}</span> ' for place, name in enumerate(bars.FIRST_USE, 1))
    return f"<span>What a fresh process does before its first token:</span> {keys}"


def _perplexity(result: Result) -> str:
    rows: list[Row] = []
    for run in result.runs:
        if run.perplexity is not None:
            value = run.perplexity
            rows.append(
                (
                    f"{run.label}, cache {run.cache}",
                    f"{value.value:.4f} ± {value.error:.4f}",
                    f"{value.tokens:,}",
                    f"{value.window:,} / {value.stride:,}",
                )
            )
    if not rows:
        return ""
    text = "Lower is better. The same text through each setting: a faster one that computes something else shows here."
    table = _table(("", "perplexity", "tokens", "window / stride"), rows)
    return f"<section><h2>Perplexity</h2><p>{text}</p>{table}</section>"


def _method(result: Result) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in files.METHOD)
    order = escape(", ".join(result.order))
    return (
        f"<section><h2>How it was measured</h2><ul>{items}</ul>"
        f"<h3>Order of the repetitions</h3><p class=quiet>{order}</p></section>"
    )


def _environment(result: Result) -> str:
    rows: list[Row] = [(name, value) for name, value in result.environment.items() if value is not None]
    for run in result.runs:
        facts = ", ".join(f"{key} {value}" for key, value in run.engine.items() if key != "name")
        rows.append((f"engine of {label(result, run)}", f"{run.engine['name']}: {facts}"))
        commit = f", commit {run.model['commit']}" if run.model.get("commit") else ""
        rows.append((f"model {label(result, run)}", f"{run.model['architecture']}, {run.model['path']}{commit}"))
        if run.probe is not None:
            speed, buffer = (
                f"{run.probe.bytes_per_second / 1e9:,.1f} GB/s",
                f"{run.probe.buffer_bytes / 2**20:,.0f} MiB",
            )
            product = f"{run.probe.dtype} matrix product {run.probe.flops / 1e12:,.3g} TFLOP/s"
            rows.append((f"measured limits, {label(result, run)}", f"memory {speed} over {buffer}, {product}"))
    usual = Sampling().to_dict()
    said = {key: value for key, value in result.sampling.items() if key in _ALWAYS_SAID or value != usual.get(key)}
    rows.append(("sampling", ", ".join(f"{key} {value}" for key, value in said.items())))
    return f"<section><h2>Environment</h2>{_table(('', ''), rows, words=2)}</section>"
