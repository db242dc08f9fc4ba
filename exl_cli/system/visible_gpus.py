"""The GPUs that CUDA gives a process, in CUDA's order, as NVML handles.

NVML numbers GPUs by PCI bus id. CUDA puts the fastest first, unless CUDA_DEVICE_ORDER is PCI_BUS_ID, and
CUDA_VISIBLE_DEVICES counts in CUDA's order. The two agree where all cards are alike; elsewhere the CUDA driver is asked
for UUIDs, in a child process: a process that has initialised CUDA cannot fork children that use it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from exl_cli.system import questions
from exl_cli.system.nvml import Driver

_SECONDS = 20.0
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def visible_gpus(driver: Driver) -> list[Any]:
    """NVML handles of the GPUs that a new process would see; index `i` is CUDA's device `i`."""
    handles = driver.gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    alike = len({str(driver.ask("DeviceGetName", handle)) for handle in handles}) <= 1
    if not by_bus and not alike and chosen != "":
        installed = tuple(str(driver.ask("DeviceGetUUID", handle)) for handle in handles)
        if (uuids := _ask_cuda(chosen, installed)) is not None:
            return list(driver.handles(uuids).values())
    return handles if chosen is None else _chosen(driver, handles, chosen)


def _chosen(driver: Driver, handles: list[Any], chosen: str) -> list[Any]:
    """Apply CUDA_VISIBLE_DEVICES, which lists indices or prefixes of UUIDs."""
    visible = []
    for entry in map(str.strip, chosen.split(",")):
        if entry.isdigit() and int(entry) < len(handles):
            visible.append(handles[int(entry)])
        else:
            visible += [h for h in handles if entry and str(driver.ask("DeviceGetUUID", h)).startswith(entry)][:1]
    return visible


@functools.lru_cache(maxsize=8)
def _ask_cuda(chosen: str | None, installed: tuple[str, ...]) -> list[str] | None:
    """UUIDs in CUDA's order; None if CUDA does not answer."""
    answer = questions.ask(__name__, "cuda_uuids", _SECONDS)
    return None if answer.value is None else list(answer.value["uuids"])


def cuda_uuids() -> dict[str, list[str]]:
    """UUIDs of the GPUs that this process sees, from the CUDA driver; called in a child process."""
    import ctypes
    import uuid

    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        if status := getattr(cuda, name)(*arguments):
            raise OSError(f"{name} failed with CUDA error {status}")

    if (status := cuda.cuInit(0)) == _NO_DEVICE:
        return {"uuids": []}
    if status:
        raise OSError(f"cuInit failed with CUDA error {status}")
    count, device, raw = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    call("cuDeviceGetCount", ctypes.byref(count))
    uuids = []
    for index in range(count.value):
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetUuid", raw, device)
        uuids.append(f"GPU-{uuid.UUID(bytes=bytes(raw))}")
    return {"uuids": uuids}


if __name__ == "__main__":
    questions.answer(globals())
