"""Run the `exl` command and interrupt it while it loads a model: `interrupted_loading.py MOMENT COMMAND`."""

import contextlib
import signal
import sys
from typing import Any

from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.exllamav2.extension.build import Progress
from exl_cli.system.interrupts import hold_interrupt


def load(info: Any, tokenizer: Any, options: Any, observer: Any, **_: Any) -> None:
    """Goes on, as a library may, after what should have ended it."""
    moment = sys.argv[1]
    if moment == "held":
        with hold_interrupt():
            signal.raise_signal(signal.SIGINT)
    for _time in range(2):
        if moment == "building twice":
            observer.building(Progress(0, 48, 0.0, 60.0))
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
    observer.note("it went on")


def main() -> None:
    """The command in a process that belongs to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = [sys.argv[2], *(["-p", "x"] if sys.argv[2] == "run" else ["--no-save"])]
    app(arguments, obj=State(load=load, owns_process=True))
