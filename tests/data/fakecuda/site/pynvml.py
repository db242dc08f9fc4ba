import os

_gpus = [tuple(map(int, text.split("."))) for text in os.environ.get("FAKE_GPUS", "").split(",") if text]


def nvmlInit():
    if not _gpus:
        raise RuntimeError("Driver Not Loaded")


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(_gpus)


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetCudaComputeCapability(index):
    return _gpus[index]
