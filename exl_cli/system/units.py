"""Bytes, counts and times as people write them, and when progress is worth a line."""

from __future__ import annotations

from collections.abc import Callable

MIB, GIB = 2**20, 2**30
_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: float) -> str:
    """Bytes as the Hub writes them, in powers of 1,000: "4.16 GB"."""
    unit = 0
    while abs(count) >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or abs(count) >= 99.95 else f"{count:.3g} {_UNITS[unit]}"


def gib(count: float) -> str:
    """GPU memory, in GiB as cards are sold: "5.7 GiB"."""
    return f"{count / GIB:.1f} GiB"


def mib(count: float) -> str:
    """Host memory in MiB: "1,234 MiB"."""
    return f"{count / MIB:,.0f} MiB"


def parameters(count: int) -> str:
    """Weights in the usual short form: "7.24B", "7.3M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def clock_time(seconds: float) -> str:
    """95 seconds as "1:35"."""
    whole = round(max(0.0, seconds))
    return f"{whole // 60}:{whole % 60:02}"


class Milestones:
    """Picks the moments for a line of progress: every tenth of the whole, but no flood of them, and one a minute.

    Args:
        clock: in seconds.
        done, total: how far it is at the start.
    """

    _TENTHS, _SOONEST, _LATEST = 10, 2.0, 60.0

    def __init__(self, clock: Callable[[], float], done: int = 0, total: int = 1) -> None:
        self._clock = clock
        self._tenth, self._last = self._TENTHS * done // max(total, 1), clock()

    def reached(self, done: int, total: int) -> bool:
        """Whether this is one of those moments."""
        now, tenth = self._clock(), self._TENTHS * done // max(total, 1)
        since = now - self._last
        if since >= self._LATEST or (tenth > self._tenth and since >= self._SOONEST):
            self._tenth, self._last = tenth, now
            return True
        return False
