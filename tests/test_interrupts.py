"""Ctrl-C while libraries import and load."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest
from helpers import python

from exl_cli.errors import ExitCode
from exl_cli.system.interrupts import cancel_on_interrupt, hold_interrupt, insist_on_interrupt


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def swallow() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        interrupt()


def wrap() -> None:
    try:
        interrupt()
    except BaseException as error:
        raise ImportError("half imported") from error


def test_an_interrupt_that_a_library_swallows_or_turns_into_an_error_counts() -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), insist_on_interrupt(lambda: told.append("told")):
        swallow()
    assert told == ["told"]
    with pytest.raises(KeyboardInterrupt) as caught, insist_on_interrupt():
        wrap()
    assert isinstance(caught.value.__cause__, ImportError)
    with pytest.raises(ImportError), insist_on_interrupt():
        raise ImportError("not there")


def test_the_first_interrupt_cancels_and_the_second_ends() -> None:
    cancel = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    with cancel_on_interrupt(cancel.set):
        interrupt()
        assert cancel.is_set()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def _ctrl_c_counts() -> Iterator[None]:
    """Also where the tests were started in the background, with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_counts")
def test_an_interrupt_waits_for_the_import_and_a_second_does_not() -> None:
    done: list[str] = []

    def imports(interrupts: int) -> None:
        with hold_interrupt():
            for _ in range(interrupts):
                interrupt()
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        imports(1)
    assert done == ["whole"]
    with pytest.raises(KeyboardInterrupt):
        imports(2)
    assert done == ["whole"]
    imports(0)
    assert done == ["whole"] * 2
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_exit_joins_no_thread_and_ignores_interrupts() -> None:
    """The temporary folders of libraries go at exit; a thread that still compiles something is not waited for."""
    code = """
import atexit, signal, sys, threading
from exl_cli.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(print, "removed")
atexit.register(signal.raise_signal, signal.SIGINT)
threading.Thread(target=threading.Event().wait).start()
sys.argv = ["exl", *sys.argv[1:]]
main()
"""
    done = python(code, "--version", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == ["removed"]
    done = python(code, "--debug", "show", "no-such-model", timeout=60)
    assert (done.returncode, done.stdout) == (ExitCode.MODEL_NOT_FOUND, "removed\n")
    assert done.stderr.splitlines()[-1].startswith("error: no model named")
