"""CPU cores and host memory available to this process, cgroup limits included."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """CPU cores this process may use: its affinity mask, capped by the cgroup v2 quota, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def available_memory() -> int | None:
    """Bytes of host memory that can be allocated without swapping, within the cgroup's limit; None if unknown."""
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    # cgroup v2 and v1. Usage counts the page cache, whose inactive part the kernel reclaims under pressure.
    for limit, used, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            allowed, current = (int((_CGROUP / name).read_text(encoding="ascii")) for name in (limit, used))
            lines = (_CGROUP / stat).read_text(encoding="ascii").splitlines()
            files = next((int(line.split()[1]) for line in lines if line.split()[0] == cached), 0)
            limits.append(allowed - current + files)
    return min(limits) if limits else None
