"""`exl bench`: what is printed and what is saved, and that neither is lost with the other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import benchdata
import jsonschema
import pytest
from benchfakes import FAILURE, SHORT, PacedEngine, PacedLoader, bench, stopping_after

import exl_cli
from exl_cli.bench import outputs
from exl_cli.errors import ExitCode
from exl_cli.ui.console import flags

SCHEMA = json.loads((Path(exl_cli.__file__).parent / "bench" / "schema.json").read_text())


@pytest.fixture
def loader() -> PacedLoader:
    return PacedLoader()


def test_a_result_is_saved_whole_or_not_at_all(loader: PacedLoader, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    bench(loader, *SHORT, "--save", str(file))
    jsonschema.validate(json.loads(file.read_text()), SCHEMA)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    shown = bench(loader, str(file))
    assert shown.exit_code == 0
    assert "pp20+tg4" in shown.stdout
    assert len(loader.engines) == 1


@pytest.mark.parametrize("flag", ["--save", "--report"])
@pytest.mark.parametrize(
    ("place", "code", "word"),
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
    loader: PacedLoader, tmp_path: Path, flag: str, place: str, code: ExitCode, word: str
) -> None:
    (tmp_path / "run.json").write_text("here before")
    os.mkfifo(tmp_path / "pipe")
    result = bench(loader, *SHORT, flag, place.format(folder=tmp_path))
    assert (result.exit_code, result.stdout, loader.engines) == (code, "", [])
    assert word in result.stderr
    assert result.stderr.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "pipe"}
    assert ((tmp_path / "run.json").read_text(), (tmp_path / "pipe").is_fifo()) == ("here before", True)


def test_a_new_folder_is_made_for_a_result_only_once_there_is_one(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "run.json"
    early = bench(PacedLoader(stopping_after(1, FAILURE)), *SHORT, "--save", str(file))
    assert (early.exit_code, list(tmp_path.iterdir())) == (ExitCode.ENGINE, [])
    assert bench(PacedLoader(), *SHORT, "--save", str(file)).exit_code == 0
    assert file.exists()


@pytest.mark.parametrize(("output", "shown"), [("table", "pp20+tg4"), ("json", '"tests"')])
def test_a_save_that_fails_loses_nothing_of_what_is_printed(tmp_path: Path, output: str, shown: str) -> None:
    file, report = tmp_path / "run.json", tmp_path / "report.html"
    # Someone puts a folder into its place meanwhile.
    loader = PacedLoader(lambda: PacedEngine(on_request=lambda request: file.mkdir(exist_ok=True)))
    result = bench(loader, *SHORT, "-o", output, "--save", str(file), "--report", str(report))
    assert result.exit_code == ExitCode.DISK
    assert shown in result.stdout
    assert f"error: cannot write {file}: Is a directory" in result.stderr
    assert "<html" in report.read_text()


def test_a_result_that_no_one_reads_is_saved_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "copy.json"
    (tmp_path / "run.json").write_text(outputs.render(benchdata.result(benchdata.gpu_run()), "json", flags))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "exl_cli", "bench", str(tmp_path / "run.json"), "-o", "json", "--save", str(file)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert result.returncode == ExitCode.BROKEN_PIPE
    assert json.loads(file.read_text()) == json.loads((tmp_path / "run.json").read_text())


def test_one_repetition_is_shown_without_a_deviation(loader: PacedLoader, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    result = bench(loader, "-p", "20", "-n", "4", "-r", "1", "--save", str(file))
    assert result.exit_code == 0
    assert re.search(r"^ *pp20 +80\.0  ", result.stdout, re.MULTILINE)
    assert "±" not in result.stdout
    assert "1 repetition in random order, seed 0;" in result.stdout
    bench(loader, str(file), "--report", str(tmp_path / "run.html"))
    page = (tmp_path / "run.html").read_text()
    assert "1 repetition,\n" in page
    assert re.search(r"pp20</t[hd]><td[^>]*>80\.0</td><td[^>]*>–</td>", page)


def test_lines_in_a_pipe_have_no_trailing_blanks(loader: PacedLoader, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    first = bench(loader, *SHORT, "--save", str(file))
    compared = bench(loader, str(file), "--compare", str(file))
    assert compared.exit_code == 0
    for result in (first, compared):
        assert [line for line in result.stdout.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize("output", ["table", "json", "md"])
def test_ctrl_c_before_the_first_result_says_so_and_nothing_else(tmp_path: Path, output: str) -> None:
    (tmp_path / "run.json").write_text("a good one")
    args = (*SHORT, "-o", output, "--save", str(tmp_path / "run.json"))
    result = bench(PacedLoader(stopping_after(0)), *args)
    assert (result.exit_code, result.stdout) == (ExitCode.INTERRUPTED, "")
    assert result.stderr.endswith("partial: interrupted\n")
    assert (tmp_path / "run.json").read_text() == "a good one"


@pytest.mark.parametrize("args", [(), ("--compare",)])
def test_a_result_nested_too_deeply_is_refused(loader: PacedLoader, tmp_path: Path, args: tuple[str, ...]) -> None:
    (tmp_path / "deep.json").write_text('{"a":' * 20_000)
    result = bench(loader, *args, str(tmp_path / "deep.json"))
    assert (result.exit_code, loader.engines) == (ExitCode.USAGE, [])
    assert "deep.json is not JSON: nested too deeply" in result.stderr
