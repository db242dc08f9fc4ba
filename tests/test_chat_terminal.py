"""`exl chat` on a pseudo-terminal: line editing, streaming, keys typed meanwhile, exit."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from chatting import PAUSE

TESTS = Path(__file__).parent
PROMPT = ">>> "
KEYS = {"up": "\x1b[A", "alt-enter": "\x1b\r", "ctrl-c": "\x03", "ctrl-d": "\x04", "tab": "\t", "enter": "\r"}

Start = Callable[..., pexpect.spawn]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    # pexpect answers no questions about the cursor's position.
    kept = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "TMUX")}
    settings = {"EXL_DATA_DIR": str(tmp_path), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}

    def spawn(command: list[str], **env: str) -> pexpect.spawn:
        variables: dict[str, str] = {**kept, **settings, **env}
        child = pexpect.spawn(
            command[0], command[1:], 30, dimensions=(40, 100), env=variables, cwd=str(tmp_path), encoding="utf-8"
        )
        child.delaybeforesend = None
        child.expect_exact(PROMPT)
        return child

    return spawn


def chat(answers: list[str], *args: str) -> list[str]:
    return [sys.executable, str(TESTS / "chatting.py"), json.dumps(answers), "chat", *args]


def type_in(child: pexpect.spawn, *keys: str) -> None:
    child.send("".join(KEYS.get(key, key) for key in keys))


def answer_to(child: pexpect.spawn, text: str, answer: str) -> str:
    """Enter a line, and wait for the answer and the next prompt; returns what was shown after the answer."""
    type_in(child, text, "enter")
    child.expect_exact(answer)
    child.expect("context [0-9]")
    child.expect_exact(PROMPT)
    return str(child.before)


def leave(child: pexpect.spawn, *keys: str) -> str:
    type_in(child, *(keys or ["ctrl-d"]))
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Traceback" not in str(child.before)
    return str(child.before)


def said(folder: Path) -> list[str]:
    """The user's messages and the answers of the only session."""
    (file,) = (folder / "sessions").glob("*.json")
    return [turn["content"] for turn in json.loads(file.read_text("utf-8"))["turns"]]


@pytest.mark.smoke
def test_several_lines_history_completion_and_drafts(start: Start, tmp_path: Path) -> None:
    child = start(chat(["ok"], "--max-seq-len", "200", "-n", "20"))
    type_in(child, "\x1b[200~first\n\n  /quit\r\nlast\x1b[201~")
    answer_to(child, "", "ok")
    type_in(child, "one", "alt-enter", "two")
    answer_to(child, "", "ok")
    type_in(child, '"""', "enter", "three", "enter", 'four"""')
    answer_to(child, "", "ok")
    for typed, completed, outcome in (
        ("/ret", "/retry", "context"),
        ("/set mirostat_t", "/set mirostat_tau", r"mirostat_tau +1\.5"),
        ("/model fab", "/model fable-7m", "fable-7m"),
        ("/load 20", "-first-quit-last", "resuming 20"),
        ("/export cha", "/export chat_history", "unknown export format"),
    ):
        type_in(child, typed, "tab", "enter")
        child.expect_exact(completed)
        child.expect(outcome)
        child.expect_exact(PROMPT)
    # A slash lists what may follow.
    type_in(child, "/s")
    child.expect_exact("/system")
    child.expect_exact("list saved sessions")
    type_in(child, "ctrl-c", "thrown away", "ctrl-c")
    # A refused message is there to be shortened.
    type_in(child, "word " * 250, "enter")
    child.expect_exact("the context holds 200")
    child.expect_exact(PROMPT)
    child.expect_exact("word word")
    type_in(child, "\x15")
    answer_to(child, "short", "ok")
    leave(child)
    assert said(tmp_path)[::2] == ["first\n\n  /quit\nlast", "one\ntwo", "three\nfour", "short"]
    # History is kept from one chat to the next.
    child = start(chat(["ok"], "--continue"))
    type_in(child, "up", "up", "up")
    child.expect_exact("thrown away")
    answer_to(child, "", "ok")
    leave(child)
    assert said(tmp_path)[-2:] == ["thrown away", "ok"]


