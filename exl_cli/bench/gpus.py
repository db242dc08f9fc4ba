"""The GPUs while a benchmark runs, as NVML sees them: energy, clocks held back, memory, other processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# Reasons for a lower clock that change a figure, by the names of NVML's constants, with what to call them.
_REASONS = (
    ("nvmlClocksEventReasonSwPowerCap", "power cap"),
    ("nvmlClocksEventReasonSwThermalSlowdown", "heat"),
    ("nvmlClocksThrottleReasonHwSlowdown", "hardware slowdown"),
    ("nvmlClocksThrottleReasonHwThermalSlowdown", "heat (hardware)"),
    ("nvmlClocksThrottleReasonHwPowerBrakeSlowdown", "power brake"),
)


class Watch:
    """Looks at the GPUs that an engine uses. Everything that a card or driver withholds is None or empty.

    To be made before the engine is loaded: processes that hold GPU memory then belong to others.

    Args:
        nvml: what `exl_cli.nvml.open_driver` gave.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._handles: dict[str, Any] = {}
        self._before = {uuid: self._processes(handle) for uuid, handle in self._all().items()}
        self.driver: str | None = self._ask("nvmlSystemGetDriverVersion")
        self.slowed: Counter[str] = Counter()
        self.looks = 0

    def attach(self, uuids: Sequence[str]) -> None:
        """Look at these GPUs from now on."""
        found = {uuid: self._ask("nvmlDeviceGetHandleByUUID", uuid) for uuid in uuids if uuid}
        self._handles = {uuid: handle for uuid, handle in found.items() if handle is not None}

    def joules(self) -> float | None:
        """Energy that the GPUs have taken since their driver was loaded."""
        readings = [self._ask("nvmlDeviceGetTotalEnergyConsumption", handle) for handle in self._handles.values()]
        return sum(readings) / 1000 if readings and None not in readings else None

    def used_bytes(self) -> int | None:
        """GPU memory in use, by all processes."""
        readings = [self._ask("nvmlDeviceGetMemoryInfo", handle) for handle in self._handles.values()]
        return sum(int(reading.used) for reading in readings) if readings and None not in readings else None

    def look(self) -> None:
        """Note why the clocks are held back at this moment, if they are."""
        reasons = 0
        for handle in self._handles.values():
            reasons |= self._reasons(handle)
        self.looks += 1
        for constant, name in _REASONS:
            bit = getattr(self._nvml, constant, 0)
            if reasons & bit:
                self.slowed[name] += 1

    def others(self) -> int:
        """How many other processes hold memory of these GPUs.

        In a container the driver may count in other process ids than ours, so it is not our own id that is left out,
        but one process that was not there before.
        """
        count = 0
        for uuid, handle in self._handles.items():
            before = self._before.get(uuid, set())
            now = self._processes(handle)
            count += len(now & before) + max(0, len(now - before) - 1)
        return count

    def warnings(self) -> list[str]:
        """What a reader must know of the GPUs."""
        found = []
        if self.slowed:
            reasons = ", ".join(f"{name} {count}" for name, count in self.slowed.most_common())
            found.append(f"the GPU's clock was held back at the end of some of {self.looks} repetitions: {reasons}")
        if others := self.others():
            found.append(
                f"{others} other process{'es' if others > 1 else ''} held memory of the GPU (nvidia-smi shows which)"
            )
        return found

    def close(self) -> None:
        """Done looking."""
        self._ask("nvmlShutdown")
        self._nvml, self._handles = None, {}

    def _all(self) -> dict[str, Any]:
        count = self._ask("nvmlDeviceGetCount") or 0
        handles = [self._ask("nvmlDeviceGetHandleByIndex", index) for index in range(count)]
        return {str(self._ask("nvmlDeviceGetUUID", handle)): handle for handle in handles if handle is not None}

    def _processes(self, handle: Any) -> set[int]:
        found = self._ask("nvmlDeviceGetComputeRunningProcesses", handle) or []
        return {process.pid for process in found}

    def _reasons(self, handle: Any) -> int:
        # Renamed with driver 535; an older driver knows the older name only.
        found = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if found is None:
            found = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return int(found or 0)

    def _ask(self, name: str, *arguments: Any) -> Any:
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, name)(*arguments)
        except Exception:  # a card, driver or container may withhold any single answer
            return None
