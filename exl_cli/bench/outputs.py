"""A result as text for other programs: Markdown, CSV, JSON, JSON lines."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, Literal

from exl_cli.bench import files, limits
from exl_cli.bench.result import Measured, Result, Run

OutputFormat = Literal["md", "csv", "json", "jsonl"]


def render(result: Result, kind: OutputFormat) -> str:
    """The result in one of the formats for programs, its last line break included."""
    if kind == "md":
        return markdown(result)
    if kind == "csv":
        return comma_separated(result)
    if kind == "jsonl":
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in files.tests_json(result))
    return json.dumps(files.to_json(result), ensure_ascii=False, indent=1) + "\n"


def size_text(count: int) -> str:
    """Bytes as llama-bench writes them."""
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def parameters_text(count: int) -> str:
    """Parameters as llama-bench writes them."""
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def repetitions_text(count: int) -> str:
    """So many repetitions, in words."""
    return f"{count:,} repetition{'' if count == 1 else 's'}"


def three_digits(value: float) -> str:
    """A figure as people read it: 0.123, 4.56, 78.9, 1,234."""
    return f"{value:,.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def markdown(result: Result) -> str:
    """llama-bench's table; a column more for cache types and parallel requests, where there are several."""
    titles = ["model", "size", "params", "backend"]
    caches = len({run.cache for run in result.runs}) > 1
    parallel = any(entry.test.n_parallel > 1 for _, entry in result.measured())
    titles += ["type_k", "type_v"] * caches + ["n_parallel"] * parallel + ["test", "t/s"]
    rows = [dict(zip(titles, _cells(run, entry, caches, parallel), strict=True)) for run, entry in result.measured()]
    left = {"model", "backend", "type_k", "type_v"}
    widths = {title: max([len(title), 8, *(len(row[title]) for row in rows)]) for title in titles}

    def line(cells: dict[str, str]) -> str:
        padded = (cells[t].ljust(widths[t]) if t in left else cells[t].rjust(widths[t]) for t in titles)
        return f"| {' | '.join(padded)} |\n"

    rule = " | ".join("-" * (widths[t] - 1) + ("-" if t in left else ":") for t in titles)
    text = line({title: title for title in titles}) + f"| {rule} |\n" + "".join(line(row) for row in rows)
    return f"{text}\nbuild: exl {result.exl_version}\n" + "".join(f"\n- {note}" for note in notes(result)) + "\n"


def _cells(run: Run, entry: Measured, caches: bool, parallel: bool) -> list[str]:
    name = run.label.replace("|", "\\|")
    cells = [name, size_text(run.model["size_bytes"]), parameters_text(run.model["parameters"]), run.backend]
    cells += [run.cache, run.cache] * caches + [str(entry.test.n_parallel)] * parallel
    return [*cells, entry.test.llama_name, f"{entry.avg_ts:.2f} ± {entry.stddev_ts:.2f}"]


def notes(result: Result) -> list[str]:
    """What belongs beside the figures, a line each."""
    found = [f"partial: {result.partial}"] if result.partial else []
    found.append(machine(result))
    for run in result.runs:
        where = f"{run.label}, cache {run.cache}"
        if run.cold is not None:
            cold = run.cold
            found.append(
                f"{where}, first generation of a process: import {cold.import_seconds:.2f} s, load "
                f"{cold.load_seconds:.2f} s, first token {cold.first_token_seconds:.3f} s, then "
                f"{cold.generation_rate:.2f} t/s"
            )
        if run.perplexity is not None:
            value = run.perplexity
            found.append(
                f"{where}: perplexity {value.value:.4f} ± {value.error:.4f} over {value.tokens:,} tokens, window "
                f"{value.window:,}, stride {value.stride:,}"
            )
        found += [f"{where}, {entry.test.name}: {text}" for entry in run.tests if (text := limits.verdict(run, entry))]
    return [*found, *result.warnings, *result.skipped]


def machine(result: Result) -> str:
    """Hardware and versions in one line."""
    known = result.environment
    parts = [known.get("gpu"), known.get("cpu"), known.get("os")]
    parts += [
        f"{name} {known[key]}"
        for key, name in (("driver", "driver"), ("cuda", "CUDA"), ("torch", "torch"), ("exllamav2", "exllamav2"))
        if known.get(key)
    ]
    return ", ".join(str(part) for part in parts if part)


def comma_separated(result: Result) -> str:
    """A row for each test, without the lists of samples."""
    rows: list[dict[str, Any]] = [
        {key: value for key, value in entry.items() if not isinstance(value, list)}
        for entry in files.tests_json(result)
    ]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