def test_nothing_typed_or_said_in_an_answer_disturbs_the_terminal(start: Start, tmp_path: Path) -> None:
    answers = [f"Once upon a time{PAUSE} never", "And then.", "<think>hmm</think>\n\nFour.", "<think>hmm</think>Five."]
    child = start(
        chat([*answers, "\x1b]52;c;AAAA\x07\x1b[2J", "Grüße", f"Hm{PAUSE}"]), SSH_CONNECTION="10.0.0.1 1 10.0.0.2 22"
    )
    type_in(child, "Hi", "enter")
    child.expect_exact("Once upon a")
    assert not termios.tcgetattr(child.child_fd)[3] & termios.ECHO
    # What is typed meanwhile is not seen in the answer, and is the next message.
    type_in(child, "typed ahead", "enter")
    child.kill(signal.SIGINT)
    child.expect_exact("stopped: /continue")
    assert "typed" not in str(child.before)
    child.expect_exact("And then.")
    child.expect_exact(PROMPT)
    type_in(child, "2+2?", "enter")
    child.expect(r"\x1b\[2m[^\x1b]*h")
    child.expect("Four")
    child.expect_exact(PROMPT)
    type_in(child, "/set thinking off", "enter")
    child.expect_exact("thinking: on → off")
    type_in(child, "/retry", "enter")
    child.expect_exact("thinking…")
    child.expect("Five")
    assert "hmm" not in str(child.before)
    child.expect_exact(PROMPT)
    # The model's text cannot command the terminal, and bytes that are not UTF-8 are refused when typed too.
    answer_to(child, "And?", "␛]52;c;AAAA␇␛[2J")
    os.write(child.child_fd, b"a\xffb\r")
    child.expect_exact("the line is not UTF-8 text: byte 1 is 0xff")
    child.expect_exact(PROMPT)
    answer_to(child, "Greet me", "Grüße")
    type_in(child, "/copy", "enter")
    child.expect_exact(f"\x1b]52;c;{base64.b64encode('Grüße'.encode()).decode()}\x07")
    child.expect_exact("copied 5 characters")
    child.expect_exact(PROMPT)
    # Of a ^C nothing is seen.
    type_in(child, "Why?", "enter")
    child.expect_exact("Hm")
    type_in(child, "ctrl-c")
    child.expect_exact("stopped: /continue")
    assert "^C" not in str(child.before)
    child.expect_exact(PROMPT)
    assert "saved; resume" in leave(child)
    assert said(tmp_path)[:6] == ["Hi", "Once upon a time", "typed ahead", "And then.", "2+2?", "Five."]


def test_markdown_is_rendered_block_by_block_and_ctrl_c_twice_leaves(start: Start) -> None:
    answer = "# A title\n\nSome **bold** words.\n\n- one\n- two\n\n```\ncode\n```\n"
    child = start(chat([answer], "--markdown"))
    type_in(child, "Hi", "enter")
    child.expect(r"\x1b\[1m[^\x1b]*bold\x1b\[0m words\.")
    child.expect(r"• .*one")
    child.expect(r"\x1b\[[0-9;]*mcode")
    child.expect("context")
    child.expect_exact(PROMPT)
    type_in(child, "ctrl-c")
    child.expect_exact("press Ctrl-C again")
    child.expect_exact(PROMPT)
    leave(child, "ctrl-c")


def test_a_terminal_that_can_do_little_gets_plain_lines(start: Start, tmp_path: Path) -> None:
    child = start(chat(["<think>hm</think>ok", "And then."]), TERM="dumb")
    seen = answer_to(child, "Hi", "ok")
    type_in(child, '"""one', "enter")
    child.expect_exact("... ")
    seen += str(child.before) + answer_to(child, 'two"""', "And then.")
    type_in(child, "ctrl-c")
    child.expect_exact("press Ctrl-C again")
    child.expect_exact(PROMPT)
    seen += leave(child, "ctrl-c")
    assert not re.search(r"\x1b", seen)
    assert said(tmp_path) == ["Hi", "ok", "one\ntwo", "And then."]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_loses_nothing(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    child = start(chat([f"Half an answer{PAUSE}"], "-q"))
    type_in(child, "Hi", "enter")
    child.expect_exact("Half an")  # the last word may still have to move to the next line
    child.kill(number)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 128 + number
    assert said(tmp_path) == ["Hi", "Half an answer"]


def test_answers_go_to_a_file_while_a_person_types(start: Start, tmp_path: Path) -> None:
    command = " ".join(f"'{part}'" for part in chat(["Hello."], "--no-save"))
    child = start(["/bin/sh", "-c", f"{command} > {tmp_path}/answers"], EXL_DATA_DIR=str(tmp_path / "data"))
    type_in(child, "Hi", "enter")
    child.expect("context")
    child.expect_exact(PROMPT)
    assert "Hello" not in str(child.before) + leave(child)
    assert (tmp_path / "answers").read_text() == "Hello.\n"
    assert not (tmp_path / "data").exists()
