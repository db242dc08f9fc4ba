"""A question asked in a process of its own, with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exl_cli.engines.exllamav2.extension import failures
from exl_cli.system import processes

_asked: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Answer:
    """How it ended.

    Attributes:
        value: what it answered; None where it did not.
        problem: why it did not, in a few words: "crashed (SIGSEGV)", "hung: no answer in 30 s", an exception's text.
        kind: of the problem: "hang", "crash" or "error".
    """

    value: dict[str, Any] | None
    problem: str = ""
    kind: str = ""

    @property
    def said(self) -> str:
        """The problem, an exception's class left out: "exl_cli.errors.EngineError: …"."""
        head, colon, rest = self.problem.partition(": ")
        return rest if self.kind == "error" and colon and " " not in head else self.problem

    def fix(self, otherwise: str) -> str:
        """The next step: more patience where it hung, else what is given."""
        return "exl doctor --timeout 300, in case this machine is slow" if self.kind == "hang" else otherwise


def ask(
    probe: str,
    seconds: float,
    arguments: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    module: str = "exl_cli.doctor.probes",
) -> Answer:
    """Ask one of the probes.

    Args:
        probe: its name.
        seconds: after which it counts as hanging.
        arguments: of the probe's function, JSON-ready.
        environment: variables besides this process's own.
        module: where the probes are.
    """
    process = subprocess.Popen(  # noqa: S603
        processes.command(module, probe, json.dumps(dict(arguments or {}))),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        # A session, so that whatever it started ends with it and Ctrl-C comes here alone.
        start_new_session=True,
    )
    _asked.add(process)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer(None, f"hung: no answer in {seconds:g} s", "hang")
    finally:
        _asked.discard(process)
        if process.poll() is None:
            _kill(process)
            process.communicate()
    if process.returncode < 0:
        return Answer(None, f"crashed ({_signal_name(-process.returncode)})", "crash")
    said = failures.last_line(err.decode("utf-8", "replace"))
    if process.returncode:
        return Answer(None, said or f"ended with code {process.returncode}", "error")
    try:
        return Answer(dict(json.loads(failures.last_line(out.decode("utf-8", "replace")))))
    except ValueError:
        return Answer(None, "ended without an answer", "error")


def stop() -> None:
    """End every question that is still being asked, in whatever thread: nobody waits for the answer any more."""
    for process in list(_asked):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
