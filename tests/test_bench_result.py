"""Benchmark results: statistics against NumPy, JSON against the schema, Markdown against llama-bench's format."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import benchdata
import jsonschema
import numpy as np
import pytest
from benchfakes import SCHEMA, VALIDATOR
from typer.testing import CliRunner

from exl_cli.bench import outputs
from exl_cli.bench.plan import Case
from exl_cli.bench.result import Result
from exl_cli.cli.app import app
from exl_cli.errors import ExitCode, UsageError

# llama-bench's fields that mean the same here, and the type that it gives them (get_field_type in llama-bench.cpp).
LLAMA_FIELDS: dict[type, tuple[str, ...]] = {
    str: ("cpu_info", "gpu_info", "backends", "model_filename", "model_type", "type_k", "type_v", "test_time"),
    int: ("model_size", "model_n_params", "n_prompt", "n_gen", "n_depth", "avg_ns", "stddev_ns"),
    float: ("avg_ts", "stddev_ts"),
    list: ("samples_ns", "samples_ts"),
}


@pytest.fixture(scope="module")
def result() -> Result:
    return benchdata.result(
        benchdata.gpu_run(perplexity=5.61),
        benchdata.gpu_run(name="a <b> & c", cache="q4", factor=0.8, seed=1, perplexity=5.7),
        warnings=["hot & <slow>"],
        partial="interrupted",
    )


@pytest.fixture(scope="module")
def whole(result: Result) -> dict[str, Any]:
    return dict(json.loads(outputs.render(result, "json")))


def test_the_json_matches_the_schema(whole: dict[str, Any]) -> None:
    VALIDATOR.check_schema(SCHEMA)
    few = [entry for entry in whole["tests"] if entry["n_parallel"] == 1]  # the others' samples take seconds to check
    VALIDATOR.validate({**whole, "tests": few})
    # The schema allows more fields, so that old copies of it read new files; here none may be missing from it.
    run, test = whole["runs"][0], whole["tests"][0]
    for part, value in (("run", run), ("test", test), ("cold", run["cold"])):
        assert set(value) == set(SCHEMA["$defs"][part]["properties"])
    assert set(whole) == set(SCHEMA["properties"])
    with pytest.raises(jsonschema.ValidationError, match="fast"):
        VALIDATOR.validate({**whole, "tests": [{**test, "avg_ts": "fast"}]})


def test_the_fields_of_a_test_are_llama_benchs_and_numpys(whole: dict[str, Any]) -> None:
    for entry in whole["tests"]:
        for kind, names in LLAMA_FIELDS.items():
            assert [name for name in names if not isinstance(entry[name], kind)] == []
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["test_time"])
        tokens = entry["n_parallel"] * (entry["n_prompt"] + entry["n_gen"])
        assert entry["samples_ts"] == pytest.approx([tokens * 1e9 / ns for ns in entry["samples_ns"]])
        assert entry["avg_ts"] == pytest.approx(np.mean(entry["samples_ts"]))
        assert entry["stddev_ts"] == pytest.approx(np.std(entry["samples_ts"], ddof=1))
        assert entry["avg_ns"] == pytest.approx(np.mean(entry["samples_ns"]), abs=1)
        assert entry["stddev_ns"] == pytest.approx(np.std(entry["samples_ns"], ddof=1), abs=1)
        assert entry["ttft_ns"] == pytest.approx(np.mean(entry["samples_ttft_ns"]), abs=1)
        steps = [step for sample in entry["samples_itl_ns"] for step in sample]
        expected = pytest.approx(np.percentile(steps, [5, 50, 95]), abs=1) if entry["n_gen"] else [None] * 3
        assert [entry[f"itl_{name}_ns"] for name in ("p5", "median", "p95")] == expected


def test_energy_is_per_token_and_omitted_for_short_runs() -> None:
    entry = benchdata.measured(Case(0, 100), [40.0, 50.0])  # 2.5 s and 2 s
    assert entry.joules_per_token is None
    entry.samples = [replace(sample, joules=300.0) for sample in entry.samples]
    assert entry.joules_per_token == pytest.approx(3.0)
    entry.samples = [replace(sample, ns=25_000_000) for sample in entry.samples]
    assert entry.joules_per_token is None


@pytest.mark.parametrize("field", ["", "samples_drafted_tokens", "samples_accepted_tokens"])
def test_what_was_written_is_read_back(result: Result, whole: dict[str, Any], field: str, tmp_path: Path) -> None:
    """Also what was written before there was speculation."""
    value = {**whole, "tests": [{key: entry[key] for key in entry if key != field} for entry in whole["tests"]]}
    (tmp_path / "a.json").write_text(json.dumps(value))
    read = outputs.load(tmp_path / "a.json")
    assert json.loads(outputs.render(read, "json")) == whole
    assert (read.settings, read.runs[1].cold, read.runs[0].tests) == (
        result.settings,
        result.runs[1].cold,
        result.runs[0].tests,
    )


def changed(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Callable[[dict[str, Any]], str]:
    """The JSON after a change of its first run and first test."""

    def made(whole: dict[str, Any]) -> str:
        value = json.loads(json.dumps(whole))
        change(value["runs"][0], value["tests"][0])
        return json.dumps(value)

    return made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lambda _: "{", "not valid JSON"),
        (lambda _: '{"a":' * 20_000, "not valid JSON: nested too deeply"),
        (lambda _: "[]", "not an exl bench result"),
        (lambda _: '{"schema": 99, "tests": []}', "schema 99"),
        (lambda _: '{"schema": 1, "tests": [], "runs": [{}]}', "damaged"),
        (
            changed(lambda run, test: run["memory"].update(host="x")),
            r"runs\.0\.memory\.host must be an integer",
        ),
        (changed(lambda run, test: run["model"].pop("size_bytes")), "damaged: KeyError 'size_bytes'"),
        (changed(lambda run, test: test.pop("samples_ns")), r"damaged: runs\.0\.tests\.0\.samples\.0\.ns is missing"),
        (changed(lambda run, test: test["samples_ns"].pop()), "damaged: ValueError zip"),
        (changed(lambda run, test: test.update(samples_ns=[0] * 5)), "damaged: ZeroDivisionError"),
    ],
)
def test_files_that_are_no_results(
    whole: dict[str, Any], tmp_path: Path, text: Callable[[dict[str, Any]], str], words: str
) -> None:
    (tmp_path / "x.json").write_text(text(whole))
    with pytest.raises(UsageError, match=words):
        outputs.load(tmp_path / "x.json")


def parse_as_llama_bench(text: str) -> list[dict[str, str]]:
    """The way that scripts read llama-bench's Markdown: a head, a rule, rows until the first line that is none."""
    lines = text.splitlines()
    split = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    end = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    assert all(re.fullmatch(r"-+:?", cell) for cell in split[1])
    return [dict(zip(split[0], row, strict=True)) for row in split[2:end]]


