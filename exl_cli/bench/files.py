"""A result as JSON, and back."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from exl_cli.bench import limits
from exl_cli.bench.measure import Sample
from exl_cli.bench.plan import Case, Settings
from exl_cli.bench.result import (
    SCHEMA,
    Cold,
    Measured,
    Memory,
    Perplexity,
    Probe,
    Result,
    Run,
    deviation,
    mean,
    percentile,
)
from exl_cli.errors import UsageError

# What a reader of the figures must know; part of every report.
METHOD = (
    "Prompts are random tokens from the stated seed, no two with the same first token, so that nothing can be reused "
    "from the KV cache. The end-of-sequence token does not end a generation.",
    "ppN is the evaluation of N prompt tokens, up to the moment the device has finished. tgN is N new tokens, one "
    "forward pass each, from the arrival of the first token (not counted) to the last; sampling and decoding to text "
    "are in it. '@ dN' is tgN after N tokens of context, which are not timed; 'xN' is N requests at a time, all their "
    "tokens counted. ppN+tgM is a whole answer, from the call to its last token. Loading, tokenizing and rendering a "
    "prompt are in none of them.",
    "Where tokens were guessed and verified (--speculate, --draft), a forward pass gives one and those guessed right. "
    "After random prompts there is little to guess, so such figures say nothing of real texts.",
    "Time to first token is from the call to the arrival of the first new token, decoded.",
    "Each test is run once before it is timed. A repetition goes through all tests in a random order of its own.",
    "Cold is the first generation of a fresh process. Its import time runs from the start of the process to the "
    "first weight that is read, its load time from there until the model can answer. The files are as the operating "
    "system had them in its cache.",
    "The limit of a generation is the time to read its weights and its KV cache once for each step, at the bandwidth "
    "measured in the same run with a buffer of the same size (1 GiB at most). That of a prompt is its multiplications "
    "and additions at the rate of a large matrix product.",
    "Energy is the whole GPU's, idle power included, as its own counter tells; left out below one second.",
)

_SPECULATION = ("drafted_tokens", "accepted_tokens")

_Record = TypeVar("_Record")


def to_json(result: Result) -> dict[str, Any]:
    """The whole result, as `schema.json` has it."""
    return {
        "schema": SCHEMA,
        "exl_version": result.exl_version,
        "partial": result.partial,
        "started": result.started,
        "seconds": round(result.seconds, 3),
        "settings": asdict(result.settings),
        "sampling": result.sampling,
        "method": list(METHOD),
        "environment": result.environment,
        "runs": [_run(run) for run in result.runs],
        "tests": tests_json(result),
        "order": result.order,
        "warnings": result.warnings,
        "skipped": result.skipped,
    }


def tests_json(result: Result) -> list[dict[str, Any]]:
    """The tests that have samples, each complete in itself: llama-bench's fields first, then ours."""
    return [
        _test(result, index, run, entry)
        for index, run in enumerate(result.runs)
        for entry in run.tests
        if entry.samples
    ]


def _run(run: Run) -> dict[str, Any]:
    cold = run.cold
    return {
        "model": run.model,
        "engine": run.engine,
        "cache": run.cache,
        "load_seconds": round(run.load_seconds, 6),
        "cold": cold
        and {
            **asdict(cold),
            "first_token_seconds": cold.first_token_seconds,
            "start_to_token_seconds": cold.start_to_token_seconds,
            "generation_rate": cold.generation_rate,
        },
        "memory": asdict(run.memory),
        "probe": run.probe and asdict(run.probe),
        "perplexity": run.perplexity
        and {**asdict(run.perplexity), "value": run.perplexity.value, "error": run.perplexity.error},
        "others_cpu": run.others_cpu,
    }


