"""Keys pressed while an answer comes: they are not to appear in the midst of it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def unseen() -> Iterator[None]:
    """Within it, the terminal does not show what is typed, nor `^C`; it keeps the lines for whoever reads next.

    Whoever stops the program with Ctrl-Z has a terminal that shows keys meanwhile. Does nothing where standard input is
    no terminal, or one that another program has in hand. Main thread only.
    """
    terminal = _terminal()
    if terminal is None or not _ours(terminal):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        _echo(terminal, on=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        # Here it goes on, perhaps in the background.
        _echo(terminal, on=False)

    shown = _echo(terminal, on=False)
    previous = signal.signal(signal.SIGTSTP, stop) if shown else None
    try:
        yield
    finally:
        if shown:
            signal.signal(signal.SIGTSTP, previous)
            _echo(terminal, on=True)


def _terminal() -> int | None:
    """The file descriptor of standard input, if that is a terminal."""
    try:
        number = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):  # none, a stand-in of an embedder, or closed
        return None
    return number if os.isatty(number) else None


def _ours(terminal: int) -> bool:
    """Whether this is the foreground job: the terminal stops any other that changes how it works."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False


def _echo(terminal: int, *, on: bool) -> bool:
    """Let the terminal show what is typed, or not; whether that has changed."""
    with contextlib.suppress(termios.error):  # it has been closed
        modes = termios.tcgetattr(terminal)
        flags = modes[3] | termios.ECHO if on else modes[3] & ~termios.ECHO
        if flags == modes[3] or not _ours(terminal):
            return False
        modes[3] = flags
        termios.tcsetattr(terminal, termios.TCSANOW, modes)
        return True
    return False
