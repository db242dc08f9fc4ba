"""Invalid command lines: one line with the problem and the next step; and the help texts."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.errors import ExitCode
from exl_cli.sampling import FIELDS, Sampling

SEE_RUN = "see exl run --help"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run -n 0", f"--max-new-tokens must be at least 1, got '0'; {SEE_RUN}"),
        ("run -n abc", f"--max-new-tokens must be a whole number, at least 1, got 'abc'; {SEE_RUN}"),
        ("run --top-p x", f"--top-p must be a number, got 'x'; {SEE_RUN}"),
        ("run --cache z", f"--cache must be fp16, q8, q6 or q4, got 'z'; {SEE_RUN}"),
        ("run --top-p", f"--top-p needs a value; {SEE_RUN}"),
        ("run --quiet=1", f"--quiet takes no value; {SEE_RUN}"),
        ("run --tempratur 1", f"unknown option --tempratur; did you mean --temperature{{}}? {SEE_RUN}"),
        ("run -Z", f"unknown option -Z; {SEE_RUN}"),
        ("run a b c d", f"too many arguments: c d; quote text that contains spaces; {SEE_RUN}"),
        ("download", "MODEL is required; see exl download --help"),
        (
            "doctor --timeout 0.05",
            "--timeout must be between 0.1 and 86400, got '0.05'; see exl doctor --help",
        ),
        ("doctor --timeout inf", "--timeout must be between 0.1 and 86400, got 'inf'; see exl doctor --help"),
        ("frobnicate", "unknown command 'frobnicate'; see exl --help"),
        ("dowload x", "unknown command 'dowload'; did you mean exl download? see exl --help"),
        ("--frob", "unknown option --frob; see exl --help"),
    ],
)
def test_a_line_that_cannot_be_read(line: str, said: str) -> None:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == ExitCode.USAGE
    assert result.stdout == ""
    before, _, after = said.partition("{}")
    assert result.stderr.startswith(f"error: {before}")
    assert result.stderr.endswith(f"{after}\n")
    assert result.stderr.count("\n") == 1


def test_a_prompt_in_the_place_of_the_command() -> None:
    result = CliRunner().invoke(app, ["Once upon a time"])
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr == (
        "error: unknown command 'Once upon a time'; to run a prompt, use exl run -p 'Once upon a time'\n"
    )


def test_a_variable_of_the_environment_is_named() -> None:
    result = CliRunner().invoke(app, ["list"], env={"EXL_DEBUG": "banana"})
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr == "error: EXL_DEBUG must be 1 or 0, got 'banana'; see exl --help\n"


def test_no_command_shows_the_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "download" in result.output
    assert "error:" not in result.output


@pytest.mark.parametrize("flag", ["--temp", "--temperature"])
def test_llama_cpps_names_are_understood(flag: str) -> None:
    result = CliRunner().invoke(app, ["run", "-p", "x", flag, "101", "--repeat-penalty", "1.1"])
    assert result.stderr.startswith("error: --temperature must be between 0 and 100, got 101")


def help_of(command: str) -> str:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    return result.stdout


def test_the_help_shows_the_range_of_every_setting() -> None:
    shown = help_of("run")
    for field in dataclasses.fields(Sampling):
        line = next(line for line in shown.splitlines() if re.search(rf"{FIELDS[field.name].flag}[ ,]", line))
        if isinstance(field.default, bool):
            assert "<" not in line, line
        else:
            assert re.search(r"<(above )?-?[\d.]+ (to [\d.]+|or more)>", line), line
    assert "<0 to 1>" in next(line for line in shown.splitlines() if "--top-p " in line)


def test_every_command_ends_its_help_with_two_examples_that_can_be_read() -> None:
    group = typer.main.get_command(app)
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        title, *examples = command.epilog.split("\n\n")
        assert (title, len(examples)) == ("Examples:", 2)
        for example in examples:
            words = shlex.split(example.rpartition("| ")[2])
            assert words[:2] == ["exl", name]
            command.make_context(name, words[2:])


@pytest.mark.parametrize("command", ["run", "chat", "bench", "download", "doctor", "rm"])
def test_switches_are_shown_without_a_type(command: str) -> None:
    assert "bool" not in help_of(command)
