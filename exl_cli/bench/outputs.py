"""A result in files and for other programs: JSON and back, JSON lines, CSV, Markdown.

The JSON is one object; `schema.json` describes it and `schema` in it is the version. Its `tests` carry llama-bench's
field names where they mean the same (tools/llama-bench/README.md of llama.cpp), in llama-bench's units: nanoseconds,
bytes, tokens per second, and deviations of a sample (n - 1). What is computed from samples is there for other readers;
`exl` computes it again.

Texts of a result may hold an `errors.param`: what prints or writes one takes a `spelling`, as `errors.spell` does.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from exl_cli.api.validation import first_fault
from exl_cli.bench import limits
from exl_cli.bench.result import Measured, Perplexity, Result, Run, Sample, deviation, mean, percentile
from exl_cli.errors import DiskError, ExlError, UsageError, os_errors, param, spell
from exl_cli.models.prompt import read_input
from exl_cli.system.files import expanded, is_folder, write_atomically

OutputFormat = Literal["md", "csv", "json", "jsonl", "html"]

SCHEMA = 1
# A column of a test for each, `samples_ns` and so on.
_SAMPLE_FIELDS = [field.name for field in dataclasses.fields(Sample)]
_DISK_HINT = "check the folder and the disk space"

# What a reader of the figures must know; part of every report.
METHOD = (
    "Prompts are random tokens from the given seed, each with a different first token, so nothing can be reused "
    "from the KV cache. The end-of-sequence token does not end a generation.",
    "ppN processes N prompt tokens, until the device has finished. tgN generates N tokens, one "
    "forward pass each, timed from the first token (not counted) to the last, with sampling and decoding to text. "
    "'@ dN' is tgN after N tokens of context, which are not timed; 'xN' is N concurrent requests, all their "
    "tokens counted. ppN+tgM is a whole response, from the call to its last token. Loading, tokenizing and chat "
    "templates are not timed.",
    f"With speculative decoding ({param('speculate')}, {param('draft')}), a forward pass yields one token plus the "
    "accepted draft tokens. Random prompts are hard to predict, so these figures say nothing about real texts.",
    "Time to first token is from the call until the first new token has been decoded.",
    "Each test is run once as a warm-up. Each repetition runs all tests, in a new random order.",
    "Cold is the first generation of a new process. Import time is from the start of the process until the "
    "first weight is read, load time from there until the model is ready. Files may be in the operating "
    "system's cache.",
    "The limit of a generation is the time to read the weights and the KV cache once per step, at the bandwidth "
    "measured in the same run with a buffer of the same size (at most 1 GiB). That of a prompt is its multiplications "
    "and additions at the rate of a large matrix product.",
    "Energy is that of the whole GPU, including idle power, from its own counter; omitted for tests under one second.",
)


def render(result: Result, kind: OutputFormat, spelling: Callable[[str], str] = spell) -> str:
    """The result in one of the formats, its last line break included."""
    if kind == "html":
        from exl_cli.bench import report

        return spelling(report.page(result))
    if kind == "md":
        return spelling(markdown(result))
    if kind == "csv":
        return comma_separated(result)
    if kind == "jsonl":
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in tests_json(result))
    return spelling(json.dumps(to_json(result), ensure_ascii=False, indent=1) + "\n")


def to_json(result: Result) -> dict[str, Any]:
    """The whole result, as `schema.json` has it."""
    return {
        "schema": SCHEMA,
        **vars(result),
        "seconds": round(result.seconds, 3),
        "settings": dataclasses.asdict(result.settings),
        "method": list(METHOD),
        "runs": [_run(run) for run in result.runs],
        "tests": tests_json(result),
    }


def tests_json(result: Result) -> list[dict[str, Any]]:
    """The tests, each complete in itself: llama-bench's fields first, then ours."""
    return [_test(result, at, run, entry) for at, run in enumerate(result.runs) for entry in run.tests]


def _run(run: Run) -> dict[str, Any]:
    value = dataclasses.asdict(run)
    del value["tests"]
    value["load_seconds"] = round(run.load_seconds, 6)
    if run.cold:
        computed = "first_token_seconds", "start_to_token_seconds", "generation_rate"
        value["cold"] |= {name: getattr(run.cold, name) for name in computed}
    if run.perplexity:
        value["perplexity"] |= {"value": run.perplexity.value, "error": run.perplexity.error}
    return value