def test_the_markdown_is_llama_benchs_table_and_a_column_for_what_varies(result: Result) -> None:
    rows = parse_as_llama_bench(outputs.markdown(result))
    titles = ["model", "size", "params", "backend", "type_k", "type_v", "n_parallel", "test", "t/s"]
    assert list(rows[0]) == titles
    assert list(rows[0].values())[:4] == ["Mistral-7B-EXL2 EXL2 4.0 bpw", "3.82 GiB", "7.24 B", "CUDA"]
    assert {row["type_k"] for row in rows} == {"fp16", "q4"}
    assert [row["n_parallel"] for row in rows if row["test"] == "tg128"] == ["1", "4", "16"] * 2
    run = benchdata.gpu_run()
    run.tests = [entry for entry in run.tests if entry.test.n_parallel == 1]
    text = outputs.markdown(benchdata.result(run))
    rows = parse_as_llama_bench(text)
    assert list(rows[0]) == [*titles[:4], "test", "t/s"]
    assert [row["test"] for row in rows] == ["pp512", "tg128", "tg128 @ d4096", "tg128 @ d16384", "pp512+tg128"]
    for row, entry in zip(rows, run.tests, strict=True):
        assert row["t/s"] == f"{statistics.mean(entry.rates):.2f} ± {statistics.stdev(entry.rates):.2f}"
    assert "\nbuild: exl " in text


def test_csv_and_json_lines_have_a_row_for_each_test(result: Result, whole: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(outputs.render(result, "csv"))))
    assert [json.loads(line) for line in outputs.render(result, "jsonl").splitlines()] == whole["tests"]
    assert len(rows) == len(whole["tests"])
    assert float(rows[3]["avg_ts"]) == pytest.approx(whole["tests"][3]["avg_ts"])
    assert (rows[0]["gpu_info"], rows[0]["test"]) == ("NVIDIA H100 80GB HBM3", "pp512")
    assert not any(name.startswith("samples_") for name in rows[0])


@pytest.fixture(scope="module")
def page(whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "run.json").write_text(json.dumps(whole))
    result = CliRunner().invoke(app, ["bench", str(folder / "run.json"), "--report", str(folder / "run.html")])
    assert result.exit_code == 0, result.output
    return (folder / "run.html").read_text()


class Page(html.parser.HTMLParser):
    """Collects what could leave the page, and checks that elements are closed in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_self_contained(page: str) -> None:
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    assert all(link.startswith("#") for link in parsed.links)
    assert "script" not in parsed.tags
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    for text in ("hot &amp; &lt;slow&gt;", "Incomplete: interrupted", "prefers-color-scheme: dark", "@media print"):
        assert text in page


def test_every_chart_has_words_and_figures_beside_it(page: str) -> None:
    charts = re.findall(r"<figure>(<svg.*?</svg>)\s*</figure>(<div.*?</div>)", page, re.DOTALL)
    assert len(charts) == 6
    ids: list[str] = []
    for chart, table in charts:
        svg = ElementTree.fromstring(chart)  # noqa: S314 - our own output
        title, described = (svg.find(f"{{http://www.w3.org/2000/svg}}{tag}") for tag in ("title", "desc"))
        assert title is not None
        assert described is not None
        assert title.text
        assert re.search(r"\d", described.text or "")
        assert svg.get("aria-labelledby") == f"{title.get('id')} {described.get('id')}"
        # Colours come from the style sheet alone, so that they change with it.
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", chart)
        assert "<td" in table
        ids += [element.get("id", "") for element in svg.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert "221.1" in page  # generation at depth 4,096, near what the result was made with


def test_without_matplotlib_the_report_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["bench", "--report", str(tmp_path / "run.html")])
    assert (result.exit_code, result.stdout, list(tmp_path.iterdir())) == (ExitCode.USAGE, "", [])
    assert "pip install 'exl-cli[report]'" in result.stderr