def _test(result: Result, index: int, run: Run, entry: Measured) -> dict[str, Any]:
    environment, test = result.environment, entry.test
    threads = run.engine.get("threads")
    times = [sample.ns for sample in entry.samples]
    limit = limits.limit(run, entry)
    return {
        "cpu_info": environment.get("cpu") or "",
        "gpu_info": environment.get("gpu") or "",
        "backends": run.backend,
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
        "stddev_ns": round(deviation(times)),
        "avg_ts": entry.avg_ts,
        "stddev_ts": entry.stddev_ts,
        "samples_ns": times,
        "samples_ts": entry.rates,
        "run": index,
        "test": test.name,
        "n_parallel": test.n_parallel,
        "ttft_ns": round(mean(entry.first_token_ns)),
        "ttft_stddev_ns": round(deviation(entry.first_token_ns)),
        "ttft_median_ns": round(percentile(entry.first_token_ns, 50)),
        "samples_ttft_ns": entry.first_token_ns,
        **{f"itl_{name}_ns": value for name, value in latency(entry).items()},
        "samples_itl_ns": [list(sample.itl_ns) for sample in entry.samples],
        "joules_per_token": entry.joules_per_token,
        "samples_joules": [sample.joules for sample in entry.samples],
        "samples_cpu_share": [round(sample.cpu_share, 3) for sample in entry.samples],
        "samples_reused_tokens": [sample.reused_tokens for sample in entry.samples],
        **{f"samples_{name}": [getattr(sample, name) for sample in entry.samples] for name in _SPECULATION},
        "step_bytes": entry.step_bytes,
        "flops": entry.flops,
        "kernel_ns": entry.kernel_ns,
        "kernels": entry.kernels,
        "limit": limit and limit.what,
        "limit_ns": limit and limit.ns,
        "share_of_limit": limit and limit.share,
        "verdict": limits.verdict(run, entry),
    }


def latency(entry: Measured) -> dict[str, int | None]:
    """Median, 5th and 95th percentile of the time between tokens; None of a prompt."""
    steps = entry.latencies
    return {
        name: round(percentile(steps, percent)) if steps else None
        for name, percent in (("median", 50), ("p5", 5), ("p95", 95))
    }


def from_json(value: Any, source: str) -> Result:
    """A result from its JSON.

    Args:
        value: what `to_json` gave.
        source: what to call it in an error.

    Raises:
        UsageError: it is something else, or of a schema that this version does not know.
    """
    if not isinstance(value, dict) or "schema" not in value or "tests" not in value:
        raise UsageError(f"{source} is not a result of exl bench", "give a file written by exl bench -o json")
    if value["schema"] != SCHEMA:
        raise UsageError(
            f"{source} is written in schema {value['schema']}, this exl reads schema {SCHEMA}",
            "run the benchmark again",
        )
    try:
        runs = [_run_from(entry, [t for t in value["tests"] if t["run"] == i]) for i, entry in enumerate(value["runs"])]
        names = [field.name for field in fields(Result) if field.name not in ("settings", "runs")]
        kept: dict[str, Any] = {name: value[name] for name in names}
        return Result(settings=Settings.read(value["settings"]), runs=runs, **kept)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{source} is damaged: {type(error).__name__} {error}", "run the benchmark again") from error


def _run_from(value: dict[str, Any], tests: list[dict[str, Any]]) -> Run:
    cold = value["cold"]
    return Run(
        **{key: value[key] for key in ("model", "engine", "cache", "load_seconds", "others_cpu")},
        tests=[_measured_from(entry) for entry in tests],
        memory=_read(Memory, value["memory"]),
        cold=None if cold is None else Cold(**{**_known(Cold, cold), "sample": Sample.read(cold["sample"])}),
        probe=None if value["probe"] is None else _read(Probe, value["probe"]),
        perplexity=None if value["perplexity"] is None else _read(Perplexity, value["perplexity"]),
    )


def _measured_from(value: dict[str, Any]) -> Measured:
    columns: tuple[str, ...] = ("ns", "ttft_ns", "itl_ns", "reused_tokens", "joules", "cpu_share")
    # Files written before there was speculation do not have these.
    columns += tuple(name for name in _SPECULATION if f"samples_{name}" in value)
    samples = zip(*(value[f"samples_{column}"] for column in columns), strict=True)
    return Measured(
        test=_read(Case, value),
        samples=[Sample.read(dict(zip(columns, sample, strict=True))) for sample in samples],
        time=value["test_time"],
        **{key: value[key] for key in ("step_bytes", "flops", "kernel_ns", "kernels")},
    )


def _known(record: type[Any], value: dict[str, Any]) -> dict[str, Any]:
    return {field.name: value[field.name] for field in fields(record)}


def _read(record: type[_Record], value: dict[str, Any]) -> _Record:
    return record(**_known(record, value))


def load(path: Path) -> Result:
    """A result from a file.

    Raises:
        UsageError: it cannot be read, or is not a result.
    """
    try:
        value = json.loads(expanded(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"{path} is not JSON: {what}", "give a file written by exl bench -o json") from error
    return from_json(value, str(path))


def expanded(path: Path) -> Path:
    """The path, `~` at its start replaced by that user's folder; as it is where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path
