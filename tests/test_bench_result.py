"""What a result says: its statistics against NumPy's, its JSON against the schema, its Markdown as llama-bench's."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

import benchdata
import jsonschema
import numpy as np
import pytest

import exl_cli
from exl_cli.bench import outputs
from exl_cli.bench.plan import Case
from exl_cli.errors import UsageError

SCHEMA = json.loads((Path(exl_cli.__file__).parent / "bench" / "schema.json").read_text())

# llama-bench's fields that mean the same here, and the type that it gives them (get_field_type in llama-bench.cpp).
LLAMA_FIELDS: dict[str, type | tuple[type, ...]] = {
    "cpu_info": str,
    "gpu_info": str,
    "backends": str,
    "model_filename": str,
    "model_type": str,
    "model_size": int,
    "model_n_params": int,
    "type_k": str,
    "type_v": str,
    "n_prompt": int,
    "n_gen": int,
    "n_depth": int,
    "test_time": str,
    "avg_ns": int,
    "stddev_ns": int,
    "avg_ts": float,
    "stddev_ts": float,
    "samples_ns": list,
    "samples_ts": list,
}


@pytest.fixture(scope="module")
def result() -> Any:
    return benchdata.result(
        benchdata.gpu_run(perplexity=5.61), benchdata.gpu_run(cache="q4", factor=0.8, seed=1, perplexity=5.7)
    )


def test_the_json_is_what_the_schema_says(result: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    value = json.loads(outputs.render(result, "json"))
    jsonschema.validate(value, SCHEMA, format_checker=jsonschema.FormatChecker())
    # The schema allows more fields, so that old copies of it read new files; here none may be missing from it.
    for part, found in (("run", value["runs"][0]), ("test", value["tests"][0]), ("cold", value["runs"][0]["cold"])):
        assert set(found) == set(SCHEMA["$defs"][part]["properties"])
    assert set(value) == set(SCHEMA["properties"])


def test_a_broken_file_is_not_what_the_schema_says(result: Any) -> None:
    value = json.loads(outputs.render(result, "json"))
    value["tests"][0]["avg_ts"] = "fast"
    with pytest.raises(jsonschema.ValidationError, match="fast"):
        jsonschema.validate(value, SCHEMA)


def test_fields_of_llama_bench_have_its_types_and_units(result: Any) -> None:
    for entry in outputs.tests_json(result):
        assert {name: isinstance(entry[name], kind) for name, kind in LLAMA_FIELDS.items()} == dict.fromkeys(
            LLAMA_FIELDS, True
        )
        tokens = entry["n_parallel"] * (entry["n_prompt"] + entry["n_gen"])
        assert entry["samples_ts"] == pytest.approx([tokens * 1e9 / ns for ns in entry["samples_ns"]])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["test_time"])


def test_statistics_are_those_of_numpy(result: Any) -> None:
    for entry in outputs.tests_json(result):
        assert entry["avg_ts"] == pytest.approx(np.mean(entry["samples_ts"]))
        assert entry["stddev_ts"] == pytest.approx(np.std(entry["samples_ts"], ddof=1))
        assert entry["avg_ns"] == pytest.approx(np.mean(entry["samples_ns"]), abs=1)
        assert entry["stddev_ns"] == pytest.approx(np.std(entry["samples_ns"], ddof=1), abs=1)
        steps = [step for sample in entry["samples_itl_ns"] for step in sample]
        if entry["n_gen"]:
            expected = np.percentile(steps, [5, 50, 95])
            assert [entry[f"itl_{name}_ns"] for name in ("p5", "median", "p95")] == pytest.approx(expected, abs=1)
        else:
            assert (steps, entry["itl_median_ns"]) == ([], None)
        assert entry["ttft_ns"] == pytest.approx(np.mean(entry["samples_ttft_ns"]), abs=1)


def test_one_repetition_has_no_deviation() -> None:
    entry = benchdata.measured(Case(0, 4), [100.0])
    assert (entry.avg_ts, entry.stddev_ts) == (pytest.approx(100), 0.0)


def test_energy_is_per_token_and_not_told_of_too_short_a_time() -> None:
    entry = benchdata.measured(Case(0, 100), [40.0, 50.0])  # 2.5 s and 2 s
    assert entry.joules_per_token is None
    entry.samples = [type(sample)(**{**sample.__dict__, "joules": 300.0}) for sample in entry.samples]
    assert entry.joules_per_token == pytest.approx(3.0)
    short = benchdata.measured(Case(0, 10), [400.0])
    short.samples = [type(sample)(**{**sample.__dict__, "joules": 3.0}) for sample in short.samples]
    assert short.joules_per_token is None


def test_what_was_written_is_read_back(result: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(outputs.render(result, "json"))
    read = outputs.load(tmp_path / "a.json")
    assert outputs.render(read, "json") == outputs.render(result, "json")
    assert (read.settings, read.runs[1].cold, read.runs[0].tests[0]) == (
        result.settings,
        result.runs[1].cold,
        result.runs[0].tests[0],
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "not a result"),
        ('{"schema": 99, "tests": []}', "schema 99"),
        ('{"schema": 1, "tests": [], "runs": [{}]}', "damaged"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=word):
        outputs.load(tmp_path / "x.json")


def parse_as_llama_bench(text: str) -> list[dict[str, str]]:
    """The way that scripts read llama-bench's Markdown: a head, a rule, rows until the first line that is none."""
    lines = text.splitlines()
    split = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    end = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    assert all(re.fullmatch(r"-+:?", cell) for cell in split[1])
    return [dict(zip(split[0], row, strict=True)) for row in split[2:end]]


