"""Comparing two results: what counts as a difference."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import benchdata
import pytest
from typer.testing import CliRunner, Result

from exl_cli.bench import outputs
from exl_cli.bench.compare import compare, judge, p_value
from exl_cli.cli.app import app
from exl_cli.errors import ExitCode


@pytest.mark.parametrize(
    ("before", "after", "p"),
    [
        # Of all ways to deal the values out, those at least as far apart, by hand.
        ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], 2 / 252),
        ([1, 2, 3], [4, 5, 6], 2 / 20),
        ([1, 2, 4], [3, 5, 6], 4 / 20),
        ([5, 5, 5], [5, 5, 5], 1),
        ([1], [2], 1),
        ([1, 2, 3, 4], [10], 1 / 5),
    ],
)
def test_the_permutation_test_is_exact(before: list[float], after: list[float], p: float) -> None:
    assert p_value(before, after) == pytest.approx(p)
    assert p_value(after, before) == pytest.approx(p)


def test_many_repetitions_are_dealt_at_random() -> None:
    numbers = random.Random(0)
    same = [numbers.gauss(100, 5) for _ in range(20)]
    shifted = [value + 3 for value in numbers.sample(same, 20)]
    p = p_value(same, shifted)
    assert p == pytest.approx(0.0993, abs=0.01)  # Student's t with 38 degrees of freedom
    assert p == p_value(same, shifted)


@pytest.mark.parametrize(
    ("before", "after", "mark"),
    [
        ([100, 101, 99, 100, 100.5], [80, 81, 79, 80, 80.5], "slower"),
        ([100, 101, 99, 100, 100.5], [120, 121, 119, 120, 120.5], "faster"),
        ([100, 101, 99, 100, 100.5], [98.9, 98.8, 98.95, 98.7, 98.85], "same"),  # told apart, but by 1 % only
        ([100, 80, 120, 90, 110], [95, 75, 115, 85, 105], "noise"),
        ([100, 101, 99, 100], [80, 81, 79, 80], "unclear"),
        ([100], [50], "unclear"),
        ([100], [100.5], "same"),
    ],
)
def test_what_counts_as_a_difference(before: list[float], after: list[float], mark: str) -> None:
    assert judge(before, after)[1] == mark


def test_the_cache_types_of_two_results_are_compared() -> None:
    fp16 = benchdata.result(benchdata.gpu_run(perplexity=5.61))
    q4 = benchdata.result(benchdata.gpu_run(cache="q4", factor=0.8, seed=5, perplexity=5.7))
    compared = compare(fp16, q4)
    rows = {row.test: row for row in compared.rows}
    assert {name for name, row in rows.items() if row.mark == "slower"} == rows.keys() - {"pp512"}
    assert (rows["tg128"].cache, rows["tg128"].ratio) == ("fp16 → q4", pytest.approx(0.8, rel=0.01))
    quality = next(figure for figure in compared.figures if figure.name == "perplexity")
    assert (quality.before, quality.after) == (pytest.approx(5.61), pytest.approx(5.7))
    assert quality.note == "different output"
    # The GPU computes 3.5 ms of a step: at 180 tokens/s and slower it is idle for more than a quarter of it.
    assert "tg128 @ d16384" in compared.doubtful
    assert "pp512" not in compared.doubtful
    assert compare(fp16, fp16).doubtful == []


def test_several_models_and_caches_are_compared_each_with_its_own() -> None:
    old = benchdata.result(benchdata.gpu_run(), benchdata.gpu_run(cache="q4", factor=0.8))
    new = benchdata.result(benchdata.gpu_run(cache="q4", factor=0.8, seed=3), benchdata.gpu_run(cache="q8", seed=4))
    compared = compare(old, new)
    assert {(row.cache, row.mark) for row in compared.rows} == {("q4", "same")}
    assert "Mistral-7B-EXL2 EXL2 4.0 bpw, cache q8: tg128" in compared.missing
    assert "Mistral-7B-EXL2 EXL2 4.0 bpw, cache fp16: tg128" in compared.missing


def test_a_different_machine_or_prompt_is_noted() -> None:
    old, new = (benchdata.result(benchdata.gpu_run(perplexity=5.6)) for _ in range(2))
    new.environment = {**new.environment, "driver": "590.0"}
    new.runs[0].perplexity = replace(new.runs[0].perplexity, sha256="1" * 64)
    compared = compare(old, new)
    assert compared.changed == [("driver", "580.1", "590.0")]
    notes = [figure.note for figure in compared.figures if figure.name == "perplexity"]
    assert notes == ["not comparable: different text, tokenizer or window"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {
        "a": benchdata.result(benchdata.gpu_run(seed=1)),
        "b": benchdata.result(benchdata.gpu_run(seed=2)),
        "q4": benchdata.result(benchdata.gpu_run(cache="q4", factor=0.8, seed=3)),
    }
    for name in ("a", "q4"):
        once = made[f"{name} once"] = copy.deepcopy(made[name])
        for _, entry in once.measured():
            entry.samples = entry.samples[:1]
    folder = tmp_path_factory.mktemp("saved")
    for name, result in made.items():
        (folder / f"{name}.json").write_text(outputs.render(result, "json"))
    return {name: str(folder / f"{name}.json") for name in made}


def bench(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


def test_comparing_two_files(saved: dict[str, str]) -> None:
    result = bench("--compare", saved["a"], saved["b"], "--fail-under", "0.95")
    assert (result.exit_code, result.stdout.count("no difference")) == (0, 8), result.output
    assert "only in one" not in result.stderr
    assert "changed" not in result.stdout
    result = bench("--compare", saved["a"], saved["q4"], "--fail-under", "0.7")
    assert result.exit_code == 0
    assert "cache fp16 → q4" in result.stdout
    assert "6 slower of 7 tests" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 160
    assert [line for line in result.stdout.splitlines() if line != line.rstrip()] == []


def test_falling_below_the_bound_has_its_own_exit_code(saved: dict[str, str]) -> None:
    result = bench("--compare", saved["a"], saved["q4"], "--fail-under", "0.95", "-o", "json")
    assert result.exit_code == ExitCode.BENCH_SLOWER == 11
    assert "tg128 is at 0.8" in result.stderr
    # Beside another format the comparison is on stderr.
    assert json.loads(result.stdout)["schema"] == 1
    assert "SLOWER" in result.stderr


def test_a_single_repetition_cannot_hide_behind_chance(saved: dict[str, str]) -> None:
    result = bench("--compare", saved["a once"], saved["q4 once"], "--fail-under", "0.95")
    assert result.exit_code == 11
    assert "too few repetitions for a verdict" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--fail-under", "0.9"), ExitCode.USAGE, "--compare"),
        (("--compare", "{folder}/no.json"), ExitCode.DISK, "cannot read"),
        (("--compare", "{a}", "{b}", "{q4}"), ExitCode.USAGE, "is a saved result"),
    ],
)
def test_what_cannot_be_compared(
    saved: dict[str, str], tmp_path: Path, args: tuple[str, ...], code: ExitCode, words: str
) -> None:
    result = bench(*(arg.format(folder=tmp_path, **saved) for arg in args))
    assert result.exit_code == code, result.output
    assert words in result.stderr
