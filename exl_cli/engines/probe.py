"""What a device can do: how fast it reads memory and multiplies matrices, and how long it computes.

Measured with torch, in the process and on the device that are being benchmarked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_LARGEST_BUFFER = 2**30
_SMALLEST_BUFFER = 2**20
_ROUND_SECONDS = 0.03
_MOST_ROUNDS, _CALM_ROUNDS = 40, 3


def bandwidth(device: str, size: int) -> tuple[float, int]:
    """How fast a device goes through a buffer.

    The better of two ways: a sum over it, and a copy of one half to the other (which counts both). Buffers that fit
    into a cache are as fast as the cache is, as the weights of a model of that size would be.

    Args:
        device: torch's name for it.
        size: bytes of the buffer; at most 1 GiB are used.

    Returns:
        Bytes per second, and the bytes of the buffer.

    Raises:
        RuntimeError: no memory for the buffer (torch.cuda.OutOfMemoryError on a GPU).
    """
    words = min(max(size, _SMALLEST_BUFFER), _LARGEST_BUFFER) // 8 * 2
    buffer = torch.ones(words, dtype=torch.float32, device=device)
    first, second = buffer[: words // 2], buffer[words // 2 :]
    best = max(_rate(lambda: buffer.sum(), device), _rate(lambda: second.copy_(first), device))
    return best * 4 * words, 4 * words


def matrix_rate(device: str, dtype: str) -> float:
    """Multiplications and additions per second of a square matrix product: 8,192 rows on a GPU, 1,024 on a CPU.

    Raises:
        RuntimeError: no memory for the matrices (torch.cuda.OutOfMemoryError on a GPU).
    """
    rows = 1024 if device == "cpu" else 8192
    kind = getattr(torch, dtype)
    # Random numbers: a GPU takes less power for zeros, and clocks higher than it could with a model.
    left, right = (torch.randn(rows, rows, device=device, dtype=kind) for _ in range(2))
    return _rate(lambda: torch.matmul(left, right), device) * 2 * rows**3


def _rate(work: Callable[[], Any], device: str) -> float:
    """Calls per second in the best round: whatever disturbs a round only makes it slower, so it goes on until three in
    a row have brought nothing better.
    """
    synchronize: Callable[[], Any] = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    with torch.inference_mode():
        work()
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        calls = max(1, int(_ROUND_SECONDS / max(time.perf_counter() - start, 1e-9)))
        best, calm = 0.0, 0
        for _ in range(_MOST_ROUNDS):
            start = time.perf_counter()
            for _ in range(calls):
                work()
            synchronize()
            rate = calls / (time.perf_counter() - start)
            calm = 0 if rate > 1.01 * best else calm + 1
            best = max(best, rate)
            if calm == _CALM_ROUNDS:
                break
    return best


class KernelClock:
    """How long the GPUs compute between `start` and `stop`, by torch's profiler; it slows the CPU down meanwhile."""

    def __init__(self) -> None:
        self._profiler: Any = None

    def start(self) -> None:
        """Begin. Where the GPU cannot be traced, `stop` gives None."""
        try:
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        except (RuntimeError, AssertionError):
            self._profiler = None

    def stop(self) -> tuple[float, int] | None:
        """Seconds in which at least one kernel or copy ran, and how many there were."""
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
