"""Measure a device with torch: memory bandwidth, matrix throughput, and busy time of the GPUs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

_LARGEST_BUFFER = 2**30
_SMALLEST_BUFFER = 2**20
_ROUND_SECONDS = 0.03
_MAX_ROUNDS, _PATIENCE = 40, 3


@functools.cache
def bandwidth(device: str, size: int) -> tuple[float, int]:
    """Measure memory bandwidth: the better of a sum over a buffer and a copy from one half to the other.

    Measured once in a process. A buffer that fits into a cache measures the cache, which is what a model of that size
    would see too.

    Args:
        device: torch's device name.
        size: bytes of the buffer, between 1 MiB and 1 GiB.

    Returns:
        Bytes per second (a copy counts reads and writes), and the bytes of the buffer used.

    Raises:
        RuntimeError: out of memory (torch.cuda.OutOfMemoryError on a GPU).
    """
    words = min(max(size, _SMALLEST_BUFFER), _LARGEST_BUFFER) // 8 * 2
    buffer = torch.ones(words, dtype=torch.float32, device=device)
    first, second = buffer[: words // 2], buffer[words // 2 :]
    best = max(_rate(lambda: buffer.sum(), device), _rate(lambda: second.copy_(first), device))
    return best * 4 * words, 4 * words


@functools.cache
def matrix_rate(device: str, dtype: str) -> float:
    """Floating point operations per second of a square matmul, of size 8192 on a GPU and 1024 on a CPU.

    Measured once in a process.

    Raises:
        RuntimeError: out of memory (torch.cuda.OutOfMemoryError on a GPU).
    """
    rows = 1024 if device == "cpu" else 8192
    kind = getattr(torch, dtype)
    # Random data: with zeros a GPU draws less power and clocks higher than it does for a model.
    left, right = (torch.randn(rows, rows, device=device, dtype=kind) for _ in range(2))
    return _rate(lambda: torch.matmul(left, right), device) * 2 * rows**3


def _rate(work: Callable[[], Any], device: str) -> float:
    """Calls per second in the best round. Noise only ever slows a round down, so stop after three without a gain."""
    synchronize: Callable[[], Any] = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    with torch.inference_mode():
        work()
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        calls = max(1, int(_ROUND_SECONDS / max(time.perf_counter() - start, 1e-9)))
        best, without_gain = 0.0, 0
        for _ in range(_MAX_ROUNDS):
            start = time.perf_counter()
            for _ in range(calls):
                work()
            synchronize()
            rate = calls / (time.perf_counter() - start)
            without_gain = 0 if rate > 1.01 * best else without_gain + 1
            best = max(best, rate)
            if without_gain == _PATIENCE:
                break
    return best


class KernelClock:
    """GPU busy time between `start` and `stop`, from torch's profiler, which slows the CPU down."""

    def __init__(self) -> None:
        self._profiler: Any = None

    def start(self) -> None:
        """Start tracing; if the GPU cannot be traced, `stop` returns None."""
        try:
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        except (RuntimeError, AssertionError):
            self._profiler = None

    def stop(self) -> tuple[float, int] | None:
        """Seconds during which at least one kernel or copy ran, and the number of kernels and copies."""
        if self._profiler is None:
            return None
        try:
            torch.cuda.synchronize()
            self._profiler.stop()
            events = self._profiler.events()
        except (RuntimeError, AssertionError):
            return None
        spans = [
            (event.time_range.start, event.time_range.end) for event in events or () if event.device_type.name == "CUDA"
        ]
        return (covered(spans) / 1e6, len(spans)) if spans else None


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
