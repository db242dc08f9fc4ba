"""NVML (NVIDIA's management library) without exceptions: every failed query is None."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# NVML's nvmlGpuP2PCapsIndex_t and nvmlGpuP2PStatus_t.
_READ, _NVLINK, _OK = 0, 2, 0


class Driver:
    """Queries of NVML. Each is None if the driver, the card or the container does not answer it.

    Args:
        nvml: the initialised `pynvml` module, or None without a driver.
    """

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call an NVML function by its name without the prefix: "DeviceGetName" for `nvmlDeviceGetName`."""
        try:
            return getattr(self.nvml, f"nvml{name}")(*arguments)
        except Exception:
            return None

    def gpus(self) -> list[Any]:
        """Handles of all GPUs, including those that CUDA_VISIBLE_DEVICES hides."""
        handles = [self.ask("DeviceGetHandleByIndex", index) for index in range(self.ask("DeviceGetCount") or 0)]
        return [handle for handle in handles if handle is not None]

    def instances(self, gpu: Any) -> list[Any]:
        """Handles of a GPU's MIG instances; empty if MIG is off."""
        most = self.ask("DeviceGetMaxMigDeviceCount", gpu) or 0
        handles = [self.ask("DeviceGetMigDeviceHandleByIndex", gpu, index) for index in range(most)]
        return [handle for handle in handles if handle is not None]

    def devices(self) -> list[Any]:
        """Handles of all GPUs and MIG instances."""
        return [handle for gpu in self.gpus() for handle in (gpu, *self.instances(gpu))]

    def card(self, handle: Any) -> Any:
        """The GPU that a MIG instance is part of; GPUs are returned as they are."""
        gpu = self.ask("DeviceGetDeviceHandleFromMigDeviceHandle", handle)
        return handle if gpu is None else gpu

    def handle(self, uuid: str) -> Any:
        """Handle of the GPU or MIG instance with this UUID, as NVML writes it or, without the prefix, as CUDA does."""
        names = (uuid, f"GPU-{uuid}", f"MIG-{uuid}") if uuid else ()
        return next((handle for name in names if (handle := self.ask("DeviceGetHandleByUUID", name)) is not None), None)

    def handles(self, uuids: Iterable[str]) -> dict[str, Any]:
        """UUID to handle, without UUIDs that the driver does not know."""
        handles = {uuid: self.handle(uuid) for uuid in uuids}
        return {uuid: handle for uuid, handle in handles.items() if handle is not None}

    def joules(self, handles: Iterable[Any]) -> float | None:
        """Total energy of these GPUs in joules since their driver was loaded; None if one does not report it.

        MIG instances never do: only the whole card's energy is measured.
        """
        readings = [self.ask("DeviceGetTotalEnergyConsumption", handle) for handle in handles]
        return sum(readings) / 1000 if readings and None not in readings else None

    def link(self, first: Any, second: Any) -> str | None:
        """How memory is copied between two GPUs: "NVLink", "PCIe", or "PCIe, through host memory"; None if unknown."""
        nvlink, read = (self.ask("DeviceGetP2PStatus", first, second, kind) for kind in (_NVLINK, _READ))
        if nvlink is None and read is None:
            return None
        return "NVLink" if nvlink == _OK else "PCIe" if read == _OK else "PCIe, through host memory"

    def close(self) -> None:
        """Shut NVML down; later queries are None."""
        self.ask("Shutdown")
        self.nvml = None

    def __bool__(self) -> bool:
        return self.nvml is not None

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_driver() -> Driver:
    """Initialise NVML. The caller closes it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, or a container without it
        return Driver(None)
    return Driver(pynvml)