def _test(result: Result, index: int, run: Run, entry: Measured) -> dict[str, Any]:
    environment, test = result.environment, entry.test
    threads = run.engine.get("threads")
    limit = limits.limit(run, entry)
    return {
        "cpu_info": environment.get("cpu") or "",
        "gpu_info": environment.get("gpu") or "",
        "backends": _backend(run),
        "model_filename": run.model["path"],
        "model_type": run.label,
        "model_size": run.model["size_bytes"],
        "model_n_params": run.model["parameters"],
        "n_threads": None if threads is None else int(threads),
        "type_k": run.cache,
        "type_v": run.cache,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": entry.time,
        "avg_ns": round(entry.avg_ns),
        "stddev_ns": round(deviation([sample.ns for sample in entry.samples])),
        "avg_ts": entry.avg_ts,
        "stddev_ts": entry.stddev_ts,
        "samples_ts": entry.rates,
        "run": index,
        "test": test.name,
        "n_parallel": test.n_parallel,
        "ttft_ns": round(mean(entry.ttft_ns)),
        "ttft_stddev_ns": round(deviation(entry.ttft_ns)),
        "ttft_median_ns": round(percentile(entry.ttft_ns, 50)),
        **{f"itl_{name}_ns": value for name, value in entry.latency.items()},
        "joules_per_token": entry.joules_per_token,
        **{f"samples_{name}": [getattr(sample, name) for sample in entry.samples] for name in _SAMPLE_FIELDS},
        **{name: getattr(entry, name) for name in ("step_bytes", "flops", "kernel_ns", "kernels")},
        "limit": limit and limit.what,
        "limit_ns": limit and limit.ns,
        "share_of_limit": limit and limit.share,
        "verdict": limits.verdict(run, entry),
    }


def load(path: Path) -> Result:
    """A result from a file that holds what `to_json` gives.

    Raises:
        DiskError: it cannot be read.
        UsageError: it is something else, or of a schema that this version does not know.
    """
    again, written = "run the benchmark again", "use a file written by exl bench -o json"
    data = read_input(path, "check the path")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"{path} is not valid JSON: {problem}", written) from error
    if not isinstance(value, dict) or "schema" not in value or "tests" not in value:
        raise UsageError(f"{path} is not an exl bench result", written)
    if value["schema"] != SCHEMA:
        raise UsageError(f"{path} has schema {value['schema']}, but this version of exl reads schema {SCHEMA}", again)
    from pydantic import TypeAdapter, ValidationError

    try:
        runs = [
            {**run, "tests": [_measured(test) for test in value["tests"] if test["run"] == index]}
            for index, run in enumerate(value["runs"])
        ]
        fields = {field.name: value[field.name] for field in dataclasses.fields(Result)}
        result = TypeAdapter(Result).validate_python({**fields, "runs": runs})
        for output in (tests_json, markdown):
            output(result)  # what cannot be computed and shown is damaged as well
    except ValidationError as error:
        fault = first_fault(error.errors())  # of a paragraph
        raise UsageError(f"{path} is damaged: {fault.field} {fault.problem}", again) from error
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {type(error).__name__} {error}", again) from error
    return result


def _measured(test: dict[str, Any]) -> dict[str, Any]:
    # Files written before there was speculation have no columns for its tokens.
    names = [name for name in _SAMPLE_FIELDS if f"samples_{name}" in test]
    rows = zip(*(test[f"samples_{name}"] for name in names), strict=True)
    samples = [dict(zip(names, row, strict=True)) for row in rows]
    return {**test, "test": test, "time": test["test_time"], "samples": samples}


def saved_result(names: Sequence[str]) -> Path | None:
    """The saved result among names that may be models'; None where there is none. UsageError if it is not alone."""
    saved = [name for name in names if name.endswith(".json") and not is_folder(expanded(Path(name)))]
    if saved and len(names) > 1:
        hint = f"compare two results with {param('compare')} OLD.json NEW.json"
        raise UsageError(f"{saved[0]} is a saved result and cannot be combined with other arguments", hint)
    return Path(saved[0]) if saved else None


def require_writable(path: Path, name: str) -> None:
    """Refuse a path that no file can be written to, the value of the parameter `name`. Nothing is left behind there.

    Raises:
        UsageError: it is a folder or a device.
        DiskError: no file can be made there.
    """
    path = expanded(path)
    with os_errors(f"cannot write {path}", _DISK_HINT):
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            kind = stat.S_IFREG
        if not stat.S_ISREG(kind):
            wrong, hint = ("a folder", "name a file in it") if stat.S_ISDIR(kind) else ("none", "name another")
            raise UsageError(f"{param(name)} must be a file, but {path} is {wrong}", hint)
        # Permissions do not say whether a file can be made, least of all to root: only making one does.
        nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=nearest):
            pass


def keep(
    result: Result, save: Path | None, report: Path | None, spelling: Callable[[str], str] = spell
) -> list[ExlError]:
    """Write a result's JSON to `save` and its HTML to `report`; return what went wrong.

    If one cannot be written, the other still is, and what was there before stays.
    """
    failures: list[ExlError] = []
    kinds: dict[OutputFormat, Path | None] = {"json": save, "html": report}
    for kind, path in kinds.items():
        if path is not None:
            path = expanded(path)
            try:
                with os_errors(f"cannot write {path}", _DISK_HINT):
                    write_atomically(path, render(result, kind, spelling))
            except DiskError as error:
                failures.append(error)
    return failures


def size_text(count: int) -> str:
    """Bytes as llama-bench writes them."""
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def parameters_text(count: int) -> str:
    """Parameters as llama-bench writes them."""
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def repetitions_text(count: int) -> str:
    """A number of repetitions, in words."""
    return f"{count:,} repetition{'' if count == 1 else 's'}"