def test_the_markdown_is_llama_benchs_table() -> None:
    run = benchdata.gpu_run()
    run.tests = [entry for entry in run.tests if entry.test.n_parallel == 1]
    text = outputs.markdown(benchdata.result(run))
    rows = parse_as_llama_bench(text)
    assert list(rows[0]) == ["model", "size", "params", "backend", "test", "t/s"]
    first = rows[0]
    assert (first["model"], first["size"], first["params"]) == ("Mistral-7B-EXL2 EXL2 4.0 bpw", "3.82 GiB", "7.24 B")
    assert (first["backend"], first["test"]) == ("CUDA", "pp512")
    assert [row["test"] for row in rows] == ["pp512", "tg128", "tg128 @ d4096", "tg128 @ d16384", "pp512+tg128"]
    for row, entry in zip(rows, run.tests, strict=True):
        mean, deviation = map(float, re.fullmatch(r"(\d+\.\d\d) ± (\d+\.\d\d)", row["t/s"]).groups())  # type: ignore[union-attr]
        assert mean == pytest.approx(statistics.mean(entry.rates), abs=0.006)
        assert deviation == pytest.approx(statistics.stdev(entry.rates), abs=0.006)
    assert "\nbuild: exl " in text


def test_the_markdown_has_a_column_for_what_varies(result: Any) -> None:
    rows = parse_as_llama_bench(outputs.markdown(result))
    assert list(rows[0]) == ["model", "size", "params", "backend", "type_k", "type_v", "n_parallel", "test", "t/s"]
    assert {row["type_k"] for row in rows} == {"fp16", "q4"}
    assert [row["n_parallel"] for row in rows if row["test"] == "tg128"] == ["1", "4", "16"] * 2


def test_small_models_are_in_mib_and_millions() -> None:
    assert (outputs.size_text(6_991_324), outputs.parameters_text(7_344_384)) == ("6.67 MiB", "7.34 M")


def test_csv_and_json_lines_have_a_row_for_each_test(result: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(outputs.render(result, "csv"))))
    lines = [json.loads(line) for line in outputs.render(result, "jsonl").splitlines()]
    whole = json.loads(outputs.render(result, "json"))["tests"]
    assert lines == whole
    assert len(rows) == len(whole)
    assert float(rows[3]["avg_ts"]) == pytest.approx(whole[3]["avg_ts"])
    assert (rows[0]["gpu_info"], rows[0]["test"]) == ("NVIDIA H100 80GB HBM3", "pp512")
    assert not any(name.startswith("samples_") for name in rows[0])
