"""Child processes: start one with the same packages, end it with everything it started; and exit this one."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from exl_cli.errors import DiskError

_STOP_SECONDS = 8.0


def command(module: str, *arguments: str) -> list[str]:
    """A command like `python -m module`, but with this process's sys.path.

    `-m` puts the working directory first, and a clone of exllamav2 there would shadow the installed package.
    """
    code = f"import runpy, sys; sys.path[:] = {sys.path!r}; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", code, *arguments]


def own_stdout() -> BinaryIO:
    """Return the real stdout, for this process's results, and redirect what libraries print, from C too, to stderr."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return stream


def stop(process: subprocess.Popen[Any]) -> None:
    """End a session leader and its whole session: SIGTERM to the group, then SIGKILL until nothing is left.

    Killing the group is not enough: ninja starts each compiler in a new process group, but in the same session.
    """
    session = process.pid
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    # Repeat: a process may fork between the listing and its kill.
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
    """Live processes of a session, from /proc (proc(5): field 3 of stat is the state, field 6 the session)."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                pids.append(int(entry.parent.name))
    return pids


def signal_name(number: int) -> str:
    """A signal's name, "SIGSEGV"; "signal 35" for a number without one."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def leave(code: int) -> NoReturn:
    """Exit without tearing the interpreter down, which takes seconds once torch and transformers are imported.

    Cleanup has happened in `finally` blocks by now. Threads are not joined: their results have no reader, and their
    file writes are atomic.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(Exception):
        # For libraries, such as matplotlib's temporary folder; exl registers no exit functions.
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError, DiskError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)
