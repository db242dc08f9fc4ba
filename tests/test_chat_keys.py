"""`exl chat` on a terminal while an answer comes, and on one that can do little."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from chatting import PAUSE
from test_chat_terminal import PROMPT, Start, answer_to, contents, leave, start, type_in

__all__ = ["start"]


def echoes(child: pexpect.spawn) -> bool:
    return bool(termios.tcgetattr(child.child_fd)[3] & termios.ECHO)


def left_echoing(shell: pexpect.spawn) -> bool:
    """Whether commands of this shell find a terminal that shows what is typed."""
    shell.sendline("stty -a")
    found = shell.expect([r"\s-echo\s", r"\secho\s"])
    shell.expect_exact("shell% ")
    return found == 1


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[pexpect.spawn]:
    """A plain shell with job control, and where it is dash one that leaves the terminal as it finds it."""
    child = pexpect.spawn(
        "/bin/sh",
        ["-i"],
        encoding="utf-8",
        timeout=20,
        env={**os.environ, "PS1": "shell% ", "ENV": "", "EXL_DATA_DIR": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"},
        cwd=str(Path(__file__).parent),
    )
    child.delaybeforesend = None
    child.expect_exact("shell% ")
    yield child
    child.close(force=True)


def test_what_is_typed_while_an_answer_comes_is_not_seen_in_it_and_is_the_next_message(
    start: Start, tmp_path: Path
) -> None:
    child = start([f"Once upon a time{PAUSE}", "And then."])
    type_in(child, "Hi", "enter")
    child.expect_exact("Once upon a time")
    assert not echoes(child)
    type_in(child, "typed ahead", "enter")
    child.kill(signal.SIGINT)
    child.expect_exact("stopped: /continue")
    assert "typed" not in str(child.before)
    child.expect_exact("And then.")
    child.expect("context [0-9]")
    child.expect_exact(PROMPT)
    leave(child)
    assert contents(tmp_path) == ["Hi", "Once upon a time", "typed ahead", "And then."]


def test_ctrl_c_is_not_seen_in_an_answer_and_the_terminal_is_as_it_was(start: Start) -> None:
    child = start([f"Once upon a time{PAUSE}"])
    type_in(child, "Hi", "enter")
    child.expect_exact("Once upon a time")
    type_in(child, "ctrl-c")
    child.expect_exact("stopped: /continue")
    assert "^C" not in str(child.before)
    child.expect_exact(PROMPT)
    leave(child)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_kill_in_an_answer_gives_the_terminal_back(shell: pexpect.spawn, number: signal.Signals) -> None:
    program = f"{sys.executable} chatting.py '[\"Half an answer{PAUSE}\"]' chat -q"
    shell.sendline(program)
    shell.expect_exact(PROMPT)
    type_in(shell, "Hi", "enter")
    shell.expect_exact("Half an answer")
    assert not echoes(shell)
    os.kill(int(os.tcgetpgrp(shell.child_fd)), number)
    shell.expect_exact("shell% ")
    assert left_echoing(shell)


def test_ctrl_z_in_an_answer_gives_the_terminal_to_the_shell_and_takes_it_again(shell: pexpect.spawn) -> None:
    shell.sendline(f"{sys.executable} chatting.py '[\"Half an answer{PAUSE}\"]' chat -q")
    shell.expect_exact(PROMPT)
    type_in(shell, "Hi", "enter")
    shell.expect_exact("Half an answer")
    shell.send("\x1a")
    shell.expect_exact("Stopped")
    shell.expect_exact("shell% ")
    assert left_echoing(shell)
    shell.sendline("fg")
    shell.expect_exact("chatting.py")
    shell.send("\x03")
    shell.expect_exact(PROMPT)
    type_in(shell, "ctrl-d")
    shell.expect_exact("shell% ")
    assert left_echoing(shell)


@pytest.mark.parametrize("terminal", ["dumb", "unknown"])
def test_a_terminal_that_can_do_little_gets_plain_lines(start: Start, tmp_path: Path, terminal: str) -> None:
    child = start(["<think>hm</think>ok", "And then."], TERM=terminal)
    type_in(child, "Hi", "enter")
    child.expect_exact("ok")
    child.expect("context [0-9]")
    child.expect_exact(PROMPT)
    seen = str(child.before)
    type_in(child, '"""one', "enter")
    child.expect_exact("... ")
    seen += str(child.before)
    answer_to(child, 'two"""', "And then.")
    seen += leave(child)
    assert not re.search(r"\x1b", seen)
    assert contents(tmp_path) == ["Hi", "ok", "one\ntwo", "And then."]


def test_bytes_that_are_not_utf8_are_refused_when_typed_too(start: Start, tmp_path: Path) -> None:
    child = start(["ok"])
    os.write(child.child_fd, b"a\xffb\r")
    child.expect_exact("the line is not UTF-8 text: byte 1 is 0xff")
    child.expect_exact(PROMPT)
    answer_to(child, "Hi", "ok")
    leave(child)
    assert contents(tmp_path) == ["Hi", "ok"]
