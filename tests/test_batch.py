from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine, ScriptedLoader
from helpers import until
from typer.testing import CliRunner, Result

from exl_cli.batch.passes import prepare
from exl_cli.batch.prompts import Settings
from exl_cli.batch.rows import Row
from exl_cli.batch.windows import Windows
from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.base import Engine, Event, Request, TokenLogprobs
from exl_cli.engines.response import Step
from exl_cli.errors import EngineError, ExitCode, OutOfMemoryError, PromptError, brief
from exl_cli.loader import resolve
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

FINISHED_WITH_FAILURES = 14


@pytest.fixture
def scripted() -> ScriptedLoader:
    return ScriptedLoader(" a small cat")


def batch(loader: ScriptedLoader, *args: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["batch", *map(str, args)], input=stdin, obj=State(load=loader))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def answers(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def seeds(loader: ScriptedLoader) -> list[int]:
    return sorted(request.seed for engine in loader.engines for request in engine.requests)


def test_openai_batch_lines_are_answered_in_openais_shape(scripted: ScriptedLoader, tmp_path: Path) -> None:
    """https://platform.openai.com/docs/api-reference/batch: the request input and output objects."""
    messages = [{"role": "user", "content": "Tell me"}]
    chat = {"model": "gpt-4o-mini", "messages": messages, "max_tokens": 2}
    prompts = jsonl(
        tmp_path / "in.jsonl",
        {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "request-2", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Tell", "n": 2}},
    )
    result = batch(scripted, prompts, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.stderr
    written = answers(tmp_path / "out.jsonl")
    assert set(written) == {"request-1", "request-2"}
    first = written["request-1"]
    assert first["error"] is None
    assert first["id"]
    assert first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": " a small", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "length"
    choices = written["request-2"]["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == [" a small cat"] * 2


def test_plain_objects_take_any_setting_and_lines_of_text_are_prompts(
    scripted: ScriptedLoader, tmp_path: Path, exl2_dir: Path
) -> None:
    rows = [{"prompt": "Hi", "top_k": 3, "rep_pen": 1.5}, {"messages": [{"role": "user", "content": "Hi"}]}]
    assert batch(scripted, jsonl(tmp_path / "a.jsonl", *rows), "-o", tmp_path / "a.out", "-n", 7).exit_code == 0
    first, second = scripted.engines[0].requests
    assert first.ids == second.ids
    chosen = next(request for request in (first, second) if request.sampling.top_k == 3)
    other = second if chosen is first else first
    assert chosen.sampling.token_repetition_penalty == 1.5
    assert other.sampling.top_k == 50, "the value of exl run"
    assert chosen.max_new_tokens == other.max_new_tokens == 7

    (tmp_path / "b.txt").write_text("Hi\n\n{not JSON}\n")
    assert batch(scripted, tmp_path / "b.txt", "-o", tmp_path / "b.out").exit_code == 0
    assert set(answers(tmp_path / "b.out")) == {"line-1", "line-3"}
    assert scripted.engines[1].requests[0].ids == first.ids


def test_gzip_standard_input_and_output(scripted: ScriptedLoader, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "Hi"}\n' * 3))
    packed = batch(scripted, tmp_path / "in.jsonl.gz", "-o", "-", "--flat")
    piped = batch(scripted, "-", "-o", "-", "--flat", stdin='{"prompt": "Hi"}\n' * 3)
    assert packed.exit_code == piped.exit_code == 0
    assert sorted(packed.stdout.splitlines()) == sorted(piped.stdout.splitlines())
    lines = [json.loads(line) for line in packed.stdout.splitlines()]
    assert [line["text"] for line in lines] == [" a small cat"] * 3
    assert all(line["finish_reason"] == "stop" for line in lines)


CSV = 'question,custom_id,temperature\r\n"What is\r\n""red""?",a,9\r\nHow?,,9\r\nonly one\r\n'


def test_a_table_makes_prompts_of_its_columns(scripted: ScriptedLoader, tmp_path: Path) -> None:
    """RFC 4180: quoted fields may hold line breaks and doubled quotes; lines end with CRLF."""
    (tmp_path / "in.csv").write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": 'Q: What is\r\n"red"?'}) + '\n{"prompt": "Q: How?"}\n')
    args = ("-o", tmp_path / "csv.jsonl", "--template", "Q: {question}")
    assert batch(scripted, tmp_path / "in.csv", *args).exit_code == FINISHED_WITH_FAILURES
    written = answers(tmp_path / "csv.jsonl")
    assert {id_: line["error"] is None for id_, line in written.items()} == {"a": True, "line-4": True, "line-5": False}
    assert "it has 1 fields, but the first line names 3" in written["line-5"]["error"]["message"]
    assert batch(scripted, tmp_path / "in.jsonl", "-o", tmp_path / "jsonl.jsonl").exit_code == 0
    of_table, of_lines = (sorted(request.ids for request in engine.requests) for engine in scripted.engines)
    assert of_table == of_lines
    assert all(request.sampling.temperature != 9 for request in scripted.engines[0].requests)


def test_a_table_in_another_encoding_is_refused(scripted: ScriptedLoader, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes("prénom,prompt\nA,b\n".encode("latin-1"))
    refused = batch(scripted, tmp_path / "in.csv", "-o", tmp_path / "out.jsonl")
    assert refused.exit_code == ExitCode.USAGE
    assert "is not UTF-8 text; convert it with iconv -t UTF-8" in refused.stderr


def test_a_table_without_the_column_is_refused(scripted: ScriptedLoader, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(CSV)
    for args, said in ((), "no column 'prompt'"), (("--template", "{answer}"), "no column 'answer'"):
        refused = batch(scripted, tmp_path / "in.csv", "-o", tmp_path / "out.jsonl", *args)
        assert refused.exit_code == 2
        assert said in refused.stderr
        assert "'question'" in refused.stderr
        assert not (tmp_path / "out.jsonl").exists()


def test_a_template_takes_the_fields_of_json_lines(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", {"a": "x", "n": [1, 2]}, {"prompt": "x [1, 2]"}, {"a": "x"})
    args = ("-o", tmp_path / "out.jsonl", "--template", "{a} {n}")
    assert batch(scripted, prompts, *args).exit_code == FINISHED_WITH_FAILURES
    written = answers(tmp_path / "out.jsonl")
    assert [written[f"line-{i}"]["error"] is None for i in (1, 2, 3)] == [True, False, False]
    assert batch(scripted, prompts, "-o", tmp_path / "plain.jsonl").exit_code == FINISHED_WITH_FAILURES
    first, second = (engine.requests for engine in scripted.engines)
    assert [request.ids for request in first] == [request.ids for request in second]


def test_parquet(scripted: ScriptedLoader, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["One", "Two"], "custom_id": [7, 8]})
    parquet.write_table(table, tmp_path / "in.parquet")
    assert batch(scripted, tmp_path / "in.parquet", "-o", tmp_path / "out.jsonl").exit_code == 0
    assert set(answers(tmp_path / "out.jsonl")) == {"7", "8"}
    (tmp_path / "bad.parquet").write_bytes(b"no Parquet")
    assert batch(scripted, tmp_path / "bad.parquet", "-o", tmp_path / "bad.jsonl").exit_code == 10


def test_a_truncated_input_is_answered_up_to_its_end(scripted: ScriptedLoader, tmp_path: Path) -> None:
    rows = "".join(f'{{"prompt": "{i * i}"}}\n' for i in range(200)).encode()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(rows)[:-9])
    result = batch(scripted, tmp_path / "in.jsonl.gz", "-o", tmp_path / "out.jsonl", "-n", "1")
    assert result.exit_code == 10
    assert "cannot read" in result.stderr
    assert len(answers(tmp_path / "out.jsonl")) > 100


EXPECTED: dict[str, tuple[str, list[Any], str]] = {
    # Wilson's intervals, worked out by hand: of 3 of 4, (0.75 + z²/8 ± z √(0.1875/4 + z²/64)) / (1 + z²/4), z = 1.96.
    "exact": ("exact", ["a small cat", " a small cat\n", "a small cat", "A small cat"], "3 4 75.0% 30.1% to 95.4%"),
    "regex": ("regex", ["small", "^ a", "c.t$", "dog"], "3 4 75.0% 30.1% to 95.4%"),
    "a pattern that is none": ("regex", ["small", "(", "cat", "a"], "3 3 100.0% 43.9% to 100.0%"),
    "JSON": ("json", [1, "[", {"a": 1}, None], "0 2 0.0% 0.0% to 65.8%"),
}


@pytest.mark.parametrize(("metric", "expected", "said"), EXPECTED.values(), ids=EXPECTED)
def test_answers_are_scored(
    scripted: ScriptedLoader, tmp_path: Path, metric: str, expected: list[Any], said: str
) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", *({"prompt": f"{i}", "want": want} for i, want in enumerate(expected)))
    for flat in ([], ["--flat"]):
        args = (prompts, "-o", tmp_path / f"out{len(flat)}.jsonl", "--eval", "want", "--eval-by", metric, *flat)
        for _ in range(2):
            result = batch(scripted, *args)
            assert result.exit_code == 0, result.stderr
            assert f"{metric} {said}" in " ".join(result.stdout.split())


JSON_ANSWERS: dict[str, tuple[str, Any, bool]] = {
    "in another order": ('{"b": 2, "a": [1]}', {"a": [1.0], "b": 2}, True),
    "given as text": ('{"a": 1}', '{"a": 1}', True),
    "fenced": ('```json\n{"a": 1}\n```', {"a": 1}, True),
    "true is not 1": ("true", 1, False),
    "less": ('{"a": 1}', {"a": 1, "b": 2}, False),
    "none": ("a: 1", {"a": 1}, False),
}


@pytest.mark.parametrize(("answer", "want", "is_right"), JSON_ANSWERS.values(), ids=JSON_ANSWERS)
def test_json_is_compared_by_value(tmp_path: Path, answer: str, want: Any, is_right: bool) -> None:
    metadata = {"want": json.dumps(want) if isinstance(want, dict) else want}
    body = {"prompt": "Hi", "max_tokens": 100, "metadata": metadata}
    prompts = jsonl(tmp_path / "in.jsonl", {"custom_id": "a", "url": "/v1/completions", "body": body})
    result = batch(ScriptedLoader(answer), prompts, "-o", tmp_path / "out.jsonl", "--eval", "want", "--eval-by", "json")
    assert f"json {int(is_right)} 1" in " ".join(result.stdout.split())


def test_a_score_needs_the_field(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "Hi"})
    refused = batch(scripted, prompts, "-o", tmp_path / "out.jsonl", "--eval", "want")
    assert refused.exit_code == 2
    assert "has a field 'want'" in refused.stderr
    assert batch(scripted, "-", "-o", tmp_path / "out.jsonl", "--eval", "want").exit_code == 2


@pytest.fixture
def shelf(tmp_path: Path, exl2_dir: Path) -> Path:
    """A models folder with the models a and broken."""
    shutil.copytree(exl2_dir, tmp_path / "models" / "a")
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "config.json").write_text("{")
    return tmp_path / "models"


def naming(*models: str | None) -> list[dict[str, Any]]:
    """Rows in OpenAI's form, which name these models."""
    bodies = [{"prompt": f"{i}", **({} if model is None else {"model": model})} for i, model in enumerate(models)]
    return [{"custom_id": f"{i}", "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)]


def test_a_row_goes_to_the_model_that_it_names_where_that_is_here(
    scripted: ScriptedLoader, tmp_path: Path, shelf: Path
) -> None:
    rows = naming("a", "gpt-4", None, "fable-7m", "../models/a", str(shelf / "a"), "broken", "a")
    prompts, output = jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    jsonl(tmp_path / "half.jsonl", *rows[:3])
    for name, loads in ("half.jsonl", 2), ("in.jsonl", 4), ("in.jsonl", 4):
        result = batch(scripted, tmp_path / name, "-o", output, "--models-dir", shelf)
        assert len(scripted.engines) == loads, "one after the other, and only where there is something to compute"
    assert result.exit_code == FINISHED_WITH_FAILURES
    assert "for 3 prompts whose model is not installed (gpt-4" in result.stderr
    written = answers(output)
    assert "broken" in written.pop("6")["error"]["message"]
    named = {id_: line["response"]["body"]["model"] for id_, line in written.items()}
    assert [id_ for id_, model in named.items() if model == "a"] == ["0", "7"]
    assert {model for id_, model in named.items() if id_ not in "07"} == {"fable-7m"}
    assert [engine.closed for engine in scripted.engines] == [True] * 4

    (shelf / "a" / "chat_template.jinja").write_text("{{ messages }}")
    jsonl(prompts, *naming(*"aaaaaaaaaa"))
    changed = batch(scripted, prompts, "-o", output, "--models-dir", shelf)
    assert changed.exit_code == 2
    assert "a different model named a" in changed.stderr


def test_where_one_model_has_to_answer_all_rows_the_others_have_an_error(
    scripted: ScriptedLoader, tmp_path: Path, shelf: Path
) -> None:
    rows = naming("a", "fable-7m", "gpt-4")
    prompts = jsonl(tmp_path / "in.jsonl", *rows)
    args: Sequence[Any] = ("-o", tmp_path / "piped.jsonl", "--models-dir", shelf)
    assert batch(scripted, "-", *args, stdin=prompts.read_text()).exit_code == FINISHED_WITH_FAILURES
    args = (prompts, "-o", tmp_path / "ordered.jsonl", "--models-dir", shelf, "--ordered")
    assert batch(scripted, *args).exit_code == FINISHED_WITH_FAILURES
    for name in ("piped", "ordered"):
        written = answers(tmp_path / f"{name}.jsonl")
        assert "it names a, but " in written["0"]["error"]["message"]
        assert written["1"]["error"] is written["2"]["error"] is None


BAD: dict[str, tuple[str, str]] = {
    "not valid JSON": ("{", "invalid JSON"),
    "not an object": ("[1]", "it must be a JSON object"),
    "nothing to answer": ('{"text": "Hi"}', "no prompt: the line"),
    "an empty prompt": ('{"prompt": ""}', "the prompt is empty"),
    "a number for a prompt": ('{"prompt": 5}', "prompt must be text or token ids, got 5"),
    "a setting that is not a number": ('{"prompt": "Hi", "temperature": NaN}', "temperature must be a finite number"),
    "a setting out of range": ('{"prompt": "Hi", "temperature": -1}', "temperature must be between 0 and 100"),
    "another name of a setting": ('{"prompt": "Hi", "rep_pen": 500}', " rep_pen must be between 0.01 and 100, got 500"),
    "a setting of a wrong type": ('{"prompt": "Hi", "top_k": "many"}', "top_k"),
    "another endpoint": ('{"url": "/v1/embeddings", "body": {}}', "url must be one of"),
    "a body that is none": ('{"url": "/v1/completions", "body": 3}', "body must be a JSON object"),
    "an image": ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "images are not supported"),
    "too long": (json.dumps({"prompt": "word " * 3000}), "the context holds 1,024"),
    "a lone surrogate": ('{"prompt": "\\ud800"}', "a lone surrogate"),
}


@pytest.mark.parametrize(("line", "said"), BAD.values(), ids=BAD)
def test_a_bad_line_has_an_error_with_its_number_and_the_rest_goes_on(
    scripted: ScriptedLoader, tmp_path: Path, line: str, said: str
) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "Hi"}, line, {"prompt": "Hi"})
    assert batch(scripted, prompts, "-o", tmp_path / "out.jsonl").exit_code == FINISHED_WITH_FAILURES
    written = answers(tmp_path / "out.jsonl")
    assert set(written) == {"line-1", "line-2", "line-3"}
    assert written["line-2"]["response"] is None
    assert written["line-2"]["error"]["message"].startswith("line 2: ")
    assert said in written["line-2"]["error"]["message"]
    assert written["line-3"]["error"] is None

    strict = batch(scripted, prompts, "-o", tmp_path / "strict.jsonl", "--strict")
    assert strict.exit_code == FINISHED_WITH_FAILURES
    assert "line 2: " in strict.stderr
    assert said in strict.stderr


def test_a_custom_id_that_comes_twice_is_an_error_in_every_run(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", *({"custom_id": "a", "prompt": text} for text in ("One", "Two")))
    for _ in range(2):
        assert batch(scripted, prompts, "-o", tmp_path / "out.jsonl").exit_code == FINISHED_WITH_FAILURES
        written = answers(tmp_path / "out.jsonl")
        assert written["a"]["error"] is None
        assert written["line-2"]["error"]["code"] == "duplicate_custom_id"


def test_it_goes_on_where_it_stopped_with_the_same_seeds(scripted: ScriptedLoader, tmp_path: Path) -> None:
    rows: Sequence[Any] = [{"prompt": f"Number {i}", **({"custom_id": f"c{i}"} if i % 2 else {})} for i in range(6)]
    prompts, output = jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    assert batch(scripted, prompts, "-o", output).exit_code == 0
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # as a crash of the machine may leave it

    assert batch(scripted, prompts, "-o", output).exit_code == 0
    assert output.read_bytes().splitlines(keepends=True)[:3] == lines[:3]
    assert len(answers(output)) == 6
    first, second = (sorted(request.seed for request in engine.requests) for engine in scripted.engines)
    assert len(set(first)) == 6
    assert len(second) == 3
    assert set(second) < set(first)

    done = batch(scripted, prompts, "-o", output)
    assert done.exit_code == 0
    assert "6 from earlier runs" in done.stderr
    assert len(scripted.engines) == 2, "nothing to compute, no model loaded"

    jsonl(prompts, *rows[:5], {"custom_id": "c5", "prompt": "Changed"}, {"prompt": "New"})
    assert batch(scripted, prompts, "-o", output).exit_code == 0
    assert len(scripted.engines[2].requests) == 1, "a custom_id stands for its line"


def test_what_is_no_answer_is_taken_out_and_answered_again(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts, output = jsonl(tmp_path / "in.jsonl", *({"prompt": f"{i}"} for i in range(3))), tmp_path / "out.jsonl"
    batch(scripted, prompts, "-o", output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + b"\0" * 50 + b"\n" + lines[2])
    result = batch(scripted, prompts, "-o", output)
    assert "1 damaged line" in result.stderr
    assert len(answers(output)) == 3


def test_errors_are_tried_again_when_asked_for(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = {"custom_id": "b", "prompt": "Hi", "top_p": 2}
    jsonl(prompts, {"custom_id": "a", "prompt": "Hi"}, bad)
    assert batch(scripted, prompts, "-o", output).exit_code == FINISHED_WITH_FAILURES
    jsonl(prompts, {"custom_id": "a", "prompt": "Hi"}, {**bad, "top_p": 0.5})
    assert batch(scripted, prompts, "-o", output).exit_code == FINISHED_WITH_FAILURES
    assert batch(scripted, prompts, "-o", output, "--retry-errors").exit_code == 0
    assert [line["error"] for line in answers(output).values()] == [None, None]
    assert len(output.read_text().splitlines()) == 2


def test_answers_of_other_settings_or_of_another_model_are_not_mixed_unasked(
    scripted: ScriptedLoader, tmp_path: Path, gptq_dir: Path
) -> None:
    prompts, output = jsonl(tmp_path / "in.jsonl", {"prompt": "Hi"}), tmp_path / "out.jsonl"
    assert batch(scripted, prompts, "-o", output).exit_code == 0
    for flags, said in ((("--top-k", 3), "sampling"), (("-m", gptq_dir), "model"), (("--seed", 1), "seed 0, not 1")):
        refused = batch(scripted, prompts, "-o", output, *flags)
        assert refused.exit_code == 2
        assert said in refused.stderr
        assert "--mix" in refused.stderr
    jsonl(prompts, {"prompt": "Hi"}, {"prompt": "Hi"})
    assert batch(scripted, prompts, "-o", output, "--seed", 1, "--mix").exit_code == 0
    assert len(answers(output)) == 2


@pytest.mark.parametrize("name", ["in.jsonl", "notes.txt"])
def test_a_file_that_no_batch_job_wrote_is_left_alone(scripted: ScriptedLoader, tmp_path: Path, name: str) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "Hi"})
    (tmp_path / "notes.txt").write_text("mine\n")
    before = (tmp_path / name).read_bytes()
    assert batch(scripted, prompts, "-o", tmp_path / name).exit_code == 2
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("folder", ["/proc", "x" * 300])
def test_an_output_that_cannot_be_created_is_not_another_jobs(
    scripted: ScriptedLoader, tmp_path: Path, folder: str
) -> None:
    refused = batch(scripted, jsonl(tmp_path / "in.jsonl", {"prompt": "Hi"}), "-o", f"{folder}/out.jsonl")
    assert refused.exit_code == ExitCode.DISK
    assert f"cannot write {brief(f'{folder}/out.jsonl')}: " in refused.stderr
    assert refused.stderr.endswith("; choose another --output\n")


def test_two_jobs_do_not_write_one_file(scripted: ScriptedLoader, tmp_path: Path) -> None:
    from filelock import FileLock

    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "Hi"})
    with FileLock(tmp_path / "out.jsonl.exl.lock"):
        refused = batch(scripted, prompts, "-o", tmp_path / "out.jsonl")
    assert refused.exit_code == 2
    assert "another job is writing" in refused.stderr
    assert batch(scripted, prompts, "-o", tmp_path / "out.jsonl").exit_code == 0


def test_answers_in_the_order_of_the_input(scripted: ScriptedLoader, tmp_path: Path) -> None:
    rows: Sequence[Any] = [*({"prompt": "z" * (9 - i)} for i in range(8)), "{", {"prompt": "a"}]
    output = tmp_path / "out.jsonl"
    batch(scripted, jsonl(tmp_path / "in.jsonl", *rows), "-o", output, "--ordered")
    assert [*answers(output)] == [f"line-{number}" for number in range(1, 11)]


def test_shards_share_the_rows(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", *({"custom_id": f"c{i}", "prompt": f"{i}"} for i in range(40)))
    for shard in range(3):
        assert batch(scripted, prompts, "-o", tmp_path / "out.jsonl", "--shard", f"{shard}/3").exit_code == 0
    parts = [answers(tmp_path / f"out.{shard}-of-3.jsonl") for shard in range(3)]
    assert all(parts)
    assert sorted(id_ for part in parts for id_ in part) == sorted(f"c{i}" for i in range(40))
    assert batch(scripted, prompts, "-o", tmp_path / "out.jsonl", "--shard", "3/3").exit_code == 2


class SmallEngine(ScriptedEngine):
    """Takes eight requests at once and has memory for three; fails at long prompts."""

    max_batch = 8
    most = 0

    def step(self) -> Iterable[Event]:
        running = [*self._responses]
        if len(running) > 3:
            self._responses.clear()
            return [(id_, OutOfMemoryError("the GPU ran out of memory")) for id_ in running]
        self.most = max(self.most, len(running))
        return super().step()

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        if len(request.ids) > 100:
            raise EngineError("the engine failed")
        return super()._steps(request, is_cancelled)


class SmallLoader(ScriptedLoader):
    def __call__(self, info: ModelInfo, tokenizer: Tokenizer, *args: object, **more: object) -> Engine:
        self.engines.append(SmallEngine(tokenizer, self._answer, info.context_length))
        return self.engines[-1]


def test_out_of_memory_reduces_the_batch(tmp_path: Path) -> None:
    loader = SmallLoader(" yes")
    prompts = jsonl(tmp_path / "in.jsonl", *({"prompt": f"{i}", "n": 1 + i % 3} for i in range(30)))
    result = batch(loader, prompts, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "out of memory: reducing concurrent sequences from " in result.stderr
    assert len(answers(tmp_path / "out.jsonl")) == 30
    assert loader.engines[0].most <= 3  # type: ignore[attr-defined]


def test_what_the_engine_fails_at_is_tried_once_more_and_then_an_error(tmp_path: Path) -> None:
    loader = SmallLoader(" yes")
    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "word " * 100, "n": 2}, {"prompt": "b"})
    assert batch(loader, prompts, "-o", tmp_path / "out.jsonl").exit_code == FINISHED_WITH_FAILURES
    written = answers(tmp_path / "out.jsonl")
    assert [written[f"line-{i}"]["error"] is None for i in (1, 2, 3)] == [True, False, True]
    assert written["line-2"]["error"]["message"] == "line 2: the engine failed"


def test_an_engine_that_only_fails_ends_the_job(tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", *({"prompt": f"{i} " * 100} for i in range(100)))
    result = batch(SmallLoader(" yes"), prompts, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 8
    assert len(answers(tmp_path / "out.jsonl")) < 16


class SlowPipe:
    """A row, then nothing more until it is closed."""

    name, before, expected = "a pipe", 0, None

    def __init__(self) -> None:
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[Row]:
        yield Row(1, "first", 1, 1, error=PromptError("the prompt is empty"))
        self.closed.wait(60)


def test_an_idle_engine_gets_what_a_slow_pipe_has_brought() -> None:
    pipe = SlowPipe()
    preparer, _ = prepare(resolve("fable-7m"), Settings(), LoadOptions(engine="cpu"))
    windows = Windows(pipe, preparer, lambda: None, patience=0)
    until(lambda: bool(window := windows.poll(is_idle=True)) and [slot.row.custom_id for slot in window] == ["first"])
    pipe.closed.set()
    until(lambda: windows.poll() is None)


class RememberingEngine(ScriptedEngine):
    """Counts the log-probabilities of earlier responses that are still in memory."""

    most_kept = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: weakref.WeakSet[TokenLogprobs] = weakref.WeakSet()

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        self.most_kept = max(self.most_kept, len(self.kept))
        logprobs = TokenLogprobs(1, -float(request.seed))
        self.kept.add(logprobs)
        yield Step((1,), prompt_seconds=0.5, logprobs=(logprobs,))


class RememberingLoader(ScriptedLoader):
    def __call__(self, info: ModelInfo, tokenizer: Tokenizer, *args: object, **more: object) -> Engine:
        self.engines.append(RememberingEngine(tokenizer, "", info.context_length))
        return self.engines[-1]


def test_what_is_written_is_not_kept_in_memory(tmp_path: Path) -> None:
    loader = RememberingLoader("")
    prompts = jsonl(tmp_path / "in.jsonl", *({"prompt": f"{i}", "logprobs": True, "max_tokens": 1} for i in range(40)))
    assert batch(loader, prompts, "-o", tmp_path / "out.jsonl").exit_code == 0
    assert len(answers(tmp_path / "out.jsonl")) == 40
    assert loader.engines[0].most_kept < 10  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("in.jsonl -o out.jsonl --gpus 0", "--gpus must be all or a positive number, got '0'"),
        ("in.jsonl -o out.jsonl --gpus all --ordered", "--gpus cannot be combined with --ordered"),
        ("- -o out.jsonl --gpus all", "--gpus needs files, and - is a pipe"),
        ("in.jsonl -o - --ray auto", "--ray needs files, and - is a pipe"),
    ],
)
def test_what_many_engines_cannot_do_is_refused(
    scripted: ScriptedLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "in.jsonl", {"prompt": "Hi"})
    refused = batch(scripted, *flags.split())
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_parts_that_a_killed_job_left_are_taken_in(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", *({"prompt": f"{i}"} for i in range(6)))
    output, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.exl.parts"
    assert batch(scripted, prompts, "-o", output).exit_code == 0
    lines = output.read_bytes().splitlines(keepends=True)
    parts.mkdir()
    output.write_bytes(lines[0] + lines[1])
    (parts / "a.jsonl").write_bytes(b"".join(lines[1:4]) + lines[4][:30])  # whose first was taken in, the last is torn
    (parts / "b.jsonl").write_bytes(lines[5])
    again = batch(scripted, prompts, "-o", output)
    assert again.exit_code == 0, again.stderr
    assert "5 from earlier runs" in again.stderr
    assert len(answers(output)) == 6
    assert not parts.exists()


def test_several_inputs_go_to_a_folder(scripted: ScriptedLoader, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Three\n")
    inputs = [jsonl(tmp_path / "a.jsonl", {"prompt": "One"}, {"prompt": "Two"}), tmp_path / "b.txt"]
    for _ in range(2):
        result = batch(scripted, *inputs, "-o", tmp_path / "out")
        assert result.exit_code == 0, result.stderr
        assert len(answers(tmp_path / "out" / "a.jsonl")) == 2
        assert len(answers(tmp_path / "out" / "b.jsonl")) == 1
    assert len(scripted.engines) == 1
    for output in (tmp_path, "-", tmp_path / "b.txt"):
        assert batch(scripted, *inputs, "-o", output).exit_code == 2
    assert inputs[1].read_text() == "Three\n"


def test_an_output_with_a_slash_at_the_end_is_a_folder(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "One"})
    assert batch(scripted, prompts, "-o", f"{tmp_path}/out/").exit_code == 0
    assert len(answers(tmp_path / "out" / "in.jsonl")) == 1


def test_an_empty_path_is_refused(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "One"})
    for input_, output in ((prompts, ""), ("", tmp_path / "out.jsonl")):
        refused = batch(scripted, input_, "-o", output)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert "a path is empty" in refused.stderr


@pytest.mark.timeout(10)
def test_an_output_that_is_a_device_or_a_pipe_is_refused(scripted: ScriptedLoader, tmp_path: Path) -> None:
    prompts, pipe = jsonl(tmp_path / "in.jsonl", {"prompt": "One"}), tmp_path / "pipe"
    os.mkfifo(pipe)
    for output in (pipe, "/dev/null"):
        refused = batch(scripted, prompts, "-o", output)
        assert refused.exit_code == 2
        assert f"error: {output} is not a regular file; choose another --output" in refused.stderr
    assert not Path("/dev/null.exl.json").exists()


@pytest.mark.parametrize(
    ("input_", "code", "said"),
    [
        ("s3://bucket/in.jsonl", 2, "s3:// is not supported"),
        ("missing.jsonl", 10, "No such file"),
        ("missing.parquet", 10, "No such file"),
        (".", 10, "is a folder"),
    ],
)
def test_an_input_that_is_not_a_file(
    scripted: ScriptedLoader, tmp_path: Path, input_: str, code: int, said: str
) -> None:
    refused = batch(scripted, input_, "-o", tmp_path / "out.jsonl")
    assert refused.exit_code == code
    assert said in refused.stderr
    assert not (tmp_path / "out.jsonl").exists()
