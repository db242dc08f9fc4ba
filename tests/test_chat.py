"""`exl chat` through a pipe: whole transcripts with a scripted engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from chatting import Script, chat, isolate, prompts, saved, turns

from exl_cli.models.tokenizer import Tokenizer

LOADING = "Loading model: fable-7m (EXL2 5.0 bpw)\n"


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolate(tmp_path, monkeypatch)


def test_the_whole_transcript(exl2_dir: Path, data: Path) -> None:
    script = Script(["Hello, friend.", "Four."])
    result = chat(script, "Hi\n\nWhat is 2+2?\n")
    assert result.exit_code == 0
    assert result.stdout == "Hello, friend.\nFour.\n"
    tokenizer = Tokenizer(exl2_dir)
    first = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    second = first + "Hello, friend.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts(script, exl2_dir) == [first, second]
    sizes = [len(tokenizer.encode(text, add_special_tokens=False)) for text in (first, second)]
    answers = [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in script.answers]
    # All but the token that ends an answer has been computed by then.
    reused = sizes[0] + answers[0] - 1
    expected = (
        rf"{re.escape(LOADING)}"
        rf"prompt {sizes[0]} tokens \(0 reused\) · {answers[0]} new, [\d.]+ tokens/s · "
        rf"context {sizes[0] + answers[0]}/1,024\n"
        rf"prompt {sizes[1]} tokens \({reused} reused\) · {answers[1]} new, [\d.]+ tokens/s · "
        rf"context {sizes[1] + answers[1]}/1,024\n"
        r"saved; resume with exl chat --session \d{4}-\d\d-\d\d-hi\n"
    )
    assert re.fullmatch(expected, result.stderr), result.stderr
    assert script.engines[0].closed


def test_the_session_is_readable_json_with_model_settings_and_timings(data: Path) -> None:
    chat(Script(["Hello.", "日本🎉"]), "Hi\nBye\n", "--temperature", "0.5", "--seed", "3", "--system", "Be brief.")
    (file,) = (data / "sessions").glob("*.json")
    value = saved(data)
    assert '"content": "日本🎉"' in file.read_text("utf-8")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (value["format"], value["version"], value["model"]) == ("exl-session", 1, "fable-7m")
    assert value["system"] == "Be brief."
    assert value["settings"]["given"] == {"temperature": 0.5}
    assert value["settings"]["sampling"]["temperature"] == 0.5
    assert turns(data) == [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "日本🎉")]
    timings = value["turns"][3]["timings"]
    assert timings["reused_tokens"] > 0
    assert value["totals"]["prompt_tokens"] == value["turns"][1]["timings"]["prompt_tokens"] + timings["prompt_tokens"]
    assert list((data / "sessions").iterdir()) == [file]


def test_flags_reach_the_engine(exl2_dir: Path) -> None:
    script = Script(["a", "b"])
    args = ("--preset", "creative", "--top-k", "7", "-n", "9", "--seed", "4", "--stop", "Z", "--max-seq-len", "512")
    chat(script, "x\ny\n", *args)
    first, second = script.requests
    assert (first.sampling.top_k, first.sampling.min_p, first.max_new_tokens) == (7, 0.05, 9)
    assert (first.stop_strings, first.stop_ids) == (("Z",), frozenset({2}))
    # Each answer has a seed of its own, or asking twice would give one answer twice.
    assert (first.seed, second.seed) == (4, 5)
    assert script.engines[0].context_length == 512


def test_lines_and_blocks_of_a_pipe(exl2_dir: Path) -> None:
    """With Windows' line ends and byte order mark, bytes that are no text, and what only looks like a command."""
    script = Script(["ok"])
    lines = b'\xef\xbb\xbfHi\r\n"""\r\nfirst\r\n\r\n  second\r\n"""\n\xff\xfe\r\n/usr/bin/env is what?\n /help me\n'
    result = chat(script, lines + b'// comment\n"""one line"""\n"""open to the\nend')
    texts = [text.split("user\n")[-1].split("<|im_end|>")[0] for text in prompts(script, exl2_dir)]
    assert texts[:2] == ["Hi", "first\n\n  second"]
    assert texts[2:] == ["/usr/bin/env is what?", " /help me", "// comment", "one line", "open to the\nend"]
    assert "a line on standard input is not UTF-8 text: byte 0 is 0xff" in result.stderr


