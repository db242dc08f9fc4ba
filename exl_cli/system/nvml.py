"""NVML, the NVIDIA driver's own interface, where there is a driver."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Driver:
    """The driver's answers; None for each that it, a card or a container withholds, and for all without a driver.

    Args:
        nvml: the `pynvml` module, initialised; None where there is no driver.
    """

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml

    def ask(self, name: str, *arguments: Any) -> Any:
        """What one of NVML's functions answers, "DeviceGetName" for `nvmlDeviceGetName`."""
        try:
            return getattr(self.nvml, f"nvml{name}")(*arguments)
        except Exception:
            return None

    def gpus(self) -> list[Any]:
        """The handles of all GPUs, hidden ones included."""
        handles = [self.ask("DeviceGetHandleByIndex", index) for index in range(self.ask("DeviceGetCount") or 0)]
        return [handle for handle in handles if handle is not None]

    def handles(self, uuids: Iterable[str]) -> dict[str, Any]:
        """The handles of these GPUs, of those that the driver knows."""
        handles = {uuid: self.ask("DeviceGetHandleByUUID", uuid) for uuid in uuids if uuid}
        return {uuid: handle for uuid, handle in handles.items() if handle is not None}

    def joules(self, handles: Iterable[Any]) -> float | None:
        """Energy that these GPUs have taken since their driver was loaded; None where one withholds it."""
        readings = [self.ask("DeviceGetTotalEnergyConsumption", handle) for handle in handles]
        return sum(readings) / 1000 if readings and None not in readings else None

    def close(self) -> None:
        """No more questions."""
        self.ask("Shutdown")
        self.nvml = None

    def __bool__(self) -> bool:
        return self.nvml is not None

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_driver() -> Driver:
    """The driver of this machine; close it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, or a container without it
        return Driver(None)
    return Driver(pynvml)
