"""The GPUs that CUDA gives a process, in CUDA's order, as NVML handles.

NVML numbers GPUs by PCI bus id. CUDA puts the fastest first, unless CUDA_DEVICE_ORDER is PCI_BUS_ID, and
CUDA_VISIBLE_DEVICES counts in CUDA's order. The two agree where all cards are alike; elsewhere the CUDA driver is asked
for UUIDs, in a child process: a process that has initialised CUDA cannot fork children that use it. The same where a
card is partitioned: which of its MIG instances a process gets depends on the driver's version.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

from exl_cli.system import questions
from exl_cli.system.nvml import Driver

_SECONDS = 20.0
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def visible_gpus(driver: Driver) -> list[Any]:
    """NVML handles of the GPUs or MIG instances that a new process would see; index `i` is CUDA's device `i`."""
    handles = driver.gpus()
    instances = [instance for gpu in handles for instance in driver.instances(gpu)]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    alike = len({str(driver.ask("DeviceGetName", handle)) for handle in handles}) <= 1
    if chosen != "" and (instances or not (by_bus or alike)):
        installed = tuple(str(driver.ask("DeviceGetUUID", handle)) for handle in (*handles, *instances))
        if (uuids := _ask_cuda(chosen, installed)) is not None:
            return list(driver.handles(uuids).values())
    visible = handles if chosen is None else _chosen(driver, handles, instances, chosen)
    # CUDA gives a process one MIG instance, and no other GPU with it (NVIDIA, "MIG User Guide").
    partitioned = [[gpu] if gpu in instances else driver.instances(gpu) for gpu in visible]
    return list(itertools.chain.from_iterable(partitioned))[:1] or visible


def _chosen(driver: Driver, handles: list[Any], instances: list[Any], chosen: str) -> list[Any]:
    """Apply CUDA_VISIBLE_DEVICES, which lists indices or prefixes of UUIDs."""
    visible = []
    for entry in map(str.strip, chosen.split(",")):
        if entry.isdigit() and int(entry) < len(handles):
            visible.append(handles[int(entry)])
        elif entry:
            named = (h for h in (*handles, *instances) if str(driver.ask("DeviceGetUUID", h)).startswith(entry))
            visible += list(named)[:1]
    return visible


@functools.lru_cache(maxsize=8)
def _ask_cuda(chosen: str | None, installed: tuple[str, ...]) -> list[str] | None:
    """UUIDs in CUDA's order; None if CUDA does not answer."""
    answer = questions.ask(__name__, "cuda_uuids", _SECONDS)
    return None if answer.value is None else list(answer.value["uuids"])


def cuda_uuids() -> dict[str, list[str]]:
    """UUIDs of the GPUs or MIG instances that this process sees, without NVML's prefix; asked in a child process.

    Raises:
        OSError: there is no CUDA driver, or it fails.
    """
    import ctypes
    import uuid

    cuda = ctypes.CDLL("libcuda.so.1")

    def call(function: Any, *arguments: Any) -> None:
        if status := function(*arguments):
            raise OSError(f"{function.__name__} failed with CUDA error {status}")

    if (status := cuda.cuInit(0)) == _NO_DEVICE:
        return {"uuids": []}
    if status:
        raise OSError(f"cuInit failed with CUDA error {status}")
    # The first version gives the card's UUID for an instance. Drivers before CUDA 11.4 have no other.
    get_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
    count, device, raw = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    call(cuda.cuDeviceGetCount, ctypes.byref(count))
    uuids = []
    for index in range(count.value):
        call(cuda.cuDeviceGet, ctypes.byref(device), index)
        call(get_uuid, raw, device)
        uuids.append(str(uuid.UUID(bytes=bytes(raw))))
    return {"uuids": uuids}


@functools.cache
def own_uuids() -> tuple[str, ...]:
    """UUIDs of this process's CUDA devices, as `cuda_uuids`; empty if the driver does not tell. Initialises CUDA."""
    try:
        return tuple(cuda_uuids()["uuids"])
    except (OSError, AttributeError):
        return ()


if __name__ == "__main__":
    questions.answer(globals())
