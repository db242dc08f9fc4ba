"""Two results side by side: what counts as a difference, and what does not."""

from __future__ import annotations

import json
import math
import random
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
    same = [numbers.gauss(100, 5) for _ in range(40)]
    shifted = [value + 2.2 for value in numbers.sample(same, 40)]
    deviation = math.sqrt(sum((value - sum(same) / 40) ** 2 for value in same) / 39)
    # With so many values the permutation test agrees with the normal distribution.
    normal = math.erfc(2.2 / (deviation * math.sqrt(2 / 40)) / math.sqrt(2))
    assert p_value(same, shifted) == pytest.approx(normal, abs=0.02)
    assert p_value(same, [value + 20 for value in same]) < 0.001
    assert p_value(same, shifted) == p_value(same, shifted)


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


def test_two_runs_of_the_same_thing_do_not_differ() -> None:
    found = compare(benchdata.result(benchdata.gpu_run(seed=1)), benchdata.result(benchdata.gpu_run(seed=2)))
    assert not found.differs
    assert {row.mark for row in found.rows} == {"same"}
    assert (len(found.rows), found.missing, found.changed) == (7, [], [])


def test_the_cache_types_of_two_results_are_compared() -> None:
    fp16 = benchdata.result(benchdata.gpu_run(perplexity=5.61))
    q4 = benchdata.result(benchdata.gpu_run(cache="q4", factor=0.8, seed=5, perplexity=5.7))
    found = compare(fp16, q4)
    marks = {row.test: row.mark for row in found.rows}
    assert marks["pp512"] == "same"
    assert {mark for test, mark in marks.items() if test.startswith("tg")} == {"slower"}
    assert {row.cache for row in found.rows} == {"fp16 → q4"}
    assert next(row for row in found.rows if row.test == "tg128").ratio == pytest.approx(0.8, rel=0.01)
    quality = next(figure for figure in found.figures if figure.name == "perplexity")
    assert (quality.before, quality.after) == (pytest.approx(5.61), pytest.approx(5.7))
    assert quality.note == "computes something else"


def test_several_models_and_caches_are_compared_each_with_its_own() -> None:
    old = benchdata.result(benchdata.gpu_run(), benchdata.gpu_run(cache="q4", factor=0.8))
    new = benchdata.result(benchdata.gpu_run(cache="q4", factor=0.8, seed=3), benchdata.gpu_run(cache="q8", seed=4))
    found = compare(old, new)
    assert {(row.cache, row.mark) for row in found.rows} == {("q4", "same")}
    assert "Mistral-7B-EXL2 EXL2 4.0 bpw, cache q8: tg128" in found.missing
    assert "Mistral-7B-EXL2 EXL2 4.0 bpw, cache fp16: tg128" in found.missing


def test_what_is_different_about_the_machines_is_said() -> None:
    old, new = benchdata.result(benchdata.gpu_run()), benchdata.result(benchdata.gpu_run())
    new.environment = {**new.environment, "driver": "590.0"}
    assert compare(old, new).changed == [("driver", "580.1", "590.0")]


def test_a_perplexity_of_another_text_is_not_compared() -> None:
    old, new = (benchdata.result(benchdata.gpu_run(perplexity=5.6)) for _ in range(2))
    new.runs[0].perplexity = type(new.runs[0].perplexity)(**{**new.runs[0].perplexity.__dict__, "sha256": "1" * 64})
    assert [f.note for f in compare(old, new).figures if f.name == "perplexity"] == [
        "not comparable: another text, tokenizer or window"
    ]


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, str]:
    made = {
        "a": benchdata.result(benchdata.gpu_run(seed=1)),
        "b": benchdata.result(benchdata.gpu_run(seed=2)),
        "q4": benchdata.result(benchdata.gpu_run(cache="q4", factor=0.8, seed=3)),
    }
    for name, result in made.items():
        (tmp_path / f"{name}.json").write_text(outputs.render(result, "json"))
    return {name: str(tmp_path / f"{name}.json") for name in made}


def bench(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


def test_comparing_two_files(saved: dict[str, str]) -> None:
    result = bench("--compare", saved["a"], saved["b"])
    assert (result.exit_code, result.stdout.count("no difference")) == (0, 8), result.output
    result = bench("--compare", saved["a"], saved["q4"])
    assert result.exit_code == 0
    assert "cache fp16 → q4" in result.stdout
    assert "6 slower of 7 tests" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 160


def test_failing_under_a_bound_has_an_exit_code_of_its_own(saved: dict[str, str]) -> None:
    result = bench("--compare", saved["a"], saved["q4"], "--fail-under", "0.95")
    assert result.exit_code == ExitCode.BENCH_SLOWER == 11
    assert "tg128 is at 0.8" in result.stderr
    assert bench("--compare", saved["a"], saved["q4"], "--fail-under", "0.7").exit_code == 0
    assert bench("--compare", saved["a"], saved["b"], "--fail-under", "0.95").exit_code == 0


def test_one_repetition_cannot_hide_behind_chance(saved: dict[str, str], tmp_path: Path) -> None:
    for name in ("a", "q4"):
        value = json.loads(Path(saved[name]).read_text())
        for entry in value["tests"]:
            for field in [field for field in entry if field.startswith("samples_")]:
                entry[field] = entry[field][:1]
        Path(saved[name]).write_text(json.dumps(value))
    result = bench("--compare", saved["a"], saved["q4"], "--fail-under", "0.95")
    assert result.exit_code == 11
    assert "too few repetitions to tell" in result.stdout


def test_what_cannot_be_compared(saved: dict[str, str], tmp_path: Path) -> None:
    for args, word in (
        (("--fail-under", "0.9"), "--compare"),
        (("--compare", str(tmp_path / "no.json")), "cannot read"),
        (("--compare", saved["a"], saved["b"], saved["q4"]), "stands alone"),
    ):
        result = bench(*args)
        assert result.exit_code == ExitCode.USAGE, result.output
        assert word in result.stderr


def test_beside_another_format_the_comparison_is_on_stderr(saved: dict[str, str]) -> None:
    result = bench("--compare", saved["a"], saved["q4"], "-o", "json")
    assert json.loads(result.stdout)["schema"] == 1
    assert "SLOWER" in result.stderr


def test_a_difference_at_the_processors_pace_is_said_to_be_doubtful() -> None:
    before, after = (benchdata.result(benchdata.gpu_run(factor=factor)) for factor in (1.0, 0.8))
    found = compare(before, after)
    # The GPU computes 3.5 ms of a step: at 180 tokens/s and slower it is idle for more than a quarter of it.
    assert "tg128 @ d16384" in found.doubtful
    assert "pp512" not in found.doubtful
    assert compare(before, before).doubtful == []
