"""Full or closed stdout and stderr, and Ctrl-C during startup."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import python
from hubtools import model_files

from exl_cli.errors import ExitCode

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
RUN = "run -p Once -n 3"


def shell(arguments: str, redirection: str, **more: str) -> subprocess.CompletedProcess[str]:
    line = f'exec "$0" -m exl_cli {arguments} {redirection}'
    command = ["sh", "-c", line, sys.executable]
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=60, env={**os.environ, **more})


@needs_full
@pytest.mark.parametrize("arguments", ["run --help", "list"])
def test_a_full_disk_under_stdout(arguments: str) -> None:
    done = shell(arguments, ">/dev/full")
    assert done.stderr.splitlines() == [
        "error: cannot write to stdout: No space left on device; free some space, or write it elsewhere"
    ]
    assert done.returncode == ExitCode.DISK


def test_help_whose_reader_has_left_ends_like_any_output() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "exl_cli", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (ExitCode.BROKEN_PIPE, "")


@pytest.mark.parametrize("arguments", ["--version", f"{RUN} --show-prompt -q"])
def test_a_closed_stdout_is_an_output_that_cannot_be_written(arguments: str) -> None:
    done = shell(arguments, ">&-")
    assert done.stderr.startswith("error: cannot write to stdout: Bad file descriptor; stdout is closed")
    assert done.stderr.count("\n") == 1
    assert done.returncode == ExitCode.DISK


@pytest.mark.parametrize("redirection", [pytest.param("2>/dev/full", marks=needs_full), "2>&- <&-"])
def test_a_broken_stderr_does_not_stop_the_answer(tmp_path: Path, redirection: str) -> None:
    folder = tmp_path / "acme_tiny"
    folder.mkdir()
    for name, content in model_files().items():
        (folder / name).write_bytes(content)
    done = shell("download acme/tiny", redirection, EXL_MODELS_DIR=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}\n", "")


# Sends itself the signal when a module is first asked for, while the command's own are being imported.
INTERRUPTED = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "exl_cli.loader":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
sys.argv[1:] = ["list"]
runpy.run_module("exl_cli", run_name="__main__")
"""


def test_ctrl_c_while_the_command_itself_is_imported_ends_it_silently() -> None:
    done = python(INTERRUPTED)
    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.INTERRUPTED, "", "")


# A library that says what users cannot act on, in each of the ways that libraries have; the real one takes its place.
TALKATIVE = """
import importlib, logging, sys, warnings

warnings.simplefilter("always")
warnings.warn("use cache instead", FutureWarning)
log = logging.getLogger("tokenizers")
log.addHandler(logging.StreamHandler())
log.setLevel(logging.INFO)
log.info("an info")
log.warning("a warning")
logging.getLogger("without.handlers").warning("another warning")
sys.path.remove(__file__.rpartition("/")[0])
del sys.modules["tokenizers"]
importlib.import_module("tokenizers")
"""
SAID = ["use cache instead", "an info", "a warning", "another warning"]


@pytest.mark.parametrize("debug", [False, True])
def test_what_libraries_say_is_shown_with_debug_only(tmp_path: Path, debug: bool) -> None:
    (tmp_path / "tokenizers.py").write_text(TALKATIVE)
    command = [*(["--debug"] if debug else []), *f"{RUN} --show-prompt".split()]
    done = python("from exl_cli.__main__ import main; main()", *command, path=[tmp_path])
    assert (done.returncode, [words in done.stderr for words in SAID]) == (0, [debug] * len(SAID))
    assert done.stdout
    assert done.stderr.endswith(" tokens\n")  # exl's own notes


def test_an_embedding_program_keeps_its_settings() -> None:
    code = """
import logging, signal, sys, warnings
from exl_cli.cli.app import app

before = warnings.showwarning, list(warnings.filters), signal.getsignal(signal.SIGINT), sys.stdout
try:
    app(["list", "--json"])
except SystemExit as stop:
    print(stop.code or 0)
print(app(["show", "no-such-model"], standalone_mode=False))
print(before == (warnings.showwarning, list(warnings.filters), signal.getsignal(signal.SIGINT), sys.stdout))
print(logging.getLogger("any").isEnabledFor(logging.WARNING))
"""
    done = python(code)
    assert done.stdout.splitlines()[1:] == ["0", str(int(ExitCode.MODEL_NOT_FOUND)), "True", "True"]
