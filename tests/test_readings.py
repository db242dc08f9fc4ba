from __future__ import annotations

from types import SimpleNamespace

import pytest

from exl_cli.system.nvml import Driver
from exl_cli.system.readings import DeviceMemory, EnergyMeter


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
