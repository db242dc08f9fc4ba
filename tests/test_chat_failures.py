"""What goes wrong in `exl chat`: what is said of it, what is kept, and the exit code that a pipe ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chatting import FAIL, Script, chat, isolate, turns
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.cli.options import State

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolate(tmp_path, monkeypatch)


def crashing(at: int) -> Script:
    """A script whose engine has a bug at one of the requests."""

    def crash(request: object) -> None:
        if len(script.requests) == at:
            raise ZeroDivisionError("oops")

    script = Script(["one"], before=crash)
    return script


# --- the exit code of a pipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ("Hi\n", 0),
        ("word " * 1200 + "\n", 6),
        (b"\xff\n", 6),
        ("/xyzzy\n", 2),
        ("/xyzzy\n" + "word " * 1200 + "\nHi\n", 2),
        (b"\xff\n/xyzzy\n", 6),
        ("/load none\n", 2),
        ("/model nope\nHi\n", 3),
        (f"{FAIL}\n", 7),
    ],
)
def test_it_is_that_of_the_first_error(lines: str | bytes, code: int) -> None:
    script = Script([FAIL if FAIL in str(lines) else "ok"])
    result = chat(script, lines, "-q", "--no-save")
    assert result.exit_code == code, result.stderr
    assert ("error: " in result.stderr) is (code != 0)


# --- bugs of ours --------------------------------------------------------------------------------------------------


def test_a_bug_is_one_line_and_the_conversation_goes_on(data: Path) -> None:
    script = crashing(at=2)
    result = chat(script, "a\nb\nc\n", "-q")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected ZeroDivisionError: oops; run again with --debug for the traceback, and please report it\n"
    )
    assert turns(data) == [("user", "a"), ("assistant", "one"), ("user", "c"), ("assistant", "one")]
    assert script.engines[0].closed


def test_debug_shows_where_it_came_from_and_goes_on_too(data: Path) -> None:
    script = crashing(at=1)
    result = CliRunner().invoke(app, ["--debug", "chat"], input="a\nb\n", obj=State(load=script.load))
    assert (result.exit_code, result.stdout) == (1, "one\n")
    assert "Traceback (most recent call last)" in result.stderr
    assert "ZeroDivisionError: oops\n" in result.stderr
    assert turns(data) == [("user", "b"), ("assistant", "one")]


# --- what is typed on the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [("-s", "\xff"), ("--stop", "ab\xff")])
def test_arguments_that_are_not_utf8_are_refused_at_once(tmp_path: Path, args: tuple[str, str]) -> None:
    flag = {"-s": "--system"}.get(args[0], args[0])
    command = [sys.executable, str(TESTS / "chatting.py"), '["ok"]', "chat", args[0], args[1].encode("latin-1")]
    result = subprocess.run(command, input=b"Hi\n", capture_output=True)
    position = len(args[1]) - 1
    assert result.stderr.decode() == (
        f"error: {flag} is not UTF-8 text: byte {position} is 0xff; convert it with iconv -t UTF-8\n"
    )
    assert (result.returncode, result.stdout) == (6, b"")


def test_a_sentence_in_the_models_place_is_meant_as_a_message() -> None:
    result = chat(Script(["ok"]), "", "Hello there")
    assert result.exit_code == 3
    assert result.stderr == (
        "error: no model named 'Hello there'; if that is a message, start exl chat without it and type it there\n"
    )


# --- session files edited by hand ----------------------------------------------------------------------------------


def edited(data: Path, **change: object) -> Path:
    """A session's file with something changed in it."""
    chat(Script(["a"]), "Hi\n", "--session", "trip")
    file = data / "sessions" / "trip.json"
    value = json.loads(file.read_text("utf-8"))
    settings = change.pop("settings", {})
    assert isinstance(settings, dict)
    value |= {**change, "settings": {**value["settings"], **settings}}
    file.write_text(json.dumps(value), "utf-8")
    return file


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"stop": None}, "stop of the settings is null"),
        ({"stop": 5}, "stop of the settings is 5"),
        ({"stop": True}, "stop of the settings is true"),
        ({"stop": "END"}, 'stop of the settings is "END"'),
        ({"stop": ["a", 1]}, 'stop of the settings is ["a", 1]'),
        ({"given": []}, "given of the settings is []"),
        ({"max_new_tokens": "9"}, 'max_new_tokens of the settings is "9"'),
    ],
)
def test_settings_of_a_wrong_kind_are_damage(data: Path, settings: dict[str, object], why: str) -> None:
    file = edited(data, settings=settings)
    before = file.read_bytes()
    result = chat(Script(["ok"]), "Hi\n", "--session", "trip")
    assert result.exit_code == 10
    assert result.stderr == (
        f"error: the session file {file} is damaged: {why}; it is left as it is; mend it or remove it\n"
    )
    assert why in chat(Script(["ok"]), "/load trip\n/sessions\n").stderr
    assert file.read_bytes() == before


def test_a_setting_that_this_version_does_not_have_is_passed_over(data: Path) -> None:
    edited(data, settings={"preset": "of tomorrow", "stop": ["END"], "mood": 1})
    script = Script(["ok"])
    assert chat(script, "Hi\n", "--session", "trip").exit_code == 0
    assert script.requests[0].stop_strings == ("END",)


def test_half_a_character_in_a_session_is_damage(data: Path) -> None:
    edited(data, system="\ud800")
    result = chat(Script(["ok"]), "Hi\n", "--session", "trip")
    assert result.exit_code == 10
    assert "is damaged: it has half a character, U+D800;" in result.stderr


def test_a_byte_order_mark_is_passed_over(data: Path) -> None:
    file = edited(data)
    file.write_text(file.read_text("utf-8"), "utf-8-sig")
    result = chat(Script(["ok"]), "/sessions\nAnd now?\n", "--continue")
    assert (result.exit_code, result.stdout) == (0, "ok\n"), result.stderr
    assert [text for _, text in turns(data)] == ["Hi", "a", "And now?", "ok"]


# --- nothing left of a conversation ----------------------------------------------------------------------------------


def test_a_conversation_all_of_which_was_taken_back_leaves_no_file(data: Path) -> None:
    result = chat(Script(["a"]), "one\n/undo\n/sessions\n")
    assert "there are no saved sessions" in result.stderr
    assert list((data / "sessions").iterdir()) == []
    # What it begins with anew names it; a name of one's own stays, with what was set under it.
    chat(Script(["a"]), "one\n/undo\ntwo\n")
    assert [file.stem.endswith("-two") for file in (data / "sessions").iterdir()] == [True]
    chat(Script(["a"]), "one\n/undo\n", "--session", "trip", "--system", "S")
    assert json.loads((data / "sessions" / "trip.json").read_text())["system"] == "S"


def test_a_file_that_another_exl_has_written_meanwhile_stays(data: Path) -> None:
    def meddle(request: object) -> None:
        (file,) = (data / "sessions").glob("*.json")
        file.write_text(file.read_text() + " ")

    chat(Script([FAIL], before=meddle), "one\n")
    assert len(list((data / "sessions").iterdir())) == 1
