"""Translate exceptions of exllamav2 and torch into `ExlError`s with a next step."""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from collections.abc import Iterator

import torch

from exl_cli.errors import DamagedModelError, DeviceError, EngineError, OutOfMemoryError, param
from exl_cli.models.info import ModelInfo
from exl_cli.system.units import gib

# No forward pass takes so long, in seconds: a GPU that is still at one hangs.
HANGS_AFTER = 120.0
# Seconds in which a pass may end any moment: until then the wait gives way to other threads, but does not sleep.
_SOON = 0.005

_LESS = f"use {param('cache')} q4, a smaller {param('max_seq_len')} or {param('low_mem')}"

# An exception whose innermost frame is in one of these packages is translated; others are bugs of ours.
_FOREIGN = ("torch", "exllamav2", "safetensors", "triton")
_CUDA_FAILURE = re.compile("CUDA|cuBLAS|cuDNN|NVRTC|NCCL", re.IGNORECASE)


@contextlib.contextmanager
def translated(info: ModelInfo | None = None, context_length: int = 0) -> Iterator[None]:
    """Translate exceptions raised in the block; see `explained`.

    Args:
        info, context_length: what is being loaded; omitted once the model is loaded.
    """
    try:
        yield
    except Exception as error:
        other = explained(error, info, context_length)
        if other is error:
            raise
        raise other from error


def explained(error: Exception, info: ModelInfo | None = None, context_length: int = 0) -> Exception:
    """Translate an exception of torch or exllamav2; return any other unchanged."""
    text = str(error).strip(" #\n") or type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text:
        return _out_of_memory(info, context_length)
    if not _is_foreign(error):
        return error
    if _is_lost():
        return DeviceError(f"the GPU failed: {cause(error)}", "start exl again; check nvidia-smi and dmesg for details")
    if info is not None and not isinstance(error, RuntimeError):
        return DamagedModelError(f"exllamav2 cannot load {info.path}: {text.splitlines()[0]}", f"see {param('debug')}")
    return EngineError(f"exllamav2 failed: {text.splitlines()[0]}", f"run again with {param('debug')} for details")


def _is_foreign(error: Exception) -> bool:
    """Whether it comes from torch or exllamav2: raised in their Python code, or by a CUDA call from ours."""
    if isinstance(error, RuntimeError) and _CUDA_FAILURE.search(str(error)):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] in _FOREIGN


def _is_lost() -> bool:
    """Whether the CUDA context is unusable, as it is after a failed kernel."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def wait(event: torch.cuda.Event) -> None:
    """Wait until the GPU has done what precedes an event.

    Raises:
        DeviceError: that takes more than `HANGS_AFTER` seconds.
    """
    since = time.perf_counter()
    while not event.query():  # type: ignore[no-untyped-call]
        waited = time.perf_counter() - since
        if waited > HANGS_AFTER:
            raise DeviceError(
                f"the GPU hangs: it has not finished a forward pass in {HANGS_AFTER:g} seconds",
                "start exl again; check nvidia-smi and dmesg for details",
            )
        time.sleep(0 if waited < _SOON else 1e-4)


def cause(error: BaseException) -> str:
    """The most informative line of an exception.

    Usually the last one; after a CUDA error, torch appends advice for developers.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("CUDA ")), lines[-1] if lines else type(error).__name__)


def free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def _out_of_memory(info: ModelInfo | None, context_length: int) -> OutOfMemoryError:
    free = [count + torch.cuda.memory_reserved(gpu) for gpu, count in enumerate(free_bytes())]
    have = f"{gib(sum(free))} of GPU memory is free"
    if len(free) > 1:
        have += f" ({', '.join(f'GPU {gpu}: {gib(count)}' for gpu, count in enumerate(free))})"
    if info is None:
        return OutOfMemoryError(f"the GPU ran out of memory; {have}", _LESS)
    need = f"{gib(info.size_bytes)} for its weights, plus memory for a context of {context_length:,} tokens"
    return OutOfMemoryError(
        f"{info.name} needs {need}, but {have}",
        f"{_LESS}, or free GPU memory (see what uses it with nvidia-smi)",
    )
