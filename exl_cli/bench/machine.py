"""The machine that a benchmark runs on: what it is, its GPUs while they work, what else keeps it busy."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exl_cli.api.engine_thread import EngineThread
from exl_cli.system.machine import usable_cores
from exl_cli.system.nvml import Driver
from exl_cli.system.version import installed_version, package_version

_PACKAGES = ("torch", "exllamav2", "transformers", "flash-attn", "triton")

# Reasons for a lower clock that change a figure, by the names of NVML's constants, with what to call them.
_REASONS = (
    ("nvmlClocksThrottleReasonSwPowerCap", "power cap"),
    ("nvmlClocksThrottleReasonSwThermalSlowdown", "heat"),
    ("nvmlClocksThrottleReasonHwSlowdown", "hardware slowdown"),
    ("nvmlClocksThrottleReasonHwThermalSlowdown", "heat (hardware)"),
    ("nvmlClocksThrottleReasonHwPowerBrakeSlowdown", "power brake"),
)


class Watch:
    """Looks at the GPUs that an engine uses. Everything that a card or driver withholds is None or empty.

    To be made before the engine is loaded: processes that hold GPU memory then belong to others.

    Args:
        driver: closed with this object.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._handles: dict[str, Any] = {}
        self._before = {str(driver.ask("DeviceGetUUID", gpu)): self._processes(gpu) for gpu in driver.devices()}
        self.driver: str | None = driver.ask("SystemGetDriverVersion")
        self.slowed: Counter[str] = Counter()
        self.looks = 0
        self.most_used: int | None = None  # bytes of GPU memory, by all processes

    def attach(self, uuids: Sequence[str]) -> None:
        self._handles = self._driver.handles(uuids)

    def joules(self) -> float | None:
        """Energy that the GPUs have taken since their driver was loaded."""
        return self._driver.joules(self._handles.values())

    def link(self) -> str | None:
        """How the GPUs exchange data, see `Driver.link`; None for a single GPU."""
        pairs = itertools.combinations(self._handles.values(), 2)
        links = dict.fromkeys(link for pair in pairs if (link := self._driver.link(*pair)))
        return "; ".join(links) or None

    def look(self) -> None:
        """Note how much memory is in use at this moment, and why the clocks are held back, if they are."""
        memory = [self._driver.ask("DeviceGetMemoryInfo", handle) for handle in self._handles.values()]
        if memory and None not in memory:
            self.most_used = max(self.most_used or 0, sum(int(reading.used) for reading in memory))
        reasons = 0
        for handle in self._handles.values():
            # "EventReasons" since driver 535, which knows the older name too.
            reasons |= int(self._driver.ask("DeviceGetCurrentClocksThrottleReasons", self._driver.card(handle)) or 0)
        self.looks += 1
        self.slowed.update(name for constant, name in _REASONS if reasons & getattr(self._driver.nvml, constant, 0))

    def others(self) -> int:
        """How many other processes hold memory of these GPUs.

        In a container the driver may count in other process ids than ours, so it is not our own id that is left out,
        but one process that was not there before.
        """
        count = 0
        for uuid, handle in self._handles.items():
            before, now = self._before.get(uuid, set()), self._processes(handle)
            count += len(now & before) + max(0, len(now - before) - 1)
        return count

    def warnings(self) -> list[str]:
        lines = []
        if self.slowed:
            reasons = ", ".join(f"{name} {count}" for name, count in self.slowed.most_common())
            lines.append(f"the GPU's clock was throttled at the end of some of {self.looks} repetitions: {reasons}")
        if others := self.others():
            processes = "process" if others == 1 else "processes"
            lines.append(f"{others} other {processes} used GPU memory (see which with nvidia-smi)")
        return lines

    def close(self) -> None:
        self._driver.close()
        self._handles = {}

    def _processes(self, handle: Any) -> set[int]:
        return {process.pid for process in self._driver.ask("DeviceGetComputeRunningProcesses", handle) or []}


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


def describe(engine: EngineThread, watch: Watch) -> dict[str, Any]:
    """Hardware and versions. None where something is not there or cannot be read."""
    packages = {name: package_version(name) for name in _PACKAGES}
    return {
        "exl": installed_version(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu(),
        "cpu_cores": usable_cores(),
        "gpu": ", ".join(card.name for card in engine.memory()) or None,
        "gpu_link": watch.link(),
        "driver": watch.driver,
        "cuda": engine.facts.get("cuda"),
        **packages,
        # The engine knows its torch's build as well, "+cpu" or "+cu130".
        "torch": engine.facts.get("torch") or packages["torch"],
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
