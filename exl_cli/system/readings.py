"""Memory and GPU readings: the engine's allocator, NVML, and this process's resident set."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exl_cli.system.nvml import Driver, open_driver


@dataclass(frozen=True)
class DeviceMemory:
    """Memory that an engine's allocator has reserved on one GPU.

    Attributes:
        device: torch's device name, such as "cuda:0".
        name: the card's name.
        uuid: of the card or MIG instance, as NVML writes it or without its prefix; empty if unknown.
        current_bytes, peak_bytes: reserved now, and the most since the process started.
    """

    device: str
    name: str
    uuid: str
    current_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class GpuReading:
    """NVML's readings of one GPU, None where unavailable, and the memory that the engine's allocator has reserved.

    For a MIG instance, memory is its own, the temperature is the card's, and power and utilisation are None: NVML
    measures them for whole cards only.

    Attributes:
        device: torch's device name, such as "cuda:0".
        name: the card's name.
        temperature: degrees Celsius.
        power, power_limit: watts.
        used_bytes, total_bytes: memory of the GPU, across all processes.
        utilisation: percent of NVML's last sample period in which a kernel ran.
        process_bytes, process_peak_bytes: reserved by this process, now and at its peak.
    """

    device: str
    name: str | None
    temperature: int | None
    power: float | None
    power_limit: float | None
    used_bytes: int | None
    total_bytes: int | None
    utilisation: int | None
    process_bytes: int
    process_peak_bytes: int


@dataclass(frozen=True)
class HostReading:
    """This process's resident set in bytes, now and at its peak."""

    resident_bytes: int
    peak_bytes: int


def read_host() -> HostReading:
    # ru_maxrss counts bytes on macOS, KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        resident = pages * resource.getpagesize()
        return HostReading(resident, max(peak, resident))
    except (OSError, ValueError, IndexError):
        return HostReading(peak, peak)


def read_gpus(memory: Sequence[DeviceMemory]) -> list[GpuReading]:
    """Read the GPUs that an engine uses. Without NVML only the allocator's numbers are filled in."""
    if not memory:
        return []
    with open_driver() as driver:
        return [_reading(entry, driver) for entry in memory]


def _reading(memory: DeviceMemory, driver: Driver) -> GpuReading:
    handle = driver.handle(memory.uuid)
    if handle is None:
        driver = Driver(None)
    whole = driver.ask("DeviceGetMemoryInfo", handle)
    power, limit = (driver.ask(f"DeviceGet{what}", handle) for what in ("PowerUsage", "EnforcedPowerLimit"))
    load = driver.ask("DeviceGetUtilizationRates", handle)
    return GpuReading(
        device=memory.device,
        name=memory.name,
        temperature=driver.ask("DeviceGetTemperature", driver.card(handle), 0),  # 0: NVML_TEMPERATURE_GPU
        power=None if power is None else power / 1000,  # NVML reports milliwatts
        power_limit=None if limit is None else limit / 1000,
        used_bytes=whole and int(whole.used),
        total_bytes=whole and int(whole.total),
        utilisation=load and load.gpu,
        process_bytes=memory.current_bytes,
        process_peak_bytes=memory.peak_bytes,
    )


class EnergyMeter:
    """Measures the energy that GPUs use from now on, across all processes.

    Args:
        memory: an engine's memory, which names its GPUs.
        driver: owned by this object; None to open it.
    """

    def __init__(self, memory: Sequence[DeviceMemory], driver: Driver | None = None) -> None:
        self._driver = driver or (open_driver() if memory else Driver(None))
        self._handles = self._driver.handles(entry.uuid for entry in memory)
        self._start = self._driver.joules(self._handles.values())

    def joules(self) -> float | None:
        """Joules so far; None without GPUs, or if one does not report its energy."""
        now = self._driver.joules(self._handles.values())
        return None if now is None or self._start is None else now - self._start

    def close(self) -> None:
        """Shut NVML down."""
        self._driver.close()
        self._handles = {}