def three_digits(value: float) -> str:
    """A figure as people read it: 0.123, 4.56, 78.9, 1,234."""
    return f"{value:,.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def milliseconds(nanoseconds: float) -> str:
    """Nanoseconds as milliseconds, with three digits."""
    return f"{three_digits(nanoseconds / 1e6)} ms"


def test_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Titles, and a row for each test of a run; energy and acceptance only where a test has them."""
    energy = any(entry.joules_per_token is not None for entry in run.tests)
    drafted = any(entry.acceptance is not None for entry in run.tests)
    titles = ["test", "tokens/s", "of limit", "ms/token p5 · 50 · 95", "first token"]
    titles += ["J/token"] * energy + ["accepted"] * drafted
    rows = []
    for entry in run.tests:
        limit, times = limits.limit(run, entry), entry.latency
        joules, accepted = entry.joules_per_token, entry.acceptance
        digits = 0 if entry.avg_ts >= 1000 else 1 if entry.avg_ts >= 10 else 2
        spread = f" ± {entry.stddev_ts:,.{digits}f}" if len(entry.samples) > 1 else ""
        steps = " · ".join(three_digits((times[name] or 0) / 1e6) for name in ("p5", "median", "p95"))
        row = [entry.test.name, f"{entry.avg_ts:,.{digits}f}{spread}", "-" if limit is None else f"{limit.share:.0%}"]
        row += ["-" if times["median"] is None else steps, milliseconds(mean(entry.ttft_ns))]
        row += ["-" if joules is None else f"{joules:.3g}"] * energy
        row += ["-" if accepted is None else f"{accepted:.0%}"] * drafted
        rows.append(row)
    return titles, rows


def perplexity_text(value: Perplexity) -> str:
    """A perplexity with what it depends on."""
    spread = f"{value.value:.4f} ± {value.error:.4f} over {value.tokens:,} tokens"
    return f"{spread}, window {value.window:,}, stride {value.stride:,}"


def machine(result: Result) -> str:
    """Hardware and versions in one line."""
    known = result.environment
    parts = [known.get("gpu"), known.get("cpu"), known.get("os")]
    named = {"driver": "driver", "cuda": "CUDA", "torch": "torch", "exllamav2": "exllamav2"}
    parts += [f"{name} {known[key]}" for key, name in named.items() if known.get(key)]
    return ", ".join(str(part) for part in parts if part)


def _backend(run: Run) -> str:
    """As llama-bench's column has it."""
    return "CUDA" if run.on_gpu else "CPU"


def markdown(result: Result) -> str:
    """llama-bench's table; a column more for cache types and parallel requests, where there are several."""
    caches = len({run.cache for run in result.runs}) > 1
    parallel = any(entry.test.n_parallel > 1 for _, entry in result.measured())
    titles = ["model", "size", "params", "backend"]
    titles += ["type_k", "type_v"] * caches + ["n_parallel"] * parallel + ["test", "t/s"]
    rows = [titles]
    for run, entry in result.measured():
        row = [run.label.replace("|", "\\|"), size_text(run.model["size_bytes"])]
        row += [parameters_text(run.model["parameters"]), _backend(run)]
        row += [run.cache, run.cache] * caches + [str(entry.test.n_parallel)] * parallel
        rows.append([*row, entry.test.llama_name, f"{entry.avg_ts:.2f} ± {entry.stddev_ts:.2f}"])
    widths = [max(8, *map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["<" if title in ("model", "backend", "type_k", "type_v") else ">" for title in titles]
    rows.insert(1, ["-" * (width - 1) + ("-" if to == "<" else ":") for width, to in zip(widths, aligned, strict=True)])
    table = ""
    for row in rows:
        cells = (f"{cell:{to}{width}}" for cell, to, width in zip(row, aligned, widths, strict=True))
        table += f"| {' | '.join(cells)} |\n"
    return f"{table}\nbuild: exl {result.exl_version}\n" + "".join(f"\n- {note}" for note in _notes(result)) + "\n"


def _notes(result: Result) -> list[str]:
    """What belongs beside the figures, a line each."""
    notes = [f"partial: {result.partial}"] if result.partial else []
    notes.append(machine(result))
    for run in result.runs:
        if cold := run.cold:
            notes.append(
                f"{run.where}, first generation of a process: import {cold.import_seconds:.2f} s, load "
                f"{cold.load_seconds:.2f} s, first token {cold.first_token_seconds:.3f} s, then "
                f"{cold.generation_rate:.2f} t/s"
            )
        if run.perplexity is not None:
            notes.append(f"{run.where}: perplexity {perplexity_text(run.perplexity)}")
        notes += [f"{run.where}, {name}: {text}" for name, text in limits.verdicts(run)]
    return [*notes, *result.warnings, *result.skipped]


def comma_separated(result: Result) -> str:
    """A row for each test, without the lists of samples."""
    rows = [{key: value for key, value in entry.items() if not isinstance(value, list)} for entry in tests_json(result)]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
