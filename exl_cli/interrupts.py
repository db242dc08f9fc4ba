"""Ctrl-C: while an answer streams the first ends the answer in order, the second the program; while a model loads the
first one counts even where some library swallows it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def cancel_on_interrupt(cancel: threading.Event) -> Iterator[None]:
    """Within it, the first SIGINT sets `cancel`; a second one raises KeyboardInterrupt. Main thread only."""

    def handle(signum: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


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
