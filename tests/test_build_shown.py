"""Output of a build: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import itertools
import re
import sys

import pexpect
import pytest

from exl_cli.engines.exllamav2.extension.build import Progress
from exl_cli.ui.console import Console
from exl_cli.ui.progress import Build

LOADING = """
from exl_cli.engines.exllamav2.extension.build import Observer, Progress
from exl_cli.ui.console import Console
with Console().loading("a model") as shown:
    assert isinstance(shown, Observer)
    shown.note("compiling: about 3 minutes")
    shown.building(Progress(0, 3, 0.0, 95.0))
    shown.building(Progress(1, 3, 40.0, 80.0, "one.o"))
    shown.building(Progress(3, 3, 120.0, 0.0, "three.o"))
    shown.progress(1, 2)
"""


def test_on_a_terminal_a_bar_and_then_the_model() -> None:
    child = pexpect.spawn(sys.executable, ["-c", LOADING], encoding="utf-8", timeout=20, dimensions=(30, 100))
    child.expect("compiling: about 3 minutes")
    child.expect(r"Compiling .*3/3.*testing it")
    child.expect("Loading model: a model 50 %")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Loading model: a model" in re.split(r"[\r\n]+", str(child.before))[-2]


def test_elsewhere_a_line_for_every_tenth_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    # A second between two files: two are a tenth, and the time between two lines is two seconds at least.
    times = itertools.count(step=0.5)
    shown = Build(Console(), lambda: next(times))
    for done in range(21):
        shown.building(Progress(done, 20, 10.0 * done, 200.0 - 10 * done))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert 5 <= len(lines) <= 10
    assert re.fullmatch(r"compiled \d+ of 20 files in \d+:\d\d, about \d+:\d\d left", lines[0])
    assert out == ""
