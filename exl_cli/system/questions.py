"""Call functions that may crash or hang in a child process with a time limit.

A module with such functions ends with `if __name__ == "__main__": questions.answer(globals())`. The functions take
keyword arguments and return a dict; both must be JSON-serialisable.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exl_cli.errors import ExlError
from exl_cli.system import processes

_asked: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Answer:
    """The result of a call, or why there is none.

    Attributes:
        value: the returned dict; None after a failure.
        problem: "crashed (SIGSEGV)", "timed out after 30 s", or the last line of the exception.
        kind: "hang", "crash", "error", or empty.
        output: the child's stderr, with whatever libraries printed.
    """

    value: dict[str, Any] | None
    problem: str = ""
    kind: str = ""
    output: str = ""

    @property
    def said(self) -> str:
        """The problem without the exception's class name."""
        head, colon, rest = self.problem.partition(": ")
        return rest if self.kind == "error" and colon and " " not in head else self.problem

    @property
    def failure(self) -> str:
        """The problem as a predicate: "crashed (SIGSEGV)", "fails: no such file"."""
        return f"fails: {self.said}" if self.kind == "error" else self.problem


def ask(module: str, question: str, seconds: float, arguments: Mapping[str, Any] | None = None) -> Answer:
    """Call `module`'s function `question` in a child process, in its own session, and kill it after `seconds`."""
    process = subprocess.Popen(  # noqa: S603
        processes.command(module, question, json.dumps(dict(arguments or {}))),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    _asked.add(process)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer(None, f"timed out after {seconds:g} s", "hang")
    finally:
        _asked.discard(process)
        if process.poll() is None:
            _kill(process)
            process.communicate()
    if process.returncode < 0:
        return Answer(None, f"crashed ({processes.signal_name(-process.returncode)})", "crash", err)
    if process.returncode:
        return Answer(None, _last_line(err) or f"exited with code {process.returncode}", "error", err)
    try:
        return Answer(dict(json.loads(_last_line(out))), output=err)
    except ValueError:
        return Answer(None, "exited without a result", "error", err)


def stop() -> None:
    """Kill all children that any thread is waiting for."""
    for process in list(_asked):
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1]


def answer(functions: Mapping[str, Any]) -> None:
    """Entry point of the child; its arguments are the function's name and a JSON object of keyword arguments."""
    out = processes.own_stdout()
    try:
        facts = functions[sys.argv[1]](**json.loads(sys.argv[2]))
    except ExlError as error:
        # str(error), as in a traceback, would replace `param` marks by bare names; the CLI needs the marks.
        said = "; ".join(filter(None, (error.message, error.hint)))
        sys.stderr.buffer.write(f"exl_cli.errors.{type(error).__name__}: {said}\n".encode())
        sys.exit(1)
    out.write(json.dumps(facts).encode() + b"\n")
    out.flush()
    # Skip exit handlers: one that crashes would turn this result into a failure.
    sys.stderr.flush()
    os._exit(0)
