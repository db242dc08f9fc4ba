"""Bytes and counts as people write them."""

from __future__ import annotations

GIB = 2**30
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


def parameters(count: int) -> str:
    """Weights in the usual short form: "7.24B", "7.3M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
