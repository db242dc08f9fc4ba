"""`exl run` on a pseudo-terminal, and with redirected streams."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pexpect
import pytest
from chatting import FAIL, PAUSE, Script
from helpers import python
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.errors import ExitCode
from exl_cli.system.interrupts import hold_interrupt

TESTS = Path(__file__).parent


def program(answer: str, *args: str) -> list[str]:
    return [str(TESTS / "chatting.py"), json.dumps([answer]), *args]


def spawn(command: str, args: list[str], width: int = 100, **env: str) -> pexpect.spawn:
    environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "PS1": "shell% ", "ENV": "", **env}
    child = pexpect.spawn(
        command, args, encoding="utf-8", timeout=60, dimensions=(40, width), env=environment, cwd=str(TESTS)
    )
    child.delaybeforesend = None
    return child


def finish(child: pexpect.spawn) -> str:
    """The rest of what is on the screen, without styles."""
    child.expect(pexpect.EOF)
    child.close()
    return without_styles(str(child.before))


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r\n", "\n")


def echoes(child: pexpect.spawn) -> bool:
    return bool(termios.tcgetattr(child.child_fd)[3] & termios.ECHO)


def test_ctrl_c_keeps_the_partial_text_without_echoed_keys() -> None:
    child = spawn(sys.executable, program(f"Once upon a time{PAUSE}", "run", "-p", "A story"))
    child.expect_exact("Once upon a")
    assert not echoes(child)
    child.send("typed\x03")
    rest = finish(child)
    assert re.match(r" time\nPrompt processed in .*\nResponse generated in [\d.]+ seconds, \d+ tokens", rest)
    assert child.exitstatus == ExitCode.INTERRUPTED


def test_a_shell_gets_its_terminal_back_however_an_answer_ends() -> None:
    """Where the shell is dash, it leaves the terminal as it finds it."""
    shell = spawn("/bin/sh", ["-i"])

    def at_prompt() -> None:
        shell.expect_exact("shell% ")
        shell.sendline("stty -a")
        assert shell.expect([r"\s-echo\s", r"\secho\s"]) == 1
        shell.expect_exact("shell% ")

    at_prompt()
    for number in (signal.SIGTERM, signal.SIGQUIT):
        shell.sendline(f"{sys.executable} chatting.py '[\"Half an answer{PAUSE}\"]' run -q -p x")
        shell.expect(r"\nHalf an")
        assert not echoes(shell)
        shell.send("\x1a")
        shell.expect_exact("Stopped")
        at_prompt()
        shell.sendline("fg")
        shell.expect_exact("chatting.py")
        os.kill(int(os.tcgetpgrp(shell.child_fd)), number)
        at_prompt()
    shell.close(force=True)


def exl(screen: TextIO, answer: str, *args: str, stderr: TextIO | None = None) -> None:
    """The command in this process, its streams where they are told to be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", stderr or screen)
        app(args, obj=State(load=Script([answer]).load), standalone_mode=False)


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """What the command shows on a terminal, without styles."""
    ours, its = os.openpty()

    def shown(answer: str, *args: str, width: int = 1000) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        exl(terminal, answer, *args)
        return without_styles(os.read(ours, 100_000).decode())

    with os.fdopen(its, "w", encoding="utf-8") as terminal:
        yield shown
    os.close(ours)


def test_what_is_shown_on_a_terminal(on_terminal: Callable[..., str]) -> None:
    """`test_terminal_text` has the cases."""
    answer = "[bold]The[/bold] :smile: \x1b[31mfox jumps over \u202ethe lazy dog"
    assert on_terminal(answer, "run", "-p", "x", "-q", width=30) == (
        "[bold]The[/bold] :smile:\n␛[31mfox jumps over \u202ethe lazy\u202c\n\u202edog\u202c\n"
    )


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (("run", "-p", "a\u202eb\u200b\x7f", "--raw", "--show-prompt"), r"a\u202eb\u200b\u007f"),
        (("run", "--var", "a\u2028b=c", "--template", "x"), r"a\u2028b"),
        (("run", "-f", "/no\u2066such\u009b"), r"/no\u2066such\u009b"),
        (("list", "--models-dir", "{models}"), r"a\u202eb\u007f"),
        (("list", "--models-dir", "{models}", "--json"), r"a\u202eb\u007f"),
        (("show", "a\u202eb\x7f", "--models-dir", "{models}"), r"a\u202eb\u007f"),
    ],
)
def test_names_and_prompts_show_their_invisible_characters(
    on_terminal: Callable[..., str], tmp_path: Path, args: tuple[str, ...], shown: str
) -> None:
    (tmp_path / "a\u202eb\x7f").mkdir()
    (tmp_path / "a\u202eb\x7f" / "config.json").touch()
    assert shown in on_terminal("", *(arg.format(models=tmp_path) for arg in args))