def test_quiet_shows_answers_and_what_is_asked_for() -> None:
    result = chat(Script(["ok"]), "Hi\n/set top_k\n", "--quiet")
    assert result.stdout == "ok\n"
    assert result.stderr.split() == ["top_k", "50"]


# --- saving --------------------------------------------------------------------------------------------------------


def test_no_save_writes_nothing(data: Path, tmp_path: Path) -> None:
    result = chat(Script(["ok"]), "Hi\n/save\n", "--no-save")
    assert "error: saving is off (--no-save)" in result.stderr
    assert "saved; resume" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert chat(Script(["ok"]), "Hi\n/save kept\n", "--no-save").exit_code == 0
    assert [file.name for file in (data / "sessions").iterdir()] == ["kept.json"]


def test_a_named_session_is_begun_and_gone_on_with(exl2_dir: Path, data: Path) -> None:
    script = Script(["a", "b"])
    chat(script, "one\n", "--session", "trip", "--temperature", "0.4", "--system", "S", "--on-overflow", "stop")
    result = chat(script, "two\n", "--session", "trip", "--top-k", "9")
    assert "resuming trip, 2 turns: “a”" in result.stderr
    assert result.stderr.endswith("saved; resume with exl chat --session trip\n")
    assert "system\nS<|im_end|>\n<|im_start|>user\none" in prompts(script, exl2_dir)[1]
    sampling = script.requests[1].sampling
    assert (sampling.temperature, sampling.top_k) == (0.4, 9)
    assert saved(data)["settings"]["on_overflow"] == "stop"
    assert len(turns(data)) == 4


def test_continue_goes_on_with_the_last_session_and_its_model(gptq_dir: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq_dir, tmp_path / "models" / "other")
    script = Script(["a", "b"])
    result = chat(script, "", "--continue")
    assert (result.exit_code, script.engines) == (2, [])
    assert "error: no saved sessions in " in result.stderr
    chat(script, "one\n", "other", "--session", "first")
    chat(script, "two\n", "--session", "second")
    os.utime(data / "sessions" / "first.json")
    assert "Loading model: other" in chat(script, "", "--continue").stderr
    assert "Loading model: fable-7m" in chat(script, "", "fable-7m", "--continue").stderr
    assert chat(script, "", "--continue", "--session", "x").exit_code == 2


def test_a_session_whose_model_is_gone_says_how_to_go_on(gptq_dir: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq_dir, tmp_path / "models" / "other")
    chat(Script(["a"]), "one\n", "other", "--session", "trip")
    shutil.rmtree(tmp_path / "models")
    result = chat(Script(["b"]), "two\n", "--continue")
    assert result.exit_code == 3
    assert "(used by session trip); to use another model, run exl chat MODEL --session trip" in result.stderr
    assert chat(Script(["b"]), "two\n", "fable-7m", "--session", "trip").stdout == "b\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged: invalid JSON"),
        (
            b'{"format": "exl-session", "version": 2}',
            "was written by a newer exl: its format is 2, but this version reads up to 1",
        ),
        (b"\xff", "cannot read the session file"),
        (b"[]", "is not an exl session"),
    ],
)
def test_a_damaged_or_newer_file_is_an_error_and_left_alone(data: Path, content: bytes, message: str) -> None:
    (data / "sessions").mkdir(parents=True)
    file = data / "sessions" / "trip.json"
    file.write_bytes(content)
    for args in (("--continue",), ("--session", "trip")):
        result = chat(Script(["ok"]), "Hi\n", *args)
        assert result.exit_code == 10
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    result = chat(Script(["ok"]), "/load trip\nHi\n/sessions\n")
    assert message in result.stderr
    assert (result.exit_code, result.stdout) == (10, "ok\n")
    assert file.read_bytes() == content


