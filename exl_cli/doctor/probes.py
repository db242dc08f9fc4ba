"""What is asked in child processes; see `child.ask`. Each function is one question and returns JSON-ready facts."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

_MIB = 2**20


def torch() -> dict[str, Any]:
    """Torch, its CUDA, and the GPUs as they are before this process takes any memory of them."""
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "archs": torch.cuda.get_arch_list() if torch.version.cuda else [],
        "gpus": [],
        "why_not": "",
    }
    if not torch.version.cuda:
        return found
    # Before CUDA is touched: then this process is not among those that use it.
    readings = _readings()
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        found["why_not"] = str(error).strip().splitlines()[0]
        return found
    found["gpus"] = [_gpu(index, readings) for index in range(torch.cuda.device_count())]
    return found


def _gpu(index: int, readings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else ""
    gpu = {
        "index": index,
        "name": properties.name,
        "uuid": uuid,
        "capability": [properties.major, properties.minor],
        "total": properties.total_memory,
        "free": None,
        "processes": [],
    }
    return {**gpu, **readings.get(uuid, {})}


def _readings() -> dict[str, dict[str, Any]]:
    """Memory and processes of each GPU, by its UUID, as the driver tells them."""
    from exl_cli.system.nvml import open_driver

    nvml = open_driver()
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(Exception):  # a driver or container may withhold any single answer
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            reading: dict[str, Any] = {"free": int(memory.free), "total": int(memory.total)}
            found[str(nvml.nvmlDeviceGetUUID(handle))] = reading
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            reading["processes"] = [_process(nvml, process) for process in running]
    return found


def _process(nvml: Any, process: Any) -> dict[str, Any]:
    name = ""
    with contextlib.suppress(Exception):
        name = str(nvml.nvmlSystemGetProcessName(process.pid)).rpartition("/")[2].split(" ")[0]
    # A container may have numbers of its own for processes: what the driver calls one is then of no use here.
    return {
        "pid": process.pid,
        "here": os.path.exists(f"/proc/{process.pid}"),  # noqa: PTH110 - a path of the kernel's
        "name": name,
        "bytes": process.usedGpuMemory,
    }


def kernels() -> dict[str, Any]:
    """exl's own decoding kernels, one of them compiled and loaded for each GPU; why not, where that fails."""
    import torch

    from exl_cli.engines.exllamav2.kernels import compiler

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {"why_not": next((reason for device in devices if (reason := compiler.why_not(device))), "")}


def cpu() -> dict[str, Any]:
    """The CPU engine, imported."""
    importlib.import_module("exl_cli.engines.cpu.engine")
    import transformers

    return {"transformers": transformers.__version__}


def extension(library: str, compute: bool) -> dict[str, Any]:
    """exllamav2's compiled extension, loaded and, where a GPU has room, made to compute."""
    from pathlib import Path

    from exl_cli.engines.exllamav2.extension import smoke_test

    module = smoke_test.load(Path(library))
    return {"gpus": smoke_test.compute(module) if compute else []}


def flash_attn() -> dict[str, Any]:
    """flash-attn, imported as exllamav2 imports it."""
    from exl_cli.engines.exllamav2.import_exllamav2 import flash_attn_problem

    return {"problem": flash_attn_problem()}


def triton() -> dict[str, Any]:
    """Triton, imported."""
    import triton

    return {"version": triton.__version__}


def attention() -> dict[str, Any]:
    """What will compute attention, each candidate tried on a small case."""
    from exl_cli.engines.exllamav2.attention.paged import backend

    chosen = backend()
    return {"decode": chosen.decode[0], "prefill": chosen.prefill[0], "why_not": chosen.why_not}


def hub(timeout: float) -> dict[str, Any]:
    """Whether the Hub answers, and who it takes the user for."""
    from huggingface_hub import HfApi, get_session, get_token

    from exl_cli.models.hub.client import Hub

    hub = Hub(timeout=timeout)
    answer = get_session().get(f"{hub.endpoint}/api/models?limit=1", timeout=timeout)
    found: dict[str, Any] = {"endpoint": hub.endpoint, "status": answer.status_code, "token": bool(get_token())}
    if found["token"]:
        try:
            found["user"] = HfApi(hub.endpoint).whoami()["name"]
        except Exception as error:  # refused, expired, or of a service that is not the Hub
            found["refused"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return found


def main() -> None:
    """The child: `NAME ARGUMENTS`, the latter a JSON object."""
    # What libraries print to stdout, from C as well, must not get among the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    questions: dict[str, Callable[..., dict[str, Any]]] = {
        question.__name__: question for question in (torch, cpu, kernels, extension, flash_attn, triton, attention, hub)
    }
    if sys.argv[1] in ("generate", "compare"):
        module = importlib.import_module("exl_cli.doctor.model_probes")
        questions[sys.argv[1]] = getattr(module, sys.argv[1])
    found = questions[sys.argv[1]](**json.loads(sys.argv[2]))
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    # What was asked is answered: nothing that an exit handler does may still change how this ends.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
