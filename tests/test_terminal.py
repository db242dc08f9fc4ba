"""`exl run` on a real pseudo-terminal."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pexpect
import pytest

TESTS = Path(__file__).parent


def spawn(*args: str) -> pexpect.spawn:
    return pexpect.spawn(sys.executable, [*args], encoding="utf-8", timeout=60, dimensions=(40, 100), cwd=str(TESTS))


def finish(child: pexpect.spawn) -> str:
    child.expect(pexpect.EOF)
    child.close()
    return str(child.before)


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r\n", "\n")


def test_ctrl_c_keeps_the_partial_text_and_prints_the_numbers() -> None:
    child = spawn("-m", "exl_cli", "run", "-p", "A story", "-n", "1000", "--ignore-eos", "--engine", "cpu")
    child.expect(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+")
    child.sendintr()
    child.expect("Prompt processed in", timeout=5)
    rest = without_styles(finish(child))
    tokens = int(re.search(r"Response generated in [\d.]+ seconds, (\d+) tokens", rest)[1])  # type: ignore[index]
    assert 0 < tokens < 1000
    assert child.exitstatus == 130
    assert "Traceback" not in rest


def test_ctrl_c_while_loading_ends_it() -> None:
    child = spawn("-m", "exl_cli", "run", "-p", "A story")
    child.expect("Loading model")
    child.sendintr()
    rest = finish(child)
    assert child.exitstatus == 130
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("back\x08\x08space\x7f", "back␈␈space␡"),
        ("[bold]plain[/bold] :smile:", "[bold]plain[/bold] :smile:"),
        ("c1 \x9b31m", "c1 \ufffd31m"),
        ("日本🎉", "日本🎉"),
    ],
)
def test_the_models_text_cannot_command_the_terminal(answer: str, shown: str) -> None:
    child = spawn("scripted_app.py", answer, "run", "-p", "x", "--quiet")
    screen = finish(child)
    assert shown in screen
    assert "\x1b[31m" not in screen
    assert "\x1b]0" not in screen


def test_a_long_line_is_not_wrapped_by_us() -> None:
    answer = "word " * 100
    assert answer.strip() in finish(spawn("scripted_app.py", answer, "run", "-p", "x", "--quiet"))