@pytest.mark.parametrize(
    ("width", "name", "titles"),
    [
        (400, "TheBloke_Mistral-7B-Instruct-v0.2-GPTQ", "Name Format bpw Params Size Context Location"),
        (80, "TheBloke_Mistral-7B-Instruct-v0.2-GPTQ", "Name Format bpw Size Context"),
        (80, "TheBloke_Mistral-7B-Instruct-v0.2-GPTQ_gptq-4bit-32g-actorder_True", "Name Format"),
        (40, "fable", "Name Format Size Context"),
    ],
)
def test_names_in_tables_stay_whole_and_columns_are_left_out_instead(
    on_terminal: Callable[..., str], tmp_path: Path, gptq_dir: Path, width: int, name: str, titles: str
) -> None:
    (tmp_path / name).symlink_to(gptq_dir)
    lines = on_terminal("", "list", "--models-dir", str(tmp_path), width=width).splitlines()
    assert " ".join(lines[1].split()) == titles
    assert {line.split()[0] for line in lines if line.strip()} >= {name, "fable-7m"}
    assert all(len(line) <= width for line in lines)


def test_json_on_a_terminal_is_of_the_same_value(on_terminal: Callable[..., str]) -> None:
    prompt = "\u202e\u200b\x7f\x9b\u2028"
    screen = on_terminal("", "run", "-p", prompt, "--raw", "--show-prompt", "--json")
    assert screen.isascii()
    assert json.loads(screen)["prompt"] == prompt


# --- where it is no terminal ------------------------------------------------------------------------------------------

BYTES = "[bold]no markup[/bold] \x1b[31mred\x07 tab\tcr\r\n" + "long " * 60 + "\u202e日本🎉\u2028\x9b end "


@pytest.mark.parametrize(
    ("answer", "args", "pattern"),
    [
        (BYTES, ["-q"], re.escape(BYTES)),
        ("It slept.", [], r"Loading .*\nIt slept\.\nPrompt processed .*"),
        ("It slept.\n", [], r"Loading .*\nIt slept\.\nPrompt processed .*"),
        (f"It {FAIL}", ["-q"], r"It \nerror: the GPU ran out of memory.*"),
    ],
)
def test_lines_stay_separate_when_both_streams_share_a_file(
    tmp_path: Path, answer: str, args: list[str], pattern: str
) -> None:
    with (tmp_path / "out").open("w") as stdout, os.fdopen(os.dup(stdout.fileno()), "w", buffering=1) as stderr:
        exl(stdout, answer, "run", "-p", "x", *args, stderr=stderr)
    assert re.fullmatch(pattern, (tmp_path / "out").read_bytes().decode(), re.DOTALL)


def test_a_pipe_gets_the_text_byte_for_byte() -> None:
    command = [sys.executable, *program(BYTES, "run", "-p", "x")]
    done = subprocess.run(command, input=b"", capture_output=True, env={"LC_ALL": "C", "PATH": ""})
    assert done.stdout == BYTES.encode()


# --- Ctrl-C while a model loads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "moment", "said"),
    [("run", "held", ""), ("chat", "swallowed", ""), ("run", "building twice", "stopping\n")],
)
def test_ctrl_c_while_loading_exits_or_is_acknowledged_at_once(command: str, moment: str, said: str) -> None:
    done = python("import interrupted_loading; interrupted_loading.main()", moment, command, path=[TESTS])
    assert done.returncode == ExitCode.INTERRUPTED
    assert done.stderr.removeprefix("Loading model: fable-7m (EXL2 5.0 bpw)\n") == said


def test_ctrl_c_while_another_model_loads_does_not_end_the_process() -> None:
    script = Script(["ok"])

    def load(*args: Any, **more: Any) -> Any:
        if script.engines:
            with hold_interrupt():
                signal.raise_signal(signal.SIGINT)
                args[3].note("imported")
        return script.load(*args, **more)

    lines = ["Hi", "/model fable-7m", "Hi"]
    done = CliRunner().invoke(app, ["chat", "--no-save"], input="\n".join(lines), obj=State(load=load))
    assert re.search("\nstopping\nimported\n", done.stderr)
    assert (done.exit_code, done.stdout) == (ExitCode.INTERRUPTED, "ok\n")  # nobody is there to go on
