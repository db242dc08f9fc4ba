from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakecuda import HAS_COMPILERS

from exl_cli.models import memory
from exl_cli.system.nvml import Driver
from exl_cli.system.readings import DeviceMemory, EnergyMeter, read_gpus
from exl_cli.system.units import GIB


@pytest.mark.parametrize(
    ("uuids", "taken"), [(["GPU-1", "GPU-2"], 3.0), (["GPU-1", "withheld"], None), ([""], None), ([], None)]
)
def test_energy_is_counted_from_the_beginning_over_all_gpus(uuids: list[str], taken: float | None) -> None:
    counters = {"GPU-1": 7_000, "GPU-2": 5_000}  # NVML's unit is the millijoule
    nvml = SimpleNamespace(
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=counters.__getitem__,
        nvmlShutdown=lambda: None,
    )
    meter = EnergyMeter([DeviceMemory("cuda:0", "a card", uuid, 0, 0) for uuid in uuids], Driver(nvml))
    counters["GPU-1"] += 1_000
    counters["GPU-2"] += 2_000
    assert meter.joules() == taken
    meter.close()


# The CUDA driver of a machine with two cards, of which it puts the second on the bus first. CUDA_VISIBLE_DEVICES
# chooses one of them.
_LIBCUDA = r"""
#include <stdlib.h>
#include <string.h>

static const char *visible(void) { return getenv("CUDA_VISIBLE_DEVICES"); }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = visible() ? 1 : 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = visible() ? atoi(visible()) : index; return 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { memset(uuid, device ? 0xaa : 0xbb, 16); return 0; }
"""
_ON_THE_BUS = {f"GPU-{digit * 8}-{digit * 4}-{digit * 4}-{digit * 4}-{digit * 12}": digit for digit in "ab"}


@pytest.fixture
def unequal_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small card in the first slot, and a fast one with 80 GiB in the second, as NVML reports them."""
    sizes = {"a": 6 * GIB, "b": 80 * GIB}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(_ON_THE_BUS),
        nvmlDeviceGetHandleByIndex=list(_ON_THE_BUS.values()).__getitem__,
        nvmlDeviceGetHandleByUUID=_ON_THE_BUS.__getitem__,
        nvmlDeviceGetUUID={handle: uuid for uuid, handle in _ON_THE_BUS.items()}.__getitem__,
        nvmlDeviceGetName="card {}".format,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=sizes[handle], free=sizes[handle]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


@pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C compiler here")
@pytest.mark.usefixtures("unequal_cards")
def test_gpus_are_in_the_order_of_cuda_not_of_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuda.c").write_text(_LIBCUDA)
    subprocess.run(["cc", "-shared", "-fPIC", "cuda.c", "-o", "libcuda.so.1"], cwd=tmp_path, check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))

    def names(visible: str | None, order: str = "FASTEST_FIRST") -> str:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return ", ".join(gpu.name for gpu in memory.gpus())

    assert names(None) == "card b, card a"
    assert names("1") == "card a"
    assert names(None, "PCI_BUS_ID") == "card a, card b"
    assert names("1", "PCI_BUS_ID") == "card b"


@pytest.mark.usefixtures("unequal_cards")
def test_gpus_are_listed_where_cuda_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-aaaa")
    assert [gpu.name for gpu in memory.gpus()] == ["card b", "card a"]


# A card in two MIG instances: CUDA gives the process the second, by the newer of the two functions for its UUID.
_LIBCUDA_MIG = r"""
#include <string.h>

int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { memset(uuid, 0xaa, 16); return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, 0x22, 16); return 0; }
"""
_INSTANCES = {"MIG-11111111-1111-1111-1111-111111111111": 1, "MIG-22222222-2222-2222-2222-222222222222": 2}


@pytest.fixture
def partitioned_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NVML with a card in two MIG instances, of 10 and 20 GiB; returns where the loader looks for libcuda."""
    uuids = {"GPU-aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa": 0, **_INSTANCES}
    of_cards_only = {0: 61}.__getitem__  # KeyError, as NVML raises its own errors
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=[0].__getitem__,
        nvmlDeviceGetHandleByUUID=uuids.__getitem__,
        nvmlDeviceGetUUID={handle: uuid for uuid, handle in uuids.items()}.__getitem__,
        nvmlDeviceGetMaxMigDeviceCount=[7].__getitem__,
        nvmlDeviceGetMigDeviceHandleByIndex=lambda card, index: [1, 2][index],
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle={1: 0, 2: 0}.__getitem__,
        nvmlDeviceGetName="part {}".format,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=handle * 10 * GIB, free=0, used=handle * GIB),
        nvmlDeviceGetTemperature=lambda handle, sensor: of_cards_only(handle),
        nvmlDeviceGetPowerUsage=of_cards_only,
        nvmlDeviceGetTotalEnergyConsumption=of_cards_only,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "part"),
    [
        (None, ["part 1"]), ("0", ["part 1"]), ("GPU-aaaa", ["part 1"]), ("MIG-2222", ["part 2"]),
        (", ".join(_INSTANCES), ["part 1"]), ("MIG-3", []), ("", []),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("partitioned_card")
def test_a_process_sees_one_mig_instance(visible: str | None, part: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # NVIDIA, "MIG User Guide", CUDA Device Enumeration. Here CUDA does not answer, and NVML alone must do.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in memory.gpus()] == part


@pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C compiler here")
def test_cuda_tells_which_mig_instance_a_process_gets(partitioned_card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (partitioned_card / "cuda.c").write_text(_LIBCUDA_MIG)
    subprocess.run(["cc", "-shared", "-fPIC", "cuda.c", "-o", "libcuda.so.1"], cwd=partitioned_card, check=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-2222")
    assert [gpu.name for gpu in memory.gpus()] == ["part 2"]


@pytest.mark.usefixtures("partitioned_card")
def test_readings_of_a_mig_instance_leave_out_what_only_cards_measure() -> None:
    used = DeviceMemory("cuda:0", "a card", "22222222-2222-2222-2222-222222222222", 0, 0)
    (reading,) = read_gpus([used])
    assert (reading.used_bytes, reading.total_bytes, reading.temperature) == (2 * GIB, 20 * GIB, 61)
    assert reading.power is reading.utilisation is None
    meter = EnergyMeter([used])
    assert meter.joules() is None
    meter.close()
