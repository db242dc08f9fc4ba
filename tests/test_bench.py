"""`exl bench`: whole runs with engines of known speed, output, saved files, measuring processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchdata
import pexpect
import pytest
import torch
from benchfakes import FAILURE, SHORT, VALIDATOR, BatchEngine, PacedEngine, PacedLoader, bench, stopping_after
from typer.testing import CliRunner

from exl_cli.bench import outputs
from exl_cli.cli.app import app
from exl_cli.engines.base import Engine
from exl_cli.errors import ExitCode
from exl_cli.sampling import Sampling
from exl_cli.system.readings import DeviceMemory
from exl_cli.ui.console import flags


def checked(text: str) -> Any:
    """JSON that follows the schema."""
    value = json.loads(text)
    VALIDATOR.validate(value)
    return value


def measured(loader: PacedLoader, *args: str) -> Any:
    """The JSON of a run that went well."""
    result = bench(loader, *SHORT, "-o", "json", *args)
    assert result.exit_code == 0, result.output
    return checked(result.stdout)


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
    assert [line for line in lines if line != line.rstrip()] == []
    assert loader.engines[0].closed  # type: ignore[attr-defined]


def test_the_json_of_a_run(loader: PacedLoader) -> None:
    value = measured(loader, "--seed", "5", "--depth", "0,30,4096")
    tests = {entry["test"]: entry for entry in value["tests"]}
    assert list(tests) == ["pp20", "tg4", "tg4 @ d30", "pp20+tg4"]
    left_out = "skipping tg4 @ d4096 for fable-7m: it needs 4,101 tokens of context, but there are 1,024"
    assert value["skipped"] == [left_out]
    assert tests["pp20"]["samples_ns"] == [250_000_000] * 3
    assert tests["pp20"]["avg_ts"] == pytest.approx(80)
    assert (value["partial"], value["settings"]["seed"], value["settings"]["depths"]) == ("", 5, [0, 30, 4096])
    order = value["order"]
    assert sorted(order) == sorted(list(tests) * 3)
    assert all(set(order[at : at + 4]) == set(tests) for at in (0, 4, 8))
    assert value["runs"][0]["cold"] is None
    assert value["sampling"] == Sampling().to_dict()
    assert loader.needed == [35]  # the largest test: 30 of context, 4 new tokens and the one before them


def test_prompts_are_unique_and_generations_run_to_full_length(exl2_dir: Path) -> None:
    loaders = PacedLoader(), PacedLoader()
    for loader in loaders:
        measured(loader, "--top-k", "7")
    requests, again = (loader.engines[0].requests for loader in loaders)  # type: ignore[attr-defined]
    assert len(requests) == 3 + 3 * 3  # each test once before it is timed
    assert len({request.ids[0] for request in requests}) == len(requests)
    special = {token["id"] for token in json.loads((exl2_dir / "tokenizer.json").read_text())["added_tokens"]}
    assert not special & {token for request in requests for token in request.ids}
    assert all(not request.stop_ids and request.sampling == Sampling(top_k=7) for request in requests)
    assert [request.ids for request in again] == [request.ids for request in requests]


class OddEngine(PacedEngine):
    """Holds memory of a card, finds a part of its prompts computed already, and goes on in another way."""

    def __init__(self) -> None:
        super().__init__(reused=5)

    def memory(self) -> list[DeviceMemory]:
        return [DeviceMemory("cpu", "Card 9000", "GPU-9000", 2**30, 2**31)]

    def add(self, request_id: int, request: Any) -> None:
        if len(self.requests) == 2:
            self.facts = {**self.facts, "graphs": "none (out of memory)"}
        super().add(request_id, request)


def test_engine_notes_and_gpu_memory_are_shown() -> None:
    value = measured(PacedLoader(OddEngine))
    warnings = "\n".join(value["warnings"])
    assert "15 prompt tokens were reused instead of computed" in warnings
    assert "graphs changed from nothing to none (out of memory) during the run; the figures cover both" in warnings
    tests = {entry["test"]: entry for entry in value["tests"]}
    assert (value["runs"][0]["memory"]["allocator"], value["environment"]["gpu"]) == (2**31, "Card 9000")
    assert value["runs"][0]["memory"]["by_gpu"] == {"cpu": 2**31}
    # The packed weights and not their float32 form: 5 bits each instead of 32.
    assert tests["tg4"]["step_bytes"] < 8_500_000
    assert tests["tg4"]["kernel_ns"] is None
    assert (tests["pp20"]["backends"], tests["pp20"]["gpu_info"]) == ("CUDA", "Card 9000")


def test_batches(loader: PacedLoader) -> None:
    value = measured(PacedLoader(lambda: BatchEngine(3)), "--batch", "3", "-p", "0")
    assert [(entry["test"], entry["n_parallel"]) for entry in value["tests"]] == [("tg4 x3", 3)]
    value = measured(loader, "--batch", "1,4,16")
    assert value["skipped"] == ["skipping --batch 4,16: the paced engine computes one request at a time"]
    assert all(entry["n_parallel"] == 1 for entry in value["tests"])
    # 16 requests take a page of 256 tokens each, and the model has a context of 1,024.
    assert loader.options[-1].sequences == 4


def test_cache_types_make_a_grid_where_the_engine_has_them(gptq_dir: Path, loader: PacedLoader) -> None:
    def make() -> Engine:
        engine = PacedEngine()
        engine.facts["cache"] = cached.options[-1].cache
        return engine

    cached = PacedLoader(make)
    value = measured(cached, "fable-7m", str(gptq_dir), "--caches", "fp16,q4", "-r", "1")
    runs = [(run["model"]["format"], run["cache"]) for run in value["runs"]]
    assert runs == [("exl2", "fp16"), ("exl2", "q4"), ("gptq", "fp16"), ("gptq", "q4")]
    assert len(value["tests"]) == 12
    value = measured(loader, "--caches", "fp16,q4")
    assert len(loader.engines) == 1
    assert value["skipped"] == ["skipping cache q4 for fable-7m: the paced engine keeps its KV cache in float32"]


class Uniform(PacedEngine):
    """Finds all 4,096 tokens alike."""

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.zeros(len(ids), 4096)


def test_perplexity_stands_beside_the_speed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time")
    value = measured(PacedLoader(Uniform), "--perplexity", str(tmp_path / "text.txt"))
    perplexity = value["runs"][0]["perplexity"]
    assert (perplexity["value"], perplexity["tokens"]) == (pytest.approx(4096, rel=1e-3), 3)


@pytest.mark.parametrize(
    ("args", "code", "words", "loads"),
    [
        (("-p", "many"), ExitCode.USAGE, "--prompt-tokens", 0),
        (("-p", "0", "-n", "0"), ExitCode.USAGE, "nothing to measure", 0),
        (("no-such-model",), ExitCode.MODEL_NOT_FOUND, "no-such-model", 0),
        (("--perplexity", "no-such-file"), ExitCode.DISK, "no-such-file", 0),
        (("no-such-result.json",), ExitCode.DISK, "cannot read", 0),
        (("--top-p", "7"), ExitCode.USAGE, "--top-p", 0),
        (("--caches", "fp8"), ExitCode.USAGE, "fp8", 0),
        (("-p", "5000", "-n", "0"), ExitCode.USAGE, "pp5000 needs 5,002 tokens, but there are 1,024", 0),
        (("--batch", "4"), ExitCode.USAGE, "computes one request at a time, so it cannot run --batch 4", 1),
    ],
)
def test_usage_errors_are_reported_before_measuring(
    loader: PacedLoader, args: tuple[str, ...], code: ExitCode, words: str, loads: int
) -> None:
    result = bench(loader, *args)
    assert (result.exit_code, result.stdout, len(loader.engines)) == (code, "", loads)
    assert words in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, ExitCode.INTERRUPTED, "partial: interrupted"),
        (FAILURE, ExitCode.ENGINE, "error: the device fell off; put it back"),
    ],
)
def test_an_interrupted_run_reports_finished_measurements(
    error: Exception | None, code: ExitCode, said: str, tmp_path: Path
) -> None:
    # 3 untimed requests, then 3 repetitions of 3 tests: the eighth request is the fifth that is timed.
    result = bench(stopping_after(8, error), *SHORT, "-o", "json")
    assert result.exit_code == code
    assert said in result.stderr
    value = checked(result.stdout)
    assert value["partial"]
    assert sum(len(entry["samples_ns"]) for entry in value["tests"]) == 4
    # Before the first repetition there is nothing to print, and no good file is replaced by an empty one.
    (tmp_path / "run.json").write_text("a good one")
    for output in ("table", "json"):
        args = "-o", output, "--save", str(tmp_path / "run.json"), "--report", str(tmp_path / "new" / "run.html")
        result = bench(stopping_after(1, error), *SHORT, *args)
        assert (result.exit_code, result.stdout) == (code, "")
        assert said in result.stderr
        assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
        assert (tmp_path / "run.json").read_text() == "a good one"


def test_a_result_is_saved_whole_and_shown_again(loader: PacedLoader, tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "run.json"
    first = bench(loader, "-p", "20", "-n", "4", "-r", "1", "--save", str(file))
    checked(file.read_text())
    assert [entry.name for entry in file.parent.iterdir()] == ["run.json"]
    shown = bench(loader, str(file), "--report", str(tmp_path / "run.html"))
    assert (shown.exit_code, shown.stdout, len(loader.engines)) == (0, first.stdout, 1)
    # A single repetition has no deviation.
    assert re.search(r"^ *pp20 +80\.0  ", shown.stdout, re.MULTILINE)
    assert "±" not in shown.stdout
    assert "1 repetition in random order, seed 0;" in shown.stdout
    page = (tmp_path / "run.html").read_text()
    assert "1 repetition,\n" in page
    assert re.search(r"pp20</t[hd]><td[^>]*>80\.0</td><td[^>]*>[\d-]", page)


@pytest.mark.parametrize("flag", ["--save", "--report"])
@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        ("", ExitCode.USAGE, "is a folder"),
        ("/", ExitCode.USAGE, "is a folder"),
        ("{folder}", ExitCode.USAGE, "is a folder"),
        ("{folder}/pipe", ExitCode.USAGE, "is none"),
        ("{folder}/run.json/x", ExitCode.DISK, "Not a directory"),
        ("{folder}/run.json/new/x", ExitCode.DISK, "Not a directory"),
        ("/proc/exl-result", ExitCode.DISK, "No such file or directory"),
        ("{folder}/" + "x" * 300, ExitCode.DISK, "File name too long"),
    ],
)
def test_a_place_that_takes_no_file_is_refused_before_anything_is_measured(
    loader: PacedLoader, tmp_path: Path, flag: str, place: str, code: ExitCode, words: str
) -> None:
    (tmp_path / "run.json").write_text("here before")
    os.mkfifo(tmp_path / "pipe")
    result = bench(loader, *SHORT, flag, place.format(folder=tmp_path))
    assert (result.exit_code, result.stdout, loader.engines) == (code, "", [])
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "pipe"}
    assert ((tmp_path / "run.json").read_text(), (tmp_path / "pipe").is_fifo()) == ("here before", True)


def test_a_failed_save_still_prints_the_results(tmp_path: Path) -> None:
    file, report = tmp_path / "run.json", tmp_path / "report.html"
    # Someone puts a folder into its place meanwhile.
    loader = PacedLoader(lambda: PacedEngine(on_request=lambda request: file.mkdir(exist_ok=True)))
    result = bench(loader, *SHORT, "--save", str(file), "--report", str(report))
    assert result.exit_code == ExitCode.DISK
    assert "pp20+tg4" in result.stdout
    assert f"error: cannot write {file}: Is a directory" in result.stderr
    assert "<html" in report.read_text()


def test_a_broken_pipe_does_not_prevent_saving(tmp_path: Path) -> None:
    file = tmp_path / "copy.json"
    (tmp_path / "run.json").write_text(outputs.render(benchdata.result(benchdata.gpu_run()), "json", flags))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "exl_cli", "bench", str(tmp_path / "run.json"), "-o", "json", "--save", str(file)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert result.returncode == ExitCode.BROKEN_PIPE
    assert json.loads(file.read_text()) == json.loads((tmp_path / "run.json").read_text())


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.smoke
def test_the_built_in_model_for_real(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time there was a fox. " * 20)
    args = [
        *["-p", "32", "-n", "8", "-r", "1", "-o", "json", "--engine", "cpu", "--perplexity"],
        str(tmp_path / "story.txt"),
    ]
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 0, result.stderr
    value = checked(result.stdout)
    tests = {entry["test"]: entry for entry in value["tests"]}
    assert list(tests) == ["pp32", "tg8", "pp32+tg8"]
    assert tests["pp32"]["avg_ts"] > tests["tg8"]["avg_ts"] > 1
    assert all(0 < tests[name]["share_of_limit"] < 1.5 for name in ("pp32", "tg8"))
    assert tests["tg8"]["verdict"]
    assert all(sum(entry["samples_reused_tokens"]) == 0 for entry in value["tests"])
    run = value["runs"][0]
    cold = run["cold"]
    assert cold["import_seconds"] > 0.3  # torch alone takes longer
    assert cold["load_seconds"] > 0
    assert cold["start_to_token_seconds"] < value["seconds"]
    assert (cold["n_prompt"], cold["n_gen"], len(cold["sample"]["itl_ns"])) == (32, 8, 7)
    assert run["memory"]["host"] > 100 * 2**20
    assert run["perplexity"]["tokens"] > 100
    assert 1 < run["perplexity"]["value"] < 100
    assert value["environment"]["torch"].startswith("2.")


def test_nothing_of_a_benchmark_imports_pydantic_before_it_reads_a_record() -> None:
    # The process that measures has no typer, and its time to import is one of the figures.
    # typer 0.29 imports pydantic in any command, which is not ours to change.
    code = "import sys, exl_cli, exl_cli.bench.runner, exl_cli.ui.bench; print('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_ctrl_c_at_a_terminal_ends_the_process_that_measures_too() -> None:
    args = ["-m", "exl_cli", "bench", "--engine", "cpu"]
    child = pexpect.spawn(sys.executable, args, env=ONE_THREAD | {"TERM": "xterm", "COLUMNS": "80"}, timeout=60)
    child.expect("fable-7m: starting")  # which that process says
    measuring = children_of(child.pid)
    assert measuring
    child.sendintr()
    child.expect("partial: interrupted")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == ExitCode.INTERRUPTED
    assert not any(Path(f"/proc/{pid}").exists() for pid in measuring)


def children_of(pid: int) -> list[int]:
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            children.append(int(entry.parent.name))
    return children


def test_an_error_in_the_measuring_process_is_reported_as_usual(exl2_dir: Path, tmp_path: Path) -> None:
    for file in exl2_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 7}')
    result = CliRunner().invoke(app, ["bench", str(tmp_path), "--engine", "cpu"])
    assert (result.exit_code, result.stdout) == (ExitCode.DAMAGED_MODEL, "")
    assert re.search(r"^error: .*tokenizer", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
