"""Processes of exl: how to start one that sees the same packages, end it with all it started, and leave this one."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from exl_cli.errors import DiskError

_STOP_SECONDS = 8.0


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as `python -m` does, but with this process's path.

    `-m` would put the working folder first on it: a clone of exllamav2 there would be taken for the installed one.
    """
    code = f"import runpy, sys; sys.path[:] = {sys.path!r}; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", code, *arguments]


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, and everything it started; return when all of that is gone.

    ninja puts its compilers into groups of their own, so those left over are found by their session.
    """
    session = process.pid
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    # Another time, for what one of them started meanwhile.
    while pids := _session(session):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _session(session: int) -> list[int]:
    """The processes of a session."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                pids.append(int(entry.parent.name))
    return pids


def signal_name(number: int) -> str:
    """ "SIGSEGV"; "signal 35" where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def leave(code: int) -> NoReturn:
    """End the process at once, without the seconds that Python takes to free the modules of torch and transformers.

    What has to be undone is undone before, in a `finally`. Python waits for no thread here: each computes what nobody
    will read, and writes files in a way that can be cut off.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(Exception):
        # Of libraries: matplotlib removes its temporary folder, say. exl itself registers none.
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError, DiskError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)
