"""SIGINT, SIGTSTP and terminal echo while a model loads or a response streams."""

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
def handling(handler: Callable[[int, FrameType | None], Any], *signals: int) -> Iterator[None]:
    """Let `handler` take these signals. Main thread only."""
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def cancel_on_interrupt(cancel: Callable[[], object]) -> Iterator[None]:
    """The first SIGINT calls `cancel`, a second one raises KeyboardInterrupt. Main thread only."""
    cancelled = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal cancelled
        if cancelled:
            raise KeyboardInterrupt
        cancelled = True
        cancel()

    with handling(handle, signal.SIGINT):
        yield


# --- while a model loads ----------------------------------------------------------------------------------------------


class _Loading:
    """The SIGINT handler while a model loads."""

    def __init__(self, on_interrupt: Callable[[], object]) -> None:
        self._on_interrupt = on_interrupt
        self.arrived = self.held = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        again, self.arrived = self.arrived, True
        self._on_interrupt()
        if again or not self.held:
            raise KeyboardInterrupt


@contextmanager
def insist_on_interrupt(on_interrupt: Callable[[], object] = lambda: None) -> Iterator[_Loading]:
    """SIGINT calls `on_interrupt` and raises KeyboardInterrupt, again on leaving if the first was swallowed.

    The imports of torch and transformers contain `except BaseException`, which can swallow a KeyboardInterrupt or turn
    it into another exception. Main thread only.
    """
    handler = _Loading(on_interrupt)
    try:
        with handling(handler, signal.SIGINT):
            yield handler
    except Exception as error:
        if handler.arrived:
            raise KeyboardInterrupt from error
        raise
    if handler.arrived:
        raise KeyboardInterrupt


@contextmanager
def hold_interrupt() -> Iterator[None]:
    """Delay the KeyboardInterrupt of a first SIGINT until the block ends; a second one raises at once.

    For imports of a few seconds only. An exception raised in the middle of torch's initialisation can reach C++ code
    that aborts the process with a stack trace. Does nothing if the program has installed its own handler.
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
    """Turn terminal echo off, `^C` included; typed lines stay queued for the next reader.

    Echo comes back before Ctrl-Z stops the process or a signal ends it, and goes off again after `fg`. Does nothing
    without a terminal or in the background. Main thread only.
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
        # Resumed by SIGCONT, perhaps in the background, where _echo changes nothing.
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
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, replaced by an embedder, or closed
            if os.isatty(stream.fileno()):
                return stream.fileno()
    return None


def _echo(terminal: int, *, on: bool) -> bool:
    """Switch echo and return whether it changed. A background job must not try: tcsetattr would stop it (SIGTTOU)."""
    with contextlib.suppress(OSError, termios.error):  # terminal closed
        modes = termios.tcgetattr(terminal)
        flags = modes[3] | termios.ECHO if on else modes[3] & ~termios.ECHO
        if flags != modes[3] and os.tcgetpgrp(terminal) == os.getpgrp():
            modes[3] = flags
            termios.tcsetattr(terminal, termios.TCSANOW, modes)
            return True
    return False
