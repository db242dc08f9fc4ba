"""What exl says about a command line or a chat's line that it refuses, word for word: `data/messages.txt`.

`python tests/test_messages.py` runs the commands of the file and writes what they say now. Read the diff.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest
from chatting import Script
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.cli.options import State

FILE = Path(__file__).parent / "data" / "messages.txt"
# Relative, as they are shown.
ENVIRONMENT = {"EXL_MODELS_DIR": "models", "EXL_DATA_DIR": "data"}
# A command, perhaps with variables in front, and the lines of its input after ">"; then its output and exit code.
ENTRIES = dict(re.findall(r"^(\$ .*\n(?:> .*\n)*)((?:(?!\$ ).*\n)*)", FILE.read_text(), re.MULTILINE))


def said(entry: str) -> str:
    """What a command writes, and its exit code."""
    command, *typed = entry.splitlines()
    variables, _, arguments = command.removeprefix("$ ").partition("exl ")
    environment = ENVIRONMENT | dict(word.split("=", 1) for word in shlex.split(variables))
    text = "".join(f"{line.removeprefix('> ')}\n" for line in typed)
    state = State(load=Script(["ok"]).load)
    result = CliRunner().invoke(app, shlex.split(arguments), input=text, env=environment, obj=state)
    return f"{result.output}exit code {result.exit_code}\n"


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.partition("\n")[0] for entry in ENTRIES])
def test_a_command_says_what_it_said(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(entry) == ENTRIES[entry].rstrip("\n") + "\n"


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    FILE.write_text("\n".join(entry + said(entry) for entry in ENTRIES))
