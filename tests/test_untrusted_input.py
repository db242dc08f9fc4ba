"""Input that would exhaust memory or time, or that no file system accepts: one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.errors import ExitCode
from exl_cli.models.chat_template import load_chat_template

LONG = "a" * 5000


def invoke(*args: str) -> tuple[int, str]:
    """The exit code of a command, and the only line that it says on stderr."""
    result = CliRunner().invoke(app, args)
    assert result.stderr.count("\n") == 1
    assert "unexpected" not in result.stderr
    return result.exit_code, result.stderr.removesuffix("\n")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["run", LONG, "-p", "x"], ExitCode.MODEL_NOT_FOUND),
        (["run", "a/" * 2500, "-p", "x"], ExitCode.MODEL_NOT_FOUND),
        (["show", "~nosuchuser/model"], ExitCode.MODEL_NOT_FOUND),
        (["run", "--draft", LONG, "-p", "x"], ExitCode.MODEL_NOT_FOUND),
        (["rm", LONG], ExitCode.MODEL_NOT_FOUND),
        (["show", f"owner/name:{LONG}"], ExitCode.USAGE),
        (["download", f"owner/name:{LONG}"], ExitCode.USAGE),
        (["bench", f"{LONG}.json"], ExitCode.DISK),
        (["run", "--file", LONG], ExitCode.DISK),
        (["run", "--file", "~nosuchuser/prompt"], ExitCode.DISK),
    ],
)
def test_an_impossible_file_name_is_one_line(args: list[str], code: ExitCode) -> None:
    exit_code, line = invoke(*args)
    assert exit_code == code
    assert len(line) < 600


@pytest.mark.parametrize("args", [["run", "--file", "/dev/zero"], ["bench", "--perplexity", "/dev/zero"]])
def test_a_device_is_no_text(args: list[str]) -> None:
    exit_code, line = invoke(*args)
    assert exit_code == ExitCode.DISK
    assert "cannot read /dev/zero: it is a device" in line


def test_standard_input_is_read_up_to_a_bound() -> None:
    with Path("/dev/zero").open("rb") as zeros:
        command = [sys.executable, "-m", "exl_cli", "run"]
        run = subprocess.run(command, stdin=zeros, capture_output=True, text=True, timeout=60)
    assert run.returncode == ExitCode.DISK
    assert "cannot read standard input: it is larger than 256 MiB" in run.stderr


def test_a_pipe_can_be_a_prompt_file(exl2_dir: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"from a pipe")
    os.close(writing)
    command = [sys.executable, "-m", "exl_cli", "run", "--raw", "--show-prompt", "--file", f"/dev/fd/{reading}"]
    run = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, pass_fds=[reading], timeout=60
    )
    os.close(reading)
    assert run.stdout == "from a pipe"


def test_a_pipe_in_place_of_a_template_counts_as_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_template.jinja")
    assert load_chat_template(tmp_path) is None


def test_a_prompt_of_many_megabytes_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a fox and " * 10_000_000)
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))"
    command = [sys.executable, "-c", f"{code}; from exl_cli.cli.app import app; app()", "run", "--raw", "--file"]
    run = subprocess.run(
        [*command, str(tmp_path / "prompt.txt")], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == ExitCode.PROMPT
    assert "tokens or more, but the context holds 1,024" in run.stderr
