"""Ctrl-C, Ctrl-Z and other keys while a model loads or an answer streams."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def cancel_on_interrupt(cancel: Callable[[], object]) -> Iterator[None]:
    """Within it, the first SIGINT calls `cancel`; a second one raises KeyboardInterrupt. Main thread only."""
    cancelled = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal cancelled
        if cancelled:
            raise KeyboardInterrupt
        cancelled = True
        cancel()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


# --- while a model loads ----------------------------------------------------------------------------------------------


class _Loading:
    """The handler of SIGINT while a model loads."""

    def __init__(self, told: Callable[[], object]) -> None:
        self._told = told
        self.arrived = self.held = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        again, self.arrived = self.arrived, True
        self._told()
        if again or not self.held:
            raise KeyboardInterrupt


@contextmanager
def insist_on_interrupt(told: Callable[[], object] = lambda: None) -> Iterator[_Loading]:
    """Within it, a SIGINT calls `told` and raises KeyboardInterrupt, and once more at the end if that one got lost.

    Importing torch and transformers runs through `except BaseException` here and there, which eats an interrupt that
    happens to arrive at that moment, or makes another error of it. Main thread only.
    """
    handler = _Loading(told)
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield handler
    except Exception as error:
        if handler.arrived:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
    if handler.arrived:
        raise KeyboardInterrupt


@contextmanager
def hold_interrupt() -> Iterator[None]:
    """Within it, the KeyboardInterrupt of a first SIGINT waits for the end; a second one comes up at once.

    For imports of seconds, not for more: while torch starts, an exception can come up where its C++ ends the whole
    process for it, with a page of its frames. Does nothing where a program has a handler of its own.
    """
    with contextlib.ExitStack() as stack:
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.default_int_handler and threading.current_thread() is threading.main_thread():
            handler = stack.enter_context(insist_on_interrupt())
        if not isinstance(handler, _Loading):
            yield
            return
        handler.held = True
        try:
            yield
        finally:
            handler.held = False
        if handler.arrived:
            raise KeyboardInterrupt


# --- while an answer streams ------------------------------------------------------------------------------------------


@contextmanager
def unseen_keys() -> Iterator[None]:
    """Within it, the terminal does not show what is typed, nor `^C`; it keeps the lines for the next to read.

    Ctrl-Z stops the program with the echo on, and off again when it goes on; a signal that ends it turns it on first.
    Does nothing without a terminal, or in one that another program has in hand. Main thread only.
    """
    terminal = _terminal()
    if terminal is None:
        yield
        return
    changed = False

    def pause(number: int, frame: FrameType | None) -> None:
        nonlocal changed
        if changed:
            _echo(terminal, on=True)
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            signal.signal(number, handlers[number])
            os.kill(os.getpid(), number)
        # Here it goes on, perhaps in the background.
        changed = _echo(terminal, on=False)

    handlers: dict[int, Any] = {}
    for number in map(int, (signal.SIGTSTP, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            handlers[number] = signal.signal(number, pause)
    try:
        changed = _echo(terminal, on=False)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if changed:
            _echo(terminal, on=True)


def _terminal() -> int | None:
    """The file descriptor of the terminal that keys come from, or text goes to."""
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # none, a stand-in of an embedder, or closed
            if os.isatty(stream.fileno()):
                return stream.fileno()
    return None


def _echo(terminal: int, *, on: bool) -> bool:
    """Let the terminal show what is typed, or not; returns whether that has changed.

    Nothing changes in the background: the terminal stops a job there that tries.
    """
    with contextlib.suppress(OSError, termios.error):  # it has been closed
        modes = termios.tcgetattr(terminal)
        flags = modes[3] | termios.ECHO if on else modes[3] & ~termios.ECHO
        if flags != modes[3] and os.tcgetpgrp(terminal) == os.getpgrp():
            modes[3] = flags
            termios.tcsetattr(terminal, termios.TCSANOW, modes)
            return True
    return False
