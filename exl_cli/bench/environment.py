"""The machine that a benchmark ran on, and what else it was doing."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from exl_cli.bench.gpus import Watch
from exl_cli.engines.base import Engine
from exl_cli.system.machine import usable_cores
from exl_cli.system.version import installed_version

_PACKAGES = ("torch", "exllamav2", "transformers", "flash-attn", "triton")


def describe(engine: Engine, watch: Watch) -> dict[str, Any]:
    """Hardware and versions. None where something is not there or cannot be read."""
    packages = {name: _version(name) for name in _PACKAGES}
    gpus = [card.name for card in engine.memory()]
    return {
        "exl": installed_version(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu(),
        "cpu_cores": usable_cores(),
        "gpu": ", ".join(gpus) or None,
        "driver": watch.driver,
        "cuda": engine.facts.get("cuda"),
        **packages,
        # The engine knows its torch's build as well, "+cpu" or "+cu130".
        "torch": engine.facts.get("torch") or packages["torch"],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class OthersClock:
    """How many cores other programs keep busy from now on, by the kernel's counts."""

    def __init__(self) -> None:
        self._start = self._read()

    def cores(self) -> float | None:
        """On average so far; None where the kernel does not tell."""
        if self._start is None or (now := self._read()) is None:
            return None
        busy, own, clock = (after - before for before, after in zip(self._start, now, strict=True))
        return max(busy - own, 0.0) / clock if clock > 0 else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds that the processors were busy, those of them by this process, and the time."""
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        except (OSError, ValueError):
            return None
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter()
