"""`exl bench`: whole runs with engines whose pace is known, and the built-in model for real."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import benchdata
import jsonschema
import pexpect
import pytest
import torch
from benchfakes import FAILURE, SHORT, BatchEngine, PacedEngine, PacedLoader, bench, stopping_after
from helpers import exl
from typer.testing import CliRunner

import exl_cli
from exl_cli.bench import outputs
from exl_cli.cli.app import app
from exl_cli.engines.base import Engine, Request
from exl_cli.errors import ExitCode
from exl_cli.sampling import Sampling
from exl_cli.system.readings import DeviceMemory

SCHEMA = json.loads((Path(exl_cli.__file__).parent / "bench" / "schema.json").read_text())


def measured(loader: PacedLoader, *args: str) -> dict[str, object]:
    """The JSON of a run that went well, checked against the schema."""
    result = bench(loader, *SHORT, "-o", "json", *args)
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    jsonschema.validate(value, SCHEMA, format_checker=jsonschema.FormatChecker())
    return value


@pytest.fixture
def loader() -> PacedLoader:
    return PacedLoader()


def test_the_table_fits_eighty_columns(loader: PacedLoader) -> None:
    result = bench(loader, *SHORT)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "fable-7m EXL2 5.0 bpw  6.67 MiB, 7.34 M, paced, cache float32"
    rows = [line for line in lines if re.match(r" *(pp|tg)\d+(\+tg\d+)? +[\d,.]+ ± ", line)]
    assert [row.split()[0] for row in rows] == ["pp20", "tg4", "pp20+tg4"]
    # 20 tokens in the 0.25 seconds that the engine reports.
    assert "80.0 ± 0.0" in rows[0]
    assert max(map(len, rows)) <= 80
    assert loader.engines[0].closed  # type: ignore[attr-defined]


def test_the_json_of_a_run(loader: PacedLoader) -> None:
    value = measured(loader, "--seed", "5", "--depth", "0,30")
    tests = {entry["test"]: entry for entry in value["tests"]}  # type: ignore[attr-defined]
    assert list(tests) == ["pp20", "tg4", "tg4 @ d30", "pp20+tg4"]
    assert tests["pp20"]["samples_ns"] == [250_000_000] * 3
    assert tests["pp20"]["avg_ts"] == pytest.approx(80)
    assert (value["partial"], value["settings"]["seed"], value["settings"]["depths"]) == ("", 5, [0, 30])  # type: ignore[index]
    order = value["order"]
    assert sorted(order) == sorted(list(tests) * 3)  # type: ignore[type-var, arg-type]
    assert all(set(order[at : at + 4]) == set(tests) for at in (0, 4, 8))  # type: ignore[index]
    assert value["runs"][0]["cold"] is None  # type: ignore[index]
    assert value["sampling"] == Sampling().to_dict()
    assert loader.needed == [35]  # the largest test: 30 of context, 4 new tokens and the one before them


def test_prompts_are_fresh_and_nothing_ends_a_generation_early(loader: PacedLoader, exl2_dir: Path) -> None:
    measured(loader, "--top-k", "7")
    requests = loader.engines[0].requests  # type: ignore[attr-defined]
    assert len(requests) == 3 + 3 * 3  # each test once before it is timed
    assert len({request.ids[0] for request in requests}) == len(requests)
    special = {token["id"] for token in json.loads((exl2_dir / "tokenizer.json").read_text())["added_tokens"]}
    assert not special & {token for request in requests for token in request.ids}
    assert all(not request.stop_ids and request.sampling == Sampling(top_k=7) for request in requests)
    again = PacedLoader()
    measured(again, "--top-k", "7")
    assert [r.ids for r in again.engines[0].requests] == [r.ids for r in requests]  # type: ignore[attr-defined]


def test_reused_prompts_are_told() -> None:
    value = measured(PacedLoader(lambda: PacedEngine(reused=5)))
    assert any("15 prompt tokens were not computed but reused" in text for text in value["warnings"])  # type: ignore[attr-defined]


def test_an_engine_that_goes_on_in_another_way_is_told() -> None:
    class Fallen(PacedEngine):
        def add(self, request_id: int, request: Request) -> None:
            if len(self.requests) == 2:
                self.facts = {**self.facts, "graphs": "none (out of memory)"}
            super().add(request_id, request)

    value = measured(PacedLoader(Fallen))
    (said,) = (text for text in value["warnings"] if "graphs" in text)  # type: ignore[attr-defined]
    assert "graphs was nothing at first, and then none (out of memory): the figures are of both" in said


def test_batches_on_an_engine_that_has_them() -> None:
    value = measured(PacedLoader(BatchEngine), "--batch", "3", "-p", "0")
    assert [(entry["test"], entry["n_parallel"]) for entry in value["tests"]] == [("tg4 x3", 3)]  # type: ignore[attr-defined]


def test_batches_on_an_engine_that_has_none(loader: PacedLoader) -> None:
    value = measured(loader, "--batch", "1,4")
    assert value["skipped"] == ["--batch 4 left out: the paced engine computes one request at a time"]
    result = bench(loader, *SHORT, "--batch", "4")
    assert result.exit_code == ExitCode.USAGE
    assert "the paced engine computes one request at a time, so it cannot run --batch 4" in result.stderr


def test_what_the_context_does_not_hold_is_left_out(loader: PacedLoader) -> None:
    value = measured(loader, "--depth", "0,4096")
    assert [entry["test"] for entry in value["tests"]] == ["pp20", "tg4", "pp20+tg4"]  # type: ignore[attr-defined]
    assert "tg4 @ d4096" in value["skipped"][0]  # type: ignore[index]
    result = bench(loader, "-p", "5000", "-n", "0")
    assert (result.exit_code, len(loader.engines)) == (ExitCode.USAGE, 1)
    assert "pp5000 needs 5,002 tokens, there are 1,024" in result.stderr


def test_cache_types_make_a_grid(gptq_dir: Path) -> None:
    def make() -> Engine:
        engine = PacedEngine()
        engine.facts["cache"] = loader.options[-1].cache
        return engine

    loader = PacedLoader(make)
    value = measured(loader, "fable-7m", str(gptq_dir), "--caches", "fp16,q4")
    runs = [(run["model"]["format"], run["cache"]) for run in value["runs"]]  # type: ignore[attr-defined]
    assert runs == [("exl2", "fp16"), ("exl2", "q4"), ("gptq", "fp16"), ("gptq", "q4")]
    assert len(value["tests"]) == 12  # type: ignore[arg-type]


def test_an_engine_without_cache_types_is_measured_once(loader: PacedLoader) -> None:
    value = measured(loader, "--caches", "fp16,q4")
    assert len(loader.engines) == 1
    assert value["skipped"] == ["cache q4 left out for fable-7m: the paced engine keeps its KV cache in float32"]
    assert "fp8" in bench(loader, "--caches", "fp8").stderr


class CardEngine(PacedEngine):
    """Says that it holds memory of a card."""

    def memory(self) -> list[DeviceMemory]:
        return [DeviceMemory("cpu", "Card 9000", "GPU-9000", 2**30, 2**31)]


def test_the_memory_of_a_card_is_reported() -> None:
    value = measured(PacedLoader(CardEngine))
    run, tests = value["runs"][0], {entry["test"]: entry for entry in value["tests"]}  # type: ignore[index, attr-defined]
    assert run["memory"]["allocator"] == 2**31
    assert value["environment"]["gpu"] == "Card 9000"  # type: ignore[index]
    # The packed weights and not their float32 form: 5 bits each instead of 32.
    assert tests["tg4"]["step_bytes"] < 8_500_000
    assert tests["tg4"]["kernel_ns"] is None
    assert (tests["pp20"]["backends"], tests["pp20"]["gpu_info"]) == ("CUDA", "Card 9000")


def test_ctrl_c_reports_what_is_done() -> None:
    # 3 untimed requests, then 3 repetitions of 3 tests: the eighth request is the fifth that is timed.
    result = bench(PacedLoader(stopping_after(8)), *SHORT, "-o", "json")
    assert result.exit_code == ExitCode.INTERRUPTED
    value = json.loads(result.stdout)
    jsonschema.validate(value, SCHEMA)
    assert value["partial"] == "interrupted"
    assert sum(len(entry["samples_ns"]) for entry in value["tests"]) == 4
    assert "partial: interrupted" in bench(PacedLoader(stopping_after(8)), *SHORT).stderr


def test_a_failure_reports_what_is_done_and_what_is_wrong() -> None:
    result = bench(PacedLoader(stopping_after(8, FAILURE)), *SHORT, "-o", "jsonl")
    assert result.exit_code == ExitCode.ENGINE
    assert len(result.stdout.splitlines()) == 3
    assert "error: the device fell off; put it back" in result.stderr
    early = bench(PacedLoader(stopping_after(1, FAILURE)), *SHORT)
    assert (early.exit_code, early.stdout) == (ExitCode.ENGINE, "")


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (("-p", "many"), ExitCode.USAGE, "--prompt-tokens"),
        (("-p", "0", "-n", "0"), ExitCode.USAGE, "nothing is left"),
        (("no-such-model",), ExitCode.MODEL_NOT_FOUND, "no-such-model"),
        (("--perplexity", "no-such-file"), ExitCode.PROMPT, "no-such-file"),
        (("no-such-result.json",), ExitCode.USAGE, "cannot read"),
        (("--top-p", "7"), ExitCode.USAGE, "top_p"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    loader: PacedLoader, args: tuple[str, ...], code: ExitCode, word: str
) -> None:
    result = bench(loader, *args)
    assert (result.exit_code, result.stdout, loader.engines) == (code, "", [])
    assert word in result.stderr


def test_perplexity_stands_beside_the_speed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time")
    value = measured(PacedLoader(Uniform), "--perplexity", str(tmp_path / "text.txt"))
    found = value["runs"][0]["perplexity"]  # type: ignore[index]
    assert found["value"] == pytest.approx(4096, rel=1e-3)
    assert found["tokens"] == 3


class Uniform(PacedEngine):
    """Finds all 4,096 tokens alike."""

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.zeros(len(ids), 4096)


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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    runs = (
        benchdata.gpu_run(perplexity=5.6),
        benchdata.gpu_run(name="a <b> & c", cache="q4", factor=0.8, perplexity=5.7),
    )
    result = benchdata.result(*runs, warnings=["hot & <slow>"], partial="interrupted")
    (tmp_path / "run.json").write_text(outputs.render(result, "json"))
    return tmp_path / "run.json"


def test_the_report_is_one_file_that_needs_nothing_else(saved: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(saved), "--report", str(saved.with_suffix(".html"))])
    assert result.exit_code == 0, result.output
    text = saved.with_suffix(".html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert "hot &amp; &lt;slow&gt;" in text
    assert "Not complete: interrupted" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_every_chart_has_words_and_figures_beside_it(saved: Path) -> None:
    CliRunner().invoke(app, ["bench", str(saved), "--report", str(saved.with_suffix(".html"))])
    text = saved.with_suffix(".html").read_text()
    charts = re.findall(r"<figure>(<svg.*?</svg>)\s*</figure>(<div.*?</div>)", text, re.DOTALL)
    assert len(charts) == 6
    ids: list[str] = []
    for chart, table in charts:
        svg = ElementTree.fromstring(chart)  # noqa: S314 - our own output
        space = "{http://www.w3.org/2000/svg}"
        title, described = svg.find(f"{space}title"), svg.find(f"{space}desc")
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
    assert "221.1" in text  # generation at depth 4,096, near what the result was made with


def test_without_matplotlib_the_report_says_what_to_install(saved: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from exl_cli.cli.app import app; app(sys.argv[1:])"
    args = ["bench", str(saved), "--report", str(saved.with_suffix(".html"))]
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert result.returncode == ExitCode.USAGE
    assert "pip install 'exl-cli[report]'" in result.stderr
    assert not saved.with_suffix(".html").exists()


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.smoke
def test_the_built_in_model_for_real(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time there was a fox. " * 20)
    args = ("--quick", "-r", "1", "-o", "json", "--engine", "cpu", "--perplexity", str(tmp_path / "story.txt"))
    result = exl("bench", *args, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    jsonschema.validate(value, SCHEMA, format_checker=jsonschema.FormatChecker())
    tests = {entry["test"]: entry for entry in value["tests"]}
    assert list(tests) == ["pp128", "tg32", "pp128+tg32"]
    assert tests["pp128"]["avg_ts"] > tests["tg32"]["avg_ts"] > 1
    assert all(0 < tests[name]["share_of_limit"] < 1.5 for name in ("pp128", "tg32"))
    assert tests["tg32"]["verdict"]
    assert all(sum(entry["samples_reused_tokens"]) == 0 for entry in value["tests"])
    run = value["runs"][0]
    cold = run["cold"]
    assert cold["import_seconds"] > 0.3  # torch alone takes longer
    assert cold["load_seconds"] > 0
    assert cold["start_to_token_seconds"] < value["seconds"]
    assert (cold["n_prompt"], cold["n_gen"], len(cold["sample"]["itl_ns"])) == (128, 32, 31)
    assert run["memory"]["host"] > 100 * 2**20
    assert run["perplexity"]["tokens"] > 100
    assert 1 < run["perplexity"]["value"] < 100
    assert value["environment"]["torch"].startswith("2.")


def test_nothing_of_a_benchmark_imports_pydantic_before_it_reads_a_record() -> None:
    # The worker has no typer, and its time to import is one of the figures.
    # typer 0.29 imports pydantic in any command, which is not ours to change.
    code = "import sys, exl_cli, exl_cli.bench.runner, exl_cli.ui.bench; print('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_ctrl_c_at_a_terminal_ends_the_worker_too() -> None:
    # The first test is over in no time, so that there is something to report.
    args = ["-m", "exl_cli", "bench", "-p", "2", "-n", "2", "-r", "1000", "--engine", "cpu"]
    child = pexpect.spawn(sys.executable, args, env=ONE_THREAD | {"TERM": "xterm", "COLUMNS": "80"}, timeout=60)
    child.expect(r"fable-7m: [a-z0-9+]+, [3-9] of 1000.*left")
    worker = [pid for pid in children_of(child.pid) if pid]
    assert worker
    child.sendintr()
    child.expect("partial: interrupted")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == ExitCode.INTERRUPTED
    assert not any(Path(f"/proc/{pid}").exists() for pid in worker)


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_an_error_in_the_worker_is_told_like_any_other() -> None:
    result = exl("bench", "--quick", "--engine", "exllamav2", env=ONE_THREAD)
    assert (result.returncode, result.stdout) == (ExitCode.ENGINE, "")
    assert "error: --engine exllamav2 cannot run here" in result.stderr
    assert "Traceback" not in result.stderr
