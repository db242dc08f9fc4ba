"""Runs ninja on a build folder and reads how far it is."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import IO, Protocol

_STATUS = "@exl %f/%t "
_TAIL = 200


class Made(Protocol):
    """Is told of every file when it is there."""

    def __call__(self, *, done: int, total: int, name: str) -> None:
        """It is the `done`th of `total`, and has this name."""
        ...


def waiting(folder: Path) -> list[str]:
    """What would be made: files that are not there, or older than what they are made from."""
    done = subprocess.run(
        ["ninja", "-n", "-v"],  # noqa: S607
        cwd=folder,
        env={**os.environ, "NINJA_STATUS": _STATUS},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
    )
    return [step[2] for line in done.stdout.splitlines() if (step := _step(line))]


def run(folder: Path, jobs: int, log: IO[str], made: Made) -> str:
    """Make what is waiting.

    Args:
        folder: with a `build.ninja` in it.
        jobs: commands at once.
        log: gets every command and all that it prints.
        made: is told of every file.

    Returns:
        The end of what was printed if a command failed; empty if all went well.
    """
    ninja = subprocess.Popen(  # noqa: S603
        ["ninja", "-v", "-j", str(jobs)],  # noqa: S607 - the one that `toolchain.environment` put on PATH
        cwd=folder,
        env={**os.environ, "NINJA_STATUS": _STATUS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    tail: list[str] = []
    try:
        for line in ninja.stdout or ():
            log.write(line)
            log.flush()
            if step := _step(line):
                made(done=step[0], total=step[1], name=step[2])
            elif line.strip() and not line.startswith("ninja:"):
                tail = [*tail[-_TAIL:], line]
        code = ninja.wait()
    finally:
        if ninja.poll() is None:
            # It ends its commands and removes what they had half written.
            ninja.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                ninja.wait(5)
    return ("".join(tail) or "ninja failed without a word") if code else ""


def _step(line: str) -> tuple[int, int, str] | None:
    """Of a line about a file that is there: which of how many it is, and its name, from the command that made it."""
    step = re.match(r"@exl (\d+)/(\d+) (.*)", line)
    if step is None:
        return None
    names = re.findall(r"-o (\S+)", step[3]) or [""]
    return int(step[1]), int(step[2]), names[-1]
