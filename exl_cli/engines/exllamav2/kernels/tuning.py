"""Which layout of a product is fastest on this GPU: measured once for each shape, and remembered.

What was measured is kept in the user's cache folder, for each GPU by name, under the shape and the kernels' source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import lru_cache
from typing import Any

import torch

from exl_cli.engines.exllamav2.kernels import compiler, products
from exl_cli.engines.exllamav2.kernels.compiler import Kernel, Launch
from exl_cli.engines.exllamav2.kernels.products import Product
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

    def microseconds(self, product: Product, rows: int) -> float | None:
        """Of a launch in the layout that `layout` chose; None where it measured nothing."""
        found = self._read().get(_key(product, products.most_rows(rows)), {})
        times = found.get("microseconds") if isinstance(found, dict) else None
        return min(times.values()) if times else None

    def original(self, product: Product, make: Callable[[], Sequence[Callable[[], None]]]) -> float:
        """Microseconds that exllamav2's kernels take for a row of what such a product computes.

        Args:
            product: one of its kind.
            make: called where that is not known yet; gives what has exllamav2 compute it, for every layer.
        """
        known, key = self._read(), json.dumps(["exllamav2", product.kind])
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return float(known[key])
        works = make()
        found = _microseconds(works) / len(works)
        self._write({**known, key: round(found, 2)})
        return found

    def layout(self, alike: Sequence[Product], rows: int) -> products.Layout:
        """The fastest layout for products of one kind.

        Args:
            alike: those of every layer.
            rows: of the input; all numbers of rows that share a build share the result.

        Raises:
            EngineError: no layout can be built or run here.
        """
        first = alike[0]
        rows = products.most_rows(rows)
        builds = {}
        for layout in products.layouts(rows):
            variant = products.variant(first, rows, layout)
            if first.blocks(layout) and variant.shared_bytes <= self._shared_bytes:
                builds[layout] = variant
        if not builds:
            raise EngineError("this GPU has too little shared memory for the kernels")
        if first.bytes < _WORTH_MEASURING:
            return next(iter(builds))
        key = _key(first, rows)
        known = self._read()
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return products.Layout(*(int(size) for size in known[key]["layout"]))
        times = self._measure(alike, rows, builds)
        best = min(times, key=lambda layout: times[layout])
        known[key] = {
            "layout": astuple(best),
            "microseconds": {"/".join(map(str, astuple(layout))): round(t, 2) for layout, t in times.items()},
        }
        self._write(known)
        return best

    def _write(self, known: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # measured again next time, then
            write_atomically(self._path, json.dumps(known, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _measure(
        self, alike: Sequence[Product], rows: int, builds: Mapping[products.Layout, products.Variant]
    ) -> dict[products.Layout, float]:
        """Microseconds of a launch, for every layout."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda v: compiler.compile_ahead(products.FILE, v.defines, self._device), builds.values()))
        matrices = alike[0].matrices
        x = torch.randn((rows, matrices[0].k), device=self._device).half()
        outs = [torch.empty((rows, m.n), dtype=torch.half, device=self._device) for m in matrices]
        count = -(-_MORE_THAN_CACHED // alike[0].bytes)
        used = [alike[index % len(alike)] for index in range(min(count, max(len(alike), 8)))]
        times = {}
        for layout, variant in builds.items():
            kernel = Kernel(products.FILE, products.NAME, variant.defines, self._device, variant.shared_bytes)
            launches = []
            for product in used:
                argument = products.argument(product, rows)
                products.connect(argument, [x] * len(outs), outs)
                launches.append(_on_current_stream(kernel.bind((product.blocks(layout),), 32 * layout.warps, argument)))
            times[layout] = _microseconds(launches) / len(used)
        return times


def _on_current_stream(launch: Launch) -> Callable[[], None]:
    return lambda: launch(torch.cuda.current_stream().cuda_stream)


def _key(product: Product, rows: int) -> str:
    return json.dumps([_source_key(), product.kind, rows])


@lru_cache
def _source_key() -> str:
    return hashlib.sha256(compiler.source(products.FILE).encode()).hexdigest()[:12]


def _microseconds(works: Sequence[Callable[[], None]]) -> float:
    """The least time that they took in a few runs, in a graph, so that launching takes no part in it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for work in works:
                work()
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
