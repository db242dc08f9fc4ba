import os
from types import SimpleNamespace


class OutOfMemoryError(RuntimeError):
    pass


_gpus = [tuple(map(int, text.split("."))) for text in os.environ.get("FAKE_GPUS", "").split(",") if text]


def is_available():
    return bool(_gpus)


def device_count():
    return len(_gpus)


def get_device_capability(index=0):
    return _gpus[index]


def get_device_name(index=0):
    return "Fake GPU"


def get_arch_list():
    return ["sm_75", "sm_80", "sm_90"]


def synchronize(index=0):
    pass


def init():
    if not _gpus:
        raise RuntimeError("Found no NVIDIA driver on your system.")


def get_device_properties(index):
    return SimpleNamespace(name="Fake GPU", major=_gpus[index][0], minor=_gpus[index][1], total_memory=8 * 2**30)
