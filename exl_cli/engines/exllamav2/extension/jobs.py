"""How many compilers at once, and how long a build takes.

The figures are those of one build of exllamav2 0.3.2 for one architecture on one core (torch 2.11, nvcc 13.0, g++ 12,
November 2026): 48 files, 645 seconds of CPU time. A C++ file that includes torch's headers takes 18 seconds and 1.6 GiB
(the bindings 26 and 2.1), a CUDA file 7 seconds and 0.6 GiB, the EXL2 kernels 23 or 44 seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from exl_cli.system.machine import available_memory, usable_cores
from exl_cli.system.units import GIB, gib

PER_JOB_BYTES = round(1.7 * GIB)
_KEPT_FREE = GIB

# Seconds that the worker's small file took on the same core: it tells how other machines compare.
SMALLEST_SECONDS = 1.0
# Cores that share their parts, as most do, are together slower than so many times one.
_SHARED = 1.4


@dataclass(frozen=True)
class Plan:
    """How much is compiled at once.

    Attributes:
        jobs: compilers at once.
        reason: what limits it, in a few words.
    """

    jobs: int
    reason: str

    def __str__(self) -> str:
        return f"{self.jobs} job{'s' if self.jobs > 1 else ''} ({self.reason})"


def plan(asked: int | None = None) -> Plan:
    """As many jobs as there are cores and memory for.

    Args:
        asked: a number that the user gave; else MAX_JOBS counts, as it does for torch.
    """
    if asked:
        return Plan(asked, "as asked")
    if (variable := os.environ.get("MAX_JOBS", "")).isdigit() and int(variable):
        return Plan(int(variable), "MAX_JOBS")
    cores, free = usable_cores(), available_memory()
    by_memory = cores if free is None else max(1, (free - _KEPT_FREE) // PER_JOB_BYTES)
    if by_memory < cores:
        return Plan(int(by_memory), f"{gib(free or 0)} of memory are free")
    return Plan(cores, f"{cores} core{'s' if cores > 1 else ''}")


def weight(name: str, architectures: int = 1) -> float:
    """CPU seconds that a file takes to make, about, for so many GPU architectures."""
    if "unit_exl2" in name:
        return 4.0 + (40.0 if re.search(r"\db\.", name) else 19.0) * architectures
    if ".cu" in name:
        return 5.0 + 2.0 * architectures
    if name.endswith(".so"):
        return 1.0
    return 18.0 if name.startswith(("ext_", "quantize_func")) else 2.0


def expected_seconds(names: Iterable[str], jobs: int, architectures: int = 1, slower: float = 1.0) -> float:
    """How long these files take, about: the work shared out, and the longest of them at least.

    Args:
        names: the files to make.
        jobs: how many at once.
        architectures: for so many GPU architectures.
        slower: how many times as long as on the figures' machine the small file took here.
    """
    weights = [weight(name, architectures) for name in names]
    pace = slower * (_SHARED if jobs > 1 else 1.0)
    return pace * max([sum(weights) / max(jobs, 1), *weights, 0.0])


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
        done, total: files compiled, and in all; the link counts as one.
        seconds: since the first was begun.
        left: seconds that the rest will take, about; None before that can be told.
        name: the file that was finished last.
    """

    done: int
    total: int
    seconds: float
    left: float | None
    name: str = ""


def remaining(done: Iterable[str], waiting: Iterable[str], seconds: float, jobs: int, archs: int) -> float | None:
    """Seconds that the rest will take, from the pace so far; None before anything is done."""
    finished = sum(weight(name, archs) for name in done)
    if not finished:
        return None
    rest = list(waiting)
    pace = seconds / finished
    # Towards the end fewer files than jobs are left: the pace falls to that of a single file.
    return max([pace * sum(weight(name, archs) for name in rest), *(pace * jobs * weight(n, archs) / 2 for n in rest)])
