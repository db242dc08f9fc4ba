"""Ctrl-C: while an answer streams the first ends the answer in order, the second the program; while a model loads the
first one counts even where some library swallows it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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


@contextmanager
def hold_interrupt() -> Iterator[None]:
    """Within it, a first SIGINT waits for the end; a second one counts at once. For imports of seconds, not for more.

    While torch starts, an exception can come up where its C++ ends the whole process for it, with a page
    of its frames. Does nothing outside of the main thread.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if waiting:
            previous(signum, frame)
        waiting.append((signum, frame))

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if waiting:
            previous(*waiting[0])


@contextmanager
def insist_on_interrupt() -> Iterator[None]:
    """Within it, a SIGINT raises KeyboardInterrupt as ever, and once more at the end if that one got lost.

    Importing torch and transformers runs through `except BaseException` here and there, which eats an interrupt that
    happens to arrive at that moment, or makes another error of it. Main thread only.
    """
    arrived = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception as error:
        if arrived:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
    if arrived:
        raise KeyboardInterrupt