def test_a_session_that_cannot_be_saved_fails_the_run(data: Path, tmp_path: Path) -> None:
    data.mkdir()
    (data / "sessions").write_text("a file in the folder's place")
    result = chat(Script(["ok"]), "Hi\n/clear\n/export out.json\n")
    assert result.exit_code == 10
    assert result.stdout == "ok\n"
    assert f"error: cannot save the session in {data}/sessions: " in result.stderr
    # Nothing is thrown away that is not safe.
    assert json.loads((tmp_path / "out.json").read_text())["turns"][0]["content"] == "Hi"


@pytest.mark.parametrize("args", [(), ("--session", "trip")])
def test_a_session_that_cannot_be_saved_is_an_error_once(
    args: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with a folder that may not be searched, even asking whether the file is there fails.
    data = tmp_path / ("x" * 300)
    monkeypatch.setenv("EXL_DATA_DIR", str(data))
    result = chat(Script(["ok", "ok"]), "Hi\nHo\n", *args)
    assert result.exit_code == 10
    assert result.stdout == "ok\nok\n"
    assert result.stderr.count("error: ") == 1
    assert (
        f"error: cannot save the session in {data}/sessions: File name too long; free some space, set EXL_DATA_DIR to "
        "another folder, or start with --no-save; /export PATH writes this conversation elsewhere\n"
    ) in result.stderr
    assert result.stderr.endswith("\nnot saved\n")


def test_concurrent_chats_do_not_overwrite_each_other(data: Path) -> None:
    script = Script(["a", "b"])

    def meddle(request: object) -> None:
        if len(script.requests) == 2:
            file = data / "sessions" / "trip.json"
            file.write_text(file.read_text().replace('"one"', '"uno"'))

    script.before = meddle
    result = chat(script, "one\ntwo\n", "--session", "trip")
    assert re.search(
        r"trip was changed by another exl process; this conversation continues as trip-\d+\n", result.stderr
    )
    files = sorted((data / "sessions").glob("*.json"))
    assert ["uno" in file.read_text() for file in files] == [False, True]


# --- the context ---------------------------------------------------------------------------------------------------


def test_the_oldest_turns_are_dropped_with_a_note(exl2_dir: Path, data: Path) -> None:
    script = Script(["Yes, " * 40])
    lines = [f"question number {i}" for i in range(6)]
    result = chat(script, "\n".join([*lines, "/stats"]) + "\n", "--max-seq-len", "300", "--system", "Be kind.")
    last = prompts(script, exl2_dir)[-1]
    assert last.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nquestion number ")
    notes = re.findall(
        r"nearly full: dropped (.*?) \(“(.*?)”.*\), (\d+) tokens, from the prompt; the session keeps them",
        result.stderr,
    )
    assert notes[0][:2] == ("the oldest exchange", "question number 0")
    assert all(len(request.ids) <= 300 - 75 for request in script.requests)
    assert [text for _, text in turns(data)][::2] == lines
    shown = len(re.findall("question number", last)) * 2
    assert re.search(rf"turns +12, {shown} of them in the context", result.stderr)


def test_on_overflow_stop_refuses_and_drops_nothing(data: Path) -> None:
    script = Script(["Yes, " * 40])
    lines = ["one", "two", "three", "four", "five"]
    result = chat(script, "\n".join(lines) + "\n", "--max-seq-len", "300", "--on-overflow", "stop")
    assert re.search(
        r"error: with this message, the conversation has \d+ tokens, but the context holds 300", result.stderr
    )
    assert "dropped" not in result.stderr
    assert len(turns(data)) < 10
    assert "context full" in result.stderr


def test_a_message_that_is_too_large_is_refused_with_both_numbers(exl2_dir: Path, data: Path) -> None:
    script = Script(["ok"])
    result = chat(script, "Hi\n" + "word " * 2000 + "\nHo\n")
    match = re.search(
        r"error: the message makes a prompt of ([\d,]+) tokens, but the context holds 1,024", result.stderr
    )
    assert match
    assert "including the response; shorten it\n" in result.stderr
    text = f"<|im_start|>user\n{('word ' * 2000).rstrip()}<|im_end|>\n<|im_start|>assistant\n"
    assert int(match[1].replace(",", "")) == len(Tokenizer(exl2_dir).encode(text, add_special_tokens=False))
    assert result.stdout == "ok\nok\n"
    assert [text for _, text in turns(data)] == ["Hi", "ok", "Ho", "ok"]


# --- models --------------------------------------------------------------------------------------------------------


def test_a_base_model_gets_plain_turns(exl2_dir: Path, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(exl2_dir, model)
    (model / "chat_template.jinja").unlink()
    script = Script([" Hello.\nUser: I go on", " Bye."])
    result = chat(script, "Hi\nHo\n/show template\n", str(model), "--system", "A talk.")
    assert prompts(script, model)[1] == "A talk.\n\nUser: Hi\nAssistant: Hello.\nUser: Ho\nAssistant:"
    assert script.requests[0].stop_strings == ("\nUser:", "\nAssistant:")
    assert result.stdout == "Hello.\nBye.\n"
    assert "User: {message}\nAssistant: {answer}\n" in result.stderr
    assert "the model has no chat template; messages are sent as User: and Assistant: lines\n" in result.stderr
    reused = int(re.findall(r"\((\d+) reused\)", result.stderr)[1])
    assert reused >= len(script.requests[0].ids)


def test_reasoning_is_shown_apart_kept_and_left_out_of_the_next_prompt(exl2_dir: Path, data: Path) -> None:
    script = Script(["<think>\nLet me see.\n</think>\n\nFour.", "Six."])
    result = chat(script, "2+2?\n3+3?\n")
    assert result.stdout == "Let me see.\n\nFour.\nSix.\n"
    assert prompts(script, exl2_dir)[1].count("Let me see") == 0
    turn = saved(data)["turns"][1]
    assert (turn["content"], turn["reasoning"]) == ("Four.", "\nLet me see.\n")
    hidden = chat(Script(script.answers), "2+2?\n/set thinking on\n/retry\n", "--hide-thinking", "--no-save")
    assert hidden.stdout == "Four.\nSix.\n"
    assert "thinking…\n" in hidden.stderr


@pytest.mark.parametrize("together", [1, 3, 40])
def test_tags_of_reasoning_that_are_special_tokens_keep_their_place(exl2_dir: Path, data: Path, together: int) -> None:
    model = data.parent / "magistral"
    shutil.copytree(exl2_dir, model)
    value = json.loads((model / "tokenizer.json").read_text())
    kind = {**value["added_tokens"][0], "normalized": False}
    value["added_tokens"] += [{**kind, "id": 4096 + i, "content": tag} for i, tag in enumerate(("[THINK]", "[/THINK]"))]
    (model / "tokenizer.json").write_text(json.dumps(value))
    script = Script(["[THINK]Let me see.[/THINK]Four.", "Six."], together=together)
    result = chat(script, "2+2?\n3+3?\n", str(model))
    assert result.stdout.replace("\n\n", "\n") == "Let me see.\nFour.\nSix.\n"
    turn = saved(data)["turns"][1]
    assert (turn["content"], turn["reasoning"]) == ("Four.", "Let me see.")
    # A stop string that is such a tag ends the answer there.
    assert chat(script, "2+2?\n", str(model), "--stop", "[/THINK]", "--no-save").stdout == "Let me see.\n"


def test_a_template_that_refuses_system_messages_is_reported_before_loading(exl2_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "strict"
    shutil.copytree(exl2_dir, model)
    template = (model / "chat_template.jinja").read_text()
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (model / "chat_template.jinja").write_text(check + template)
    script = Script(["ok"])
    result = chat(script, "Hi\n", str(model), "--system", "S")
    assert (result.exit_code, script.engines) == (6, [])
    assert "rejects this conversation: no system role" in result.stderr
    result = chat(script, "/system S\nHi\n", str(model))
    assert "rejects this conversation: no system role" in result.stderr
    assert result.stdout == "ok\n"
