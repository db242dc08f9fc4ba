"""Bytes, counts and times for people, and when to print a line of progress."""

from __future__ import annotations

from collections.abc import Callable

MIB, GIB = 2**20, 2**30
_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: float) -> str:
    """Bytes in powers of 1,000, like the Hub's: "4.16 GB"."""
    unit = 0
    while abs(count) >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or abs(count) >= 99.95 else f"{count:.3g} {_UNITS[unit]}"


def gib(count: float) -> str:
    """GPU memory in GiB: "5.7 GiB"."""
    return f"{count / GIB:.1f} GiB"


def mib(count: float) -> str:
    """Host memory in MiB: "1,234 MiB"."""
    return f"{count / MIB:,.0f} MiB"


def parameters(count: int) -> str:
    """Parameter counts in the usual short form: "7.24B", "7.3M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def counted(count: int, noun: str) -> str:
    """A number of things: "1 line", "2,000 lines"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def clock_time(seconds: float) -> str:
    """Minutes and seconds: "1:35"."""
    whole = round(max(0.0, seconds))
    return f"{whole // 60}:{whole % 60:02}"


class Milestones:
    """Decides when to print a line of progress: at each 10 %, at most every 2 seconds and at least every 60.

    Args:
        clock: current time in seconds.
        done, total: progress at the start, for a resumed download.
    """

    _MIN_SECONDS, _MAX_SECONDS = 2.0, 60.0

    def __init__(self, clock: Callable[[], float], done: int = 0, total: int = 1) -> None:
        self._clock = clock
        self._tenth, self._last = 10 * done // max(total, 1), clock()

    def reached(self, done: int, total: int) -> bool:
        """Whether to print a line now."""
        now, tenth = self._clock(), 10 * done // max(total, 1)
        since = now - self._last
        if since >= self._MAX_SECONDS or (tenth > self._tenth and since >= self._MIN_SECONDS):
            self._tenth, self._last = tenth, now
            return True
        return False
