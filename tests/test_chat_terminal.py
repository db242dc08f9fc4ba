"""`exl chat` on a real pseudo-terminal."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest
from chatting import PAUSE

TESTS = Path(__file__).parent
PROMPT = ">>> "
KEYS = {"up": "\x1b[A", "alt-enter": "\x1b\r", "ctrl-c": "\x03", "ctrl-d": "\x04", "tab": "\t", "enter": "\r"}

Start = Callable[..., pexpect.spawn]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def spawn(answers: list[str], *args: str, **env: str) -> pexpect.spawn:
        # pexpect answers no questions about the cursor's position.
        kept = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "TMUX")}
        variables = {
            **kept,
            "EXL_DATA_DIR": str(tmp_path),
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            **env,
        }
        command = [str(TESTS / "chatting.py"), json.dumps(answers), "chat", *args]
        child = pexpect.spawn(
            sys.executable,
            command,
            encoding="utf-8",
            timeout=30,
            dimensions=(40, 100),
            env=variables,
            cwd=str(tmp_path),
        )
        child.delaybeforesend = None
        child.expect_exact(PROMPT)
        return child

    return spawn


def type_in(child: pexpect.spawn, *keys: str) -> None:
    child.send("".join(KEYS.get(key, key) for key in keys))


def answer_to(child: pexpect.spawn, text: str, answer: str) -> None:
    """Enter a line, and wait for the answer and the next prompt."""
    type_in(child, text, "enter")
    child.expect_exact(answer)
    child.expect("context [0-9]")
    child.expect_exact(PROMPT)


def leave(child: pexpect.spawn) -> str:
    type_in(child, "ctrl-d")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Traceback" not in str(child.before)
    return str(child.before)


def turns(tmp_path: Path) -> list[dict[str, Any]]:
    (file,) = (tmp_path / "sessions").glob("*.json")
    found: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["turns"]
    return found


def contents(tmp_path: Path) -> list[str]:
    return [turn["content"] for turn in turns(tmp_path)]


def test_ctrl_c_in_the_middle_of_an_answer_keeps_it_and_goes_on(start: Start, tmp_path: Path) -> None:
    child = start([f"Once upon a time{PAUSE} never", "And then."])
    type_in(child, "Hi", "enter")
    child.expect_exact("Once upon a time")
    type_in(child, "ctrl-c")
    child.expect_exact("stopped: /continue")
    child.expect_exact(PROMPT)
    answer_to(child, "Go on", "And then.")
    assert "saved as" in leave(child)
    assert contents(tmp_path) == ["Hi", "Once upon a time", "Go on", "And then."]
    assert turns(tmp_path)[1]["finish_reason"] == "cancelled"


@pytest.mark.smoke
def test_a_paste_of_several_lines_is_one_message(start: Start, tmp_path: Path) -> None:
    child = start(["ok"])
    type_in(child, "\x1b[200~first\n\n  /quit\r\nlast\x1b[201~")
    answer_to(child, "", "ok")
    leave(child)
    assert contents(tmp_path) == ["first\n\n  /quit\nlast", "ok"]


def test_alt_enter_and_quotation_marks_break_lines(start: Start, tmp_path: Path) -> None:
    child = start(["ok"])
    type_in(child, "one", "alt-enter", "two")
    answer_to(child, "", "ok")
    type_in(child, '"""', "enter", "three", "enter", 'four"""')
    answer_to(child, "", "ok")
    leave(child)
    assert contents(tmp_path)[::2] == ["one\ntwo", "three\nfour"]


def test_history_is_kept_from_one_chat_to_the_next(start: Start, tmp_path: Path) -> None:
    child = start(["ok"])
    answer_to(child, "first message", "ok")
    type_in(child, "thrown away", "ctrl-c")
    leave(child)
    child = start(["ok"])
    type_in(child, "up", "up")
    child.expect_exact("first message")
    answer_to(child, "", "ok")
    leave(child)
    sessions = [json.loads(file.read_text()) for file in (tmp_path / "sessions").glob("*.json")]
    assert [session["turns"][0]["content"] for session in sessions] == ["first message"] * 2
    assert "+thrown away\n" in (tmp_path / "chat_history").read_text()


def test_commands_settings_models_and_sessions_are_completed(start: Start, tmp_path: Path) -> None:
    child = start(["ok"])
    answer_to(child, "Hi", "ok")
    for typed, completed, outcome in (
        ("/ret", "/retry", "context"),
        ("/set mirostat_t", "/set mirostat_tau", r"mirostat_tau +1\.5"),
        ("/model fab", "/model fable-7m", "fable-7m"),
        ("/load 20", "-hi", "going on with 20"),
        ("/export cha", "/export chat_history", "ends neither in .md nor in .json"),
    ):
        type_in(child, typed, "tab", "enter")
        child.expect_exact(completed)
        child.expect(outcome)
        child.expect_exact(PROMPT)
    leave(child)


def test_typing_a_slash_lists_what_can_follow(start: Start) -> None:
    child = start(["ok"])
    type_in(child, "/s")
    child.expect_exact("/system")
    child.expect_exact("list the saved conversations")
    type_in(child, "ctrl-c")
    leave(child)


@pytest.mark.parametrize("terminal", [{}, {"TERM": "dumb"}], ids=["editor", "plain"])
def test_ctrl_c_at_an_empty_prompt_hints_and_twice_leaves(start: Start, terminal: dict[str, str]) -> None:
    child = start(["ok"], **terminal)
    type_in(child, "ctrl-c")
    child.expect_exact("Ctrl-C again leaves")
    child.expect_exact(PROMPT)
    type_in(child, "ctrl-c")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_refused_message_is_there_to_be_shortened(start: Start, tmp_path: Path) -> None:
    child = start(["ok"], "--max-seq-len", "64")
    type_in(child, "word " * 60, "enter")
    child.expect_exact("the context holds 64")
    child.expect_exact(PROMPT)
    child.expect_exact("word word")
    type_in(child, "\x15")
    answer_to(child, "short", "ok")
    leave(child)
    assert contents(tmp_path) == ["short", "ok"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_loses_nothing(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    child = start([f"Half an answer{PAUSE}"])
    type_in(child, "Hi", "enter")
    child.expect_exact("Half an answer")
    child.kill(number)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 128 + number
    assert contents(tmp_path) == ["Hi", "Half an answer"]


def test_copy_goes_through_the_terminal_over_ssh(start: Start) -> None:
    child = start(["Grüße"], SSH_CONNECTION="10.0.0.1 1 10.0.0.2 22")
    answer_to(child, "Hi", "Grüße")
    type_in(child, "/copy", "enter")
    child.expect_exact(f"\x1b]52;c;{base64.b64encode('Grüße'.encode()).decode()}\x07")
    child.expect_exact("copied 5 characters")
    child.expect_exact(PROMPT)
    leave(child)


def test_reasoning_is_dim_and_can_be_hidden(start: Start) -> None:
    child = start(["<think>hmm</think>\n\nFour."])
    type_in(child, "2+2?", "enter")
    child.expect(r"\x1b\[2m[^\x1b]*h")
    child.expect("Four")
    child.expect_exact(PROMPT)
    type_in(child, "/set thinking off", "enter")
    child.expect_exact("thinking: on → off")
    type_in(child, "/retry", "enter")
    child.expect_exact("thinking…")
    child.expect("Four")
    assert "hmm" not in str(child.before)
    child.expect_exact(PROMPT)
    leave(child)


def test_markdown_is_rendered_block_by_block(start: Start) -> None:
    child = start(["# A title\n\nSome **bold** words.\n\n- one\n- two\n\n```\ncode\n```\n"], "--markdown")
    type_in(child, "Hi", "enter")
    child.expect(r"\x1b\[1m[^\x1b]*bold\x1b\[0m words\.")
    child.expect(r"• .*one")
    child.expect(r"\x1b\[[0-9;]*mcode")
    child.expect("context")
    child.expect_exact(PROMPT)
    leave(child)


def test_the_models_text_cannot_command_the_terminal(start: Start) -> None:
    child = start(["\x1b]52;c;AAAA\x07\x1b[2J"])
    answer_to(child, "Hi", "␛]52;c;AAAA␇␛[2J")
    leave(child)


def test_answers_go_to_a_file_while_a_person_types(start: Start, tmp_path: Path) -> None:
    command = f"{sys.executable} {TESTS / 'chatting.py'} '[\"Hello.\"]' chat --no-save > {tmp_path}/answers"
    child = pexpect.spawn(
        "/bin/sh",
        ["-c", command],
        encoding="utf-8",
        timeout=30,
        env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "EXL_DATA_DIR": str(tmp_path / "data")},
    )
    child.expect_exact(PROMPT)
    type_in(child, "Hi", "enter")
    child.expect("context")
    child.expect_exact(PROMPT)
    leave(child)
    assert (tmp_path / "answers").read_text() == "Hello.\n"
    assert not re.search("Hello", str(child.before))
    assert not (tmp_path / "data").exists()
