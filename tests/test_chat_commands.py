"""The slash commands of `exl chat`, through a pipe."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from chatting import Script, chat, isolate, prompts, saved, turns

from exl_cli.models.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolate(tmp_path, monkeypatch)


def test_help_lists_every_command() -> None:
    result = chat(Script(["ok"]), "/help\n/help copy\n")
    wanted = (
        "help system set preset show stats retry undo edit continue clear save load sessions export model file copy"
    )
    for name in [*wanted.split(), "quit"]:
        assert re.search(rf"^/{name}\b", result.stderr, re.MULTILINE), name


def test_settings_reach_the_engine() -> None:
    script = Script(["ok"])
    lines = "repetition-penalty 1.2", "mirostat on", "top_p 2", "stop \\n\\n", "max_new_tokens 12"
    chat(script, "".join(f"/set {line}\n" for line in lines) + "Hi\n")
    (request,) = script.requests
    assert (request.sampling.token_repetition_penalty, request.sampling.mirostat) == (1.2, True)
    assert (request.max_new_tokens, request.stop_strings) == (12, ("\n\n",))


def test_a_setting_out_of_range_is_named_as_in_set() -> None:
    result = chat(Script([]), "/set top_k -1\n")
    assert "error: top_k must be at least 0, got -1\n" in result.stderr


def test_settings_after_a_preset_win() -> None:
    script = Script(["ok"])
    chat(script, "/set temperature 0.5\n/preset greedy\n/set top_k 3\n/preset nope\nHi\n")
    assert (script.requests[0].sampling.temperature, script.requests[0].sampling.top_k) == (0.0, 3)


def test_system_is_set_shown_and_taken_away(exl2_dir: Path) -> None:
    script = Script(["ok"])
    result = chat(script, '/system\n/system """\nBe\nbrief.\n"""\n/system\nHi\n/system none\nHo\n')
    first, second = prompts(script, exl2_dir)
    assert first.startswith("<|im_start|>system\nBe\nbrief.<|im_end|>\n<|im_start|>user\nHi")
    assert second.startswith("<|im_start|>user\nHi")
    assert "no system message\nsystem message set\nBe\nbrief.\n" in result.stderr


def test_show_prints_model_settings_and_session() -> None:
    result = chat(Script(["Hello."]), "Hi\n/show prompt\n/show template\n/show model\n/show\n")
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n\n" in result.stderr
    assert "{% for m in messages %}" in result.stderr
    assert re.search(r"engine +scripted \(device none\)", result.stderr)
    assert (
        "sampling: {'temperature': 0.85, 'top_k': 50, 'top_p': 0.8, 'token_repetition_penalty': 1.05}" in result.stderr
    )


def test_stats_are_totals_of_the_session_with_the_memory_table() -> None:
    result = chat(Script(["one two", "three"]), "Hi\n/retry\n/stats\n")
    assert re.search(r"turns +2, 2 of them in the context *\n", result.stderr)
    assert re.search(r"responses +2, including retried", result.stderr)
    numbers = [int(n) for line in re.findall(r"^prompt (\d+) tokens \((\d+) reused", result.stderr, re.M) for n in line]
    total, reused = numbers[0] + numbers[2], numbers[1] + numbers[3]
    assert re.search(rf"prompts +{total} tokens, {reused} of them reused \({reused / total:.0%}\)", result.stderr)
    assert re.search(r"Memory: [\d,]+ MiB resident, [\d,]+ MiB peak", result.stderr)


def test_retry_answers_again_with_everything_reused(exl2_dir: Path, data: Path) -> None:
    script = Script(["First.", "Second."])
    result = chat(script, "Hi\n/retry\n", "--seed", "8")
    first, second = script.requests
    assert (first.ids, first.seed + 1) == (second.ids, second.seed)
    assert turns(data) == [("user", "Hi"), ("assistant", "Second.")]
    assert f"prompt {len(second.ids)} tokens ({len(second.ids) - 1} reused)" in result.stderr


def test_undo_takes_exchanges_back(exl2_dir: Path, data: Path) -> None:
    script = Script(["a", "b", "c"])
    chat(script, "one\ntwo\n/undo\nthree\n/undo\n/undo\n/undo\n", "--session", "trip")
    assert "two" not in prompts(script, exl2_dir)[2]
    assert turns(data) == []


def test_edit_needs_a_terminal(exl2_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITOR", "sed -i s/Hi/Hello/")
    result = chat(Script(["one", "two"]), "Hi\n/edit\n/undo\nHo\n")
    assert "error: /edit needs a terminal; enter /undo, then the new message\n" in result.stderr
    assert result.exit_code == 2
    assert turns(data) == [("user", "Ho"), ("assistant", "two")]


def test_continue_lets_a_cut_off_answer_go_on(exl2_dir: Path, data: Path) -> None:
    script = Script(["Once upon a time there was", " a fox."])
    result = chat(script, "Hi\n/set max_new_tokens 99\n/continue\n", "-n", "4")
    begun = Tokenizer(exl2_dir).decode(Tokenizer(exl2_dir).encode(script.answers[0], add_special_tokens=False)[:4])
    assert result.stdout == f"{begun}\na fox.\n"
    assert turns(data) == [("user", "Hi"), ("assistant", begun + " a fox.")]
    assert prompts(script, exl2_dir)[1].endswith("assistant\n" + begun)
    assert "cut off: /continue" in result.stderr
    assert f"prompt {len(script.requests[1].ids)} tokens ({len(script.requests[1].ids) - 1} reused)" in result.stderr


def test_save_load_and_sessions(exl2_dir: Path, data: Path) -> None:
    script = Script(["a", "b", "c"])
    lines = ["one", "/save trip", "/clear", "two", "/sessions", "/save trip", "/load trip"]
    result = chat(script, "\n".join([*lines, "more"]) + "\n", "--system", "S")
    assert prompts(script, exl2_dir)[1].startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\ntwo")
    assert sorted(file.stem for file in (data / "sessions").glob("*.json"))[-1] == "trip"
    assert len(list((data / "sessions").glob("*.json"))) == 2
    assert re.search(r"^\S+-two \* +\S+ \S+ +2 +fable-7m +two", result.stderr, re.M)
    assert re.search(r"^trip +\S+ \S+ +2 +fable-7m +one", result.stderr, re.M)
    assert "resuming trip, 2 turns: “a”" in result.stderr
    assert "user\none<|im_end|>" in prompts(script, exl2_dir)[2]


def test_export_writes_markdown_and_json_and_overwrites_only_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("precious")
    lines = ["Hi", "/export a.md", "/export b.json", "/export mine.md"]
    lines += ["/export a\0b.md"]
    result = chat(
        Script(["<think>Hm.</think>\n\nHello."]), "\n".join([*lines, "/export a.md", "/export no/x/../"]) + "\n"
    )
    text = (tmp_path / "a.md").read_text()
    assert (
        "## User\n\nHi\n\n## Assistant\n\n<details><summary>Reasoning</summary>\n\nHm.\n\n</details>\n\nHello.\n"
        in text
    )
    assert json.loads((tmp_path / "b.json").read_text())["turns"][1]["content"] == "Hello."
    assert "a file name cannot contain a null byte; choose another path" in result.stderr
    assert (tmp_path / "mine.md").read_text() == "precious"


def test_file_puts_a_file_into_the_message(exl2_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes of mine.txt").write_text("```\ncode\n```\n")
    (tmp_path / "binary").write_bytes(b"\x80\x81")
    (tmp_path / "large.txt").write_text("word " * 3000)
    script = Script(["ok"])
    lines = ["/file notes of mine.txt", "/file binary", "/file large.txt", "What is this?", "And now?"]
    result = chat(script, "\n".join([*lines, "/file notes of mine.txt", "/undo", "Alone"]) + "\n")
    first, second, third = prompts(script, exl2_dir)
    assert "user\nnotes of mine.txt:\n\n````\n```\ncode\n```\n````\n\nWhat is this?<|im_end|>" in first
    assert "user\nAnd now?<|im_end|>" in second
    assert "user\nAlone<|im_end|>" in third
    assert re.search(r"attached notes of mine\.txt \(\d+ tokens\) to the next message", result.stderr)
    assert "error: binary is not UTF-8 text: byte 0 is 0x80" in result.stderr
    assert re.search(r"error: large\.txt has [\d,]+ tokens, but the context holds 1,024", result.stderr)


def test_model_switches_without_leaving(exl2_dir: Path, gptq_dir: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq_dir, tmp_path / "models" / "other")
    shutil.copytree(gptq_dir, tmp_path / "models" / "huge")
    script = Script(["a", "b", "c"], loads_fail=("huge",))
    result = chat(script, "Hi\n/model huge\nstill here?\n/model other\nand now?\n/model\n")
    assert "going back to fable-7m\n" in result.stderr
    assert "error: huge does not fit; take a smaller one" in result.stderr
    assert [engine.closed for engine in script.engines] == [True] * 3
    assert len(prompts(script, exl2_dir)) == 3
    assert [turn.get("model") for turn in saved(data)["turns"]][1::2] == ["fable-7m", "fable-7m", "other"]
    assert saved(data)["model"] == "other"
    assert "available models: fable-7m, huge, other" in result.stderr


def test_copy_without_a_terminal_uses_a_clipboard_program_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "error: no clipboard" in chat(Script(["ok"]), "Hi\n/copy\n").stderr
    program = tmp_path / "xclip"
    program.write_text(f'#!/bin/sh\nread -r text; echo "$text" "$@" > {tmp_path}/clipboard\n')
    program.chmod(0o755)
    monkeypatch.setenv("DISPLAY", ":0")
    result = chat(Script(["ok\n"]), "Hi\n/copy\n")
    assert "copied 2 characters" in result.stderr
    assert (tmp_path / "clipboard").read_text() == "ok -selection clipboard\n"
