"""Command lines: help texts, and what depends on Typer; for messages see `test_messages`."""

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


def test_a_misspelt_option_names_the_nearest() -> None:
    result = CliRunner().invoke(app, ["run", "--tempratur", "1"])
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, "")
    # Some versions of Typer name several.
    assert re.fullmatch(
        r"error: unknown option --tempratur; did you mean --temperature.*\? see exl run --help\n", result.stderr
    )


def test_no_command_shows_the_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "download" in result.output
    assert "error:" not in result.output


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
