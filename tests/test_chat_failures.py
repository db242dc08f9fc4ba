"""Failures in `exl chat`: error line, what is kept, exit code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from chatting import FAIL, Script, chat, isolate, turns
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.cli.options import State


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
        ("/xyzzy\n" + "word " * 1200 + "\nHi\n", 2),
        (b"\xff\n/xyzzy\n", 6),
        ("/model nope\n/load none\nHi\n", 3),
    ],
)
def test_it_is_that_of_the_first_error(lines: str | bytes, code: int) -> None:
    result = chat(Script(["ok"]), lines, "-q", "--no-save")
    assert result.exit_code == code, result.stderr
    assert ("error: " in result.stderr) is (code != 0)


def test_an_error_in_one_turn_does_not_end_the_chat(data: Path) -> None:
    result = chat(Script(["Half an" + FAIL, "whole"]), "one\ntwo\n")
    assert (result.exit_code, result.stdout) == (7, "Half an\nwhole\n")
    assert "error: the GPU ran out of memory; use --cache q4\n" in result.stderr
    assert turns(data) == [("user", "one"), ("assistant", "Half an"), ("user", "two"), ("assistant", "whole")]


# --- bugs of ours --------------------------------------------------------------------------------------------------


def test_a_bug_is_one_line_and_the_chat_continues(data: Path) -> None:
    script = crashing(at=2)
    result = chat(script, "a\nb\nc\n", "-q")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected ZeroDivisionError: oops; run again with --debug for the traceback, and please report it\n"
    )
    assert turns(data) == [("user", "a"), ("assistant", "one"), ("user", "c"), ("assistant", "one")]
    assert script.engines[0].closed


def test_debug_shows_where_it_came_from() -> None:
    script = crashing(at=1)
    result = CliRunner().invoke(app, ["--debug", "chat", "--no-save"], input="a\n", obj=State(load=script.load))
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "ZeroDivisionError: oops\n" in result.stderr


# --- what is typed on the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "name", "position"), [("-s", "--system", 0), ("--stop", "--stop", 2)])
def test_arguments_that_are_not_utf8_are_refused(flag: str, name: str, position: int) -> None:
    text = os.fsdecode(b"ab\xff"[2 - position :])  # as a byte on the command line arrives
    result = chat(Script(["ok"]), "Hi\n", flag, text)
    assert result.stderr == (
        f"error: {name} is not UTF-8 text: byte {position} is 0xff; convert it with iconv -t UTF-8\n"
    )
    assert (result.exit_code, result.stdout) == (6, "")


# --- nothing left of a conversation ----------------------------------------------------------------------------------


def test_a_conversation_all_of_which_was_taken_back_leaves_no_file(data: Path) -> None:
    assert chat(Script(["a"]), "", "--session", "trip").exit_code == 0
    assert not data.exists()
    result = chat(Script(["a"]), "one\n/undo\n/sessions\n")
    assert "no saved sessions" in result.stderr
    assert list((data / "sessions").iterdir()) == []
    # The new first message renames it; a name that the user chose stays, with its settings.
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
