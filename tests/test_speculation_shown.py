"""Options of speculation: where they are refused, and where their figures appear."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from benchfakes import PacedEngine, PacedLoader
from fakes import ScriptedEngine, ScriptedLoader
from helpers import Recorder, collect, request_for
from typer.testing import CliRunner, Result

import exl_cli
from exl_cli import loader
from exl_cli.api import records
from exl_cli.api.engine_thread import EngineThread
from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.base import Engine
from exl_cli.engines.response import Step
from exl_cli.errors import ExitCode, ModelNotFoundError, OutOfMemoryError, UsageError
from exl_cli.models import memory, placement
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

NOTE = "--draft made this 5% slower: 4 of 9 draft tokens were accepted"


class GuessingEngine(ScriptedEngine):
    """Says its text three tokens at a time, and that it proposed four each time."""

    def _steps(self, *args: Any) -> Generator[Step, None, None]:
        tokens = [token for step in super()._steps(*args) for token in step.token_ids]
        yield Step(prompt_seconds=0.5)
        for at in range(0, len(tokens), 3):
            taken = tuple(tokens[at : at + 3])
            yield Step(taken, None, 0, 4, len(taken) - 1, "" if at else NOTE)
        yield Step(note=NOTE)


class GuessingLoader(ScriptedLoader):
    """Loads `GuessingEngine`s."""

    def __call__(self, info: Any, tokenizer: Tokenizer, options: LoadOptions, *rest: Any, **more: Any) -> Engine:
        self.options = options
        self.engines.append(GuessingEngine(tokenizer, "Once there was a fox.", 4096))
        return self.engines[-1]


class GuessingPacedEngine(PacedEngine):
    """Two tokens a pass, the second of them guessed."""

    def _steps(self, *args: Any) -> Generator[Step, None, None]:
        yield Step(prompt_seconds=self.prompt_seconds)
        while True:
            self._compute(1)
            yield Step((7, 7), drafted_tokens=3, accepted_tokens=1)


def run(load: Any, *args: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [*args], input=stdin, obj=State(load=load))


def test_the_flags_reach_the_loader(gptq_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXL_DATA_DIR", str(tmp_path))
    load = GuessingLoader("")
    run(load, "run", "-p", "x", "--speculate", "ngram")
    assert load.options is not None
    assert (load.options.speculate, load.options.draft) == ("ngram", None)
    run(load, "run", "-p", "x", "--draft", str(gptq_dir))
    assert (load.options.speculate, load.options.draft) == ("off", str(gptq_dir.resolve()))
    run(load, "chat", "--draft", "fable-7m", stdin="")
    assert Path(load.options.draft).name == "fable-7m"
    paced = PacedLoader()
    result = run(paced, "bench", "-p", "20", "-n", "4", "-r", "1", "--draft", str(gptq_dir))
    assert result.exit_code == 0, result.stderr
    assert paced.options[0].draft == str(gptq_dir.resolve())


@pytest.mark.parametrize("command", [("run", "-p", "x"), ("chat",), ("bench",)])
def test_a_missing_draft_model_is_reported_before_loading(command: tuple[str, ...]) -> None:
    load = GuessingLoader("")
    result = run(load, *command, "--draft", "owner/nothing")
    assert (result.exit_code, load.engines) == (ExitCode.MODEL_NOT_FOUND, [])
    assert "owner/nothing is not in" in result.stderr
    with pytest.raises(ModelNotFoundError, match="owner/nothing"):
        exl_cli.load("fable-7m", draft="owner/nothing")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="draft cannot be combined with speculate"):
        LoadOptions(speculate="ngram", draft="x")
    with pytest.raises(UsageError, match="no kind of speculation named 'beam'"):
        LoadOptions(speculate="beam")  # type: ignore[arg-type]
    for given, name in (({"speculate": "ngram"}, "speculate"), ({"draft": "x"}, "draft")):
        with pytest.raises(UsageError, match=f"^{name} needs the exllamav2 engine.*engine cpu.*drop {name}"):
            LoadOptions(engine="cpu", **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^speculate needs the exllamav2 engine"):
        exl_cli.load("fable-7m", engine="cpu", speculate="ngram")
    result = run(GuessingLoader(""), "run", "-p", "x", "--engine", "cpu", "--speculate", "ngram")
    assert result.exit_code == ExitCode.USAGE


def test_the_cpu_engine_is_not_taken_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    info = loader.resolve(None)
    with pytest.raises(UsageError, match="the CPU engine does not support speculation"):
        loader.load(info, Tokenizer(info.path), LoadOptions(speculate="ngram"), Recorder())


def test_vocabularies_are_compared_token_by_token(exl2_dir: Path, tmp_path: Path) -> None:
    one = Tokenizer(exl2_dir)
    assert one.difference(Tokenizer(exl2_dir)) == ""

    def changed(name: str, change: Any) -> Tokenizer:
        shutil.copytree(exl2_dir, tmp_path / name)
        file = tmp_path / name / "tokenizer.json"
        value = json.loads(file.read_text("utf-8"))
        change(value)
        file.write_text(json.dumps(value), "utf-8")
        return Tokenizer(file.parent)

    def swap(value: Any) -> None:
        vocabulary = value["model"]["vocab"]
        first, second = (next(t for t, i in vocabulary.items() if i == wanted) for wanted in (1000, 2000))
        vocabulary[first], vocabulary[second] = 2000, 1000

    swapped = one.difference(changed("swapped", swap))
    assert swapped.startswith("token 1000 is ")
    assert swapped.endswith("2 tokens differ in all")


def test_a_draft_model_needs_memory_as_well(exl2_dir: Path, gptq_dir: Path) -> None:
    info, draft = loader.resolve(str(exl2_dir)), loader.resolve(str(gptq_dir))
    taken = placement.beside(draft, 1024)
    needed, own = memory.estimate(info, 1024), memory.estimate(draft, 1024)
    assert needed is not None
    assert own is not None
    assert own.weights + own.cache < taken < own.allocated
    (share,) = placement.place(info, 1024, "fp16", [needed.allocated + taken], draft=draft) or ()
    assert share.allocated == needed.allocated
    with pytest.raises(OutOfMemoryError, match="of which the draft model takes"):
        placement.place(info, 1024, "fp16", [needed.allocated + taken - 1], draft=draft)
    # Beyond its own context it holds nothing.
    assert placement.beside(draft, 99_999) == placement.beside(draft, draft.context_length)


def test_the_summary_adds_the_passes_up(exl2_dir: Path) -> None:
    engine = EngineThread(GuessingEngine(Tokenizer(exl2_dir), "Once there was a fox.", 4096))
    summary = collect(engine.stream(request_for([1, 2], "greedy", 100)))[2]
    passes = -(-summary.new_tokens // 3)
    assert (summary.drafted_tokens, summary.accepted_tokens) == (4 * passes, summary.new_tokens - passes)
    other = EngineThread(ScriptedEngine(Tokenizer(exl2_dir), "Once", 4096))
    plain = collect(other.stream(request_for([1, 2], "greedy", 100)))[2]
    assert (plain.drafted_tokens, plain.accepted_tokens, plain.note) == (0, 0, "")
    assert not {"drafted_tokens", "accepted_tokens", "note"} & records.summarized(plain).keys()


def test_run_shows_how_it_did() -> None:
    result = run(GuessingLoader(""), "run", "-p", "x", "-n", "3")
    assert re.search(r"^2 of 4 draft tokens accepted \(50%\)$", result.stderr, re.M)
    assert f"note: {NOTE}\n" in result.stderr
    value = json.loads(run(GuessingLoader(""), "run", "-p", "x", "-n", "3", "--json").stdout)
    assert (value["drafted_tokens"], value["accepted_tokens"], value["note"]) == (4, 2, NOTE)
    plain = run(ScriptedLoader("Once"), "run", "-p", "x")
    assert "proposed" not in plain.stderr
    assert "drafted_tokens" not in run(ScriptedLoader("Once"), "run", "-p", "x", "--json").stdout


def test_chat_shows_how_it_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXL_DATA_DIR", str(tmp_path))
    result = run(GuessingLoader(""), "chat", "-n", "3", stdin="Hello\nAnd?\n/stats\n")
    assert len(re.findall(r"tokens/s · 2 of 4 draft tokens accepted \(50%\) · context", result.stderr)) == 2
    assert result.stderr.count(f"note: {NOTE}\n") == 2
    assert re.search(r"^speculation +4 of 8 draft tokens accepted \(50%\)", result.stderr, re.M)
    (file,) = (tmp_path / "sessions").glob("*.json")
    saved = json.loads(file.read_text("utf-8"))
    assert (saved["totals"]["drafted_tokens"], saved["totals"]["accepted_tokens"]) == (8, 4)
    assert saved["turns"][1]["timings"]["drafted_tokens"] == 4
    quiet = run(ScriptedLoader("Once"), "chat", stdin="Hello\n/stats\n")
    assert "proposed" not in quiet.stderr


def test_bench_shows_how_it_did() -> None:
    load = PacedLoader(GuessingPacedEngine)
    result = run(load, "bench", "-p", "0", "-n", "4", "-r", "2")
    assert re.search(r"first token +accepted *$", result.stdout, re.M)
    assert re.search(r"^ *tg4 .* 33% *$", result.stdout, re.M)
    # A pass gives several tokens, so the time to read the weights once is not that of a token.
    assert re.search(r"^ *tg4 +\S+ ± \S+ +- ", result.stdout, re.M)
    value = json.loads(run(load, "bench", "-p", "0", "-n", "4", "-r", "2", "-o", "json").stdout)
    assert value["tests"][0]["samples_drafted_tokens"] == [9, 9]
    assert value["tests"][0]["samples_accepted_tokens"] == [3, 3]
    assert "accepted" not in run(PacedLoader(), "bench", "-p", "0", "-n", "4", "-r", "2").stdout
