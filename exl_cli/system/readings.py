"""Memory and device readings, in numbers: what the engine says of itself and what the driver says of the card."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exl_cli.system.nvml import open_driver


@dataclass(frozen=True)
class DeviceMemory:
    """What an engine's allocator holds on one GPU.

    Attributes:
        device: torch's name for it, e.g. "cuda:0".
        name: the card's name.
        uuid: NVML's identifier of the card; empty where unknown.
        current_bytes, peak_bytes: reserved by this process, now and at most since it started.
    """

    device: str
    name: str
    uuid: str
    current_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class GpuReading:
    """One GPU as NVML sees it, and this process's share as the engine sees it. None where it cannot be read.

    Attributes:
        device: torch's name for it, e.g. "cuda:0".
        name: the card's name.
        temperature: degrees Celsius.
        power, power_limit: watts.
        used_bytes, total_bytes: memory of the whole card, all processes.
        utilisation: percent of the last sample period in which a kernel ran.
        process_bytes, process_peak_bytes: memory reserved by this process, now and at most.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class HostReading:
    """This process's memory on the host.

    Attributes:
        resident_bytes, peak_bytes: resident set, now and at most.
    """

    resident_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def read_host() -> HostReading:
    """This process's resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        resident = pages * resource.getpagesize()
        return HostReading(resident, max(peak, resident))
    except (OSError, ValueError, IndexError):
        return HostReading(peak, peak)


def read_gpus(memory: Sequence[DeviceMemory]) -> list[GpuReading]:
    """Readings of the GPUs that an engine uses; without a working NVML only the engine's own numbers are there."""
    if not memory:
        return []
    nvml = open_driver()
    try:
        return [_reading(entry, nvml) for entry in memory]
    finally:
        if nvml is not None:
            nvml.nvmlShutdown()


def _reading(memory: DeviceMemory, nvml: Any) -> GpuReading:
    handle = None
    if nvml is not None and memory.uuid:
        handle = _ask(lambda: nvml.nvmlDeviceGetHandleByUUID(memory.uuid))
    if handle is None:
        return GpuReading(
            memory.device, memory.name, None, None, None, None, None, None, memory.current_bytes, memory.peak_bytes
        )
    whole = _ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    power = _ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    limit = _ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    return GpuReading(
        device=memory.device,
        name=memory.name,
        temperature=_ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power=None if power is None else power / 1000,
        power_limit=None if limit is None else limit / 1000,
        used_bytes=None if whole is None else int(whole.used),
        total_bytes=None if whole is None else int(whole.total),
        utilisation=_ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        process_bytes=memory.current_bytes,
        process_peak_bytes=memory.peak_bytes,
    )


def _ask(question: Any) -> Any:
    """NVML's answer, or None: a card, driver or container may withhold any single reading."""
    try:
        return question()
    except Exception:
        return None
