"""Which layout of a product is fastest on this GPU: measured once for each shape, and remembered.

What was measured is kept in the user's cache folder, for each GPU by name, under the shape and the kernels' source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

from exl_cli.engines.exllamav2.kernels import compiler, products
from exl_cli.engines.exllamav2.kernels.compiler import Kernel, Launch
from exl_cli.engines.exllamav2.kernels.matrices import QuantizedMatrix
from exl_cli.errors import EngineError
from exl_cli.storage import user_cache, write_atomically

# Enough matrices, one after the other, that none is still in the second-level cache when its turn comes again.
_MORE_THAN_CACHED = 200 << 20
_REPEATS = 4
# Smaller matrices take as long as a launch, however they are divided.
_WORTH_MEASURING = 1 << 20


class Tuner:
    """Chooses layouts on one device.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._device = device
        self._shared_bytes = int(
            getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        )
        name = "".join(c if c.isalnum() else "-" for c in properties.name)
        self._path = user_cache() / "kernels" / f"layouts-{name}.json"

    def layout(
        self, groups: Sequence[Sequence[QuantizedMatrix]], rows: int, *, paired: bool = False, two_xs: bool = True
    ) -> products.Layout:
        """The fastest layout for matrices that one launch takes together.

        Args:
            groups: the matrices of every layer, all of the same kinds.
            rows: of the input; all numbers of rows that share a build share the result.
            paired, two_xs: see `products.variant`.

        Raises:
            EngineError: no layout can be built or run here.
        """
        first = groups[0]
        rows = products.most_rows(rows)
        builds = {}
        for layout in products.layouts(rows):
            variant = products.variant(first, rows, layout, paired=paired, two_xs=two_xs)
            if variant.shared_bytes <= self._shared_bytes:
                builds[layout] = variant
        if not builds:
            raise EngineError("this GPU has too little shared memory for the kernels")
        if sum(matrix.bytes for matrix in first) < _WORTH_MEASURING:
            return next(iter(builds))
        key = json.dumps([_source_key(), [matrix.kind for matrix in first], rows, paired, two_xs])
        known = self._read()
        with contextlib.suppress(KeyError, TypeError, ValueError):
            warps, stages = known[key]["layout"]
            return products.Layout(int(warps), int(stages))
        times = self._measure(groups, rows, builds, paired=paired)
        best = min(times, key=lambda layout: times[layout])
        known[key] = {
            "layout": [best.warps, best.stages],
            "microseconds": {f"{x.warps}/{x.stages}": round(t, 2) for x, t in times.items()},
        }
        with contextlib.suppress(OSError):  # measured again next time, then
            write_atomically(self._path, json.dumps(known, indent=1) + "\n")
        return best

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _measure(
        self,
        groups: Sequence[Sequence[QuantizedMatrix]],
        rows: int,
        builds: Mapping[products.Layout, products.Variant],
        *,
        paired: bool,
    ) -> dict[products.Layout, float]:
        """Microseconds of a launch, for every layout."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda v: compiler.compile_ahead(products.FILE, v.defines, self._device), builds.values()))
        x = torch.randn((rows, groups[0][0].k), device=self._device).half()
        outs = [torch.empty((rows, m.n), dtype=torch.half, device=self._device) for m in groups[0]]
        count = -(-_MORE_THAN_CACHED // sum(m.bytes for m in groups[0]))
        used = [groups[index % len(groups)] for index in range(min(count, max(len(groups), 8)))]
        times = {}
        for layout, variant in builds.items():
            kernel = Kernel(products.FILE, products.NAME, variant.defines, self._device, variant.shared_bytes)
            launches = []
            for matrices in used:
                argument = products.argument(matrices, rows)
                products.connect(argument, [x] * len(outs), outs)
                grid = (products.blocks(matrices, paired=paired),)
                launches.append(kernel.bind(grid, 32 * layout.warps, argument))
            times[layout] = _microseconds(launches) / len(used)
        return times


@lru_cache
def _source_key() -> str:
    return hashlib.sha256(compiler.source(products.FILE).encode()).hexdigest()[:12]


def _microseconds(launches: Sequence[Launch]) -> float:
    """The least time that they took in a few runs, in a graph, so that launching takes no part in it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch(stream.cuda_stream)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for launch in launches:
                launch(stream.cuda_stream)
        finally:
            graph.capture_end()
        times = []
        for _ in range(_REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) * 1000)
    return min(times)
