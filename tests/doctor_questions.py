"""Questions that end badly, asked in child processes by the tests of the doctor: `NAME ARGUMENTS`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    threading.Event().wait()


def fail() -> None:
    raise ValueError("first line\nwhat is wrong")


def nothing() -> None:
    sys.stdout.write("no answer\n")


def echo(**given: object) -> None:
    sys.stdout.write("a library says something\n" + json.dumps({"given": given, "path": sys.path[:1]}) + "\n")


globals()[sys.argv[1]](**json.loads(sys.argv[2]))
