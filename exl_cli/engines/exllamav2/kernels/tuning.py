"""Which tile of a product is fastest on this GPU: measured once for each shape, and remembered.

What was measured is kept in the user's cache folder, for each GPU by name, under the shape and the kernels' source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from functools import lru_cache, partial
from typing import Any

import torch

from exl_cli.engines.exllamav2.graphs import captured
from exl_cli.engines.exllamav2.kernels import compiler, quantized_linear
from exl_cli.engines.exllamav2.kernels.compiler import Kernel, Launch
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product
from exl_cli.errors import EngineError
from exl_cli.system.files import user_cache, write_atomically

# Enough matrices, one after the other, that none is still in the second-level cache when its turn comes again.
_MORE_THAN_CACHED = 200 << 20
_REPEATS = 4
# Smaller matrices take as long as a launch, however they are divided.
_WORTH_MEASURING = 1 << 20


class Tuner:
    """Chooses tile configs for the products of one model on one device.

    Args:
        device: the GPU.
        of: all the products.
    """

    def __init__(self, device: torch.device, of: Iterable[Product]) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._device = device
        self._shared_bytes = int(
            getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        )
        name = "".join(c if c.isalnum() else "-" for c in properties.name)
        self._path = user_cache() / "kernels" / f"tiles-{name}.json"
        self._alike: dict[tuple[object, ...], list[Product]] = {}
        for product in of:
            self._alike.setdefault(product.kind, []).append(product)
        self._begun: list[compiler.Build] = []
        # By kind and most rows.
        self._chosen: dict[tuple[tuple[object, ...], int], quantized_linear.TileConfig] = {}

    def microseconds(self, product: Product, rows: int) -> float | None:
        """Of a launch in the tile that `tile_config` chose; None where it measured nothing."""
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return float(self._read()[_key(product, quantized_linear.most_rows(rows))]["microseconds"])
        return None

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
        time = _microseconds(works) / len(works)
        self._write({**known, key: round(time, 2)})
        return time

    def begin(self, *rows: int) -> None:
        """Have everything compiled in the background that the products of so many rows want, in this order."""
        known = self._read()
        wanted: list[quantized_linear.Variant] = []
        for most in map(quantized_linear.most_rows, rows):
            for kind, (product, *_) in self._alike.items():
                if (kind, most) not in self._chosen:
                    builds = quantized_linear.builds(product, most, self._shared_bytes)
                    tile = _settled(product, most, builds, known)
                    wanted += builds.values() if tile is None else [builds[tile]]
        self._begun += compiler.begin(quantized_linear.FILE, [build.defines for build in wanted], self._device)

    def close(self) -> None:
        """Compile no further in the background; what is asked for is still compiled."""
        compiler.forget(self._begun)

    def tile_config(self, product: Product, rows: int) -> quantized_linear.TileConfig:
        """The fastest tile for a product and all those of its kind; begin what it needs before.

        Args:
            product: one of the model's.
            rows: of the input; all numbers of rows that share a build share the result.

        Raises:
            EngineError: no tile can be built or run here.
        """
        key = (product.kind, quantized_linear.most_rows(rows))
        if key not in self._chosen:
            self._chosen[key] = self._choose(self._alike[product.kind], key[1])
        return self._chosen[key]

    def _choose(self, alike: Sequence[Product], rows: int) -> quantized_linear.TileConfig:
        builds = quantized_linear.builds(alike[0], rows, self._shared_bytes)
        if not builds:
            raise EngineError("this GPU has too little shared memory for the kernels")
        known = self._read()
        if (tile := _settled(alike[0], rows, builds, known)) is not None:
            return tile
        times = self._measure(alike, rows, builds)
        best = min(times, key=lambda tile: times[tile])
        entry = {"tile": astuple(best), "microseconds": round(times[best], 2)}
        self._write({**known, _key(alike[0], rows): entry})
        return best

    def _write(self, known: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # measured again next time, then
            write_atomically(self._path, json.dumps(known, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _measure(
        self, alike: Sequence[Product], rows: int, builds: dict[quantized_linear.TileConfig, quantized_linear.Variant]
    ) -> dict[quantized_linear.TileConfig, float]:
        """Microseconds of a launch, for every tile."""
        # All first: a GPU that had to wait for one would not be as fast with it. From the last on: threads come to the
        # others meanwhile.
        kernels = {
            tile: Kernel(quantized_linear.FILE, quantized_linear.NAME, build.defines, self._device, build.shared_bytes)
            for tile, build in reversed(builds.items())
        }
        matrices = alike[0].matrices
        x = torch.randn((rows, matrices[0].k), device=self._device).half()
        outs = [torch.empty((rows, m.n), dtype=torch.half, device=self._device) for m in matrices]
        count = -(-_MORE_THAN_CACHED // alike[0].bytes)
        used = [alike[index % len(alike)] for index in range(min(count, max(len(alike), 8)))]
        times = {}
        for tile in builds:
            kernel = kernels[tile]
            launches: list[Callable[[], None]] = []
            for product in used:
                argument = quantized_linear.argument(product, rows)
                quantized_linear.connect(argument, [x] * len(outs), outs)
                launch = kernel.bind((product.blocks(tile),), 32 * tile.warps, argument)
                launches.append(partial(_on_current_stream, launch))
            times[tile] = _microseconds(launches) / len(used)
        return times


def _on_current_stream(launch: Launch) -> None:
    launch(torch.cuda.current_stream().cuda_stream)


def _settled(
    product: Product,
    rows: int,
    builds: Mapping[quantized_linear.TileConfig, quantized_linear.Variant],
    known: Mapping[str, Any],
) -> quantized_linear.TileConfig | None:
    """The tile to take where it need not be measured: it hardly matters, or it was; otherwise None.

    Args:
        product, rows: what it is for.
        builds: those to choose from.
        known: what was measured before.
    """
    if product.bytes < _WORTH_MEASURING:
        return next(iter(builds), None)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        tile = quantized_linear.TileConfig(*(int(size) for size in known[_key(product, rows)]["tile"]))
        return tile if tile in builds else None
    return None


def _key(product: Product, rows: int) -> str:
    return json.dumps([_source_key(), product.kind, rows])


@lru_cache
def _source_key() -> str:
    return hashlib.sha256(compiler.source(quantized_linear.FILE).encode()).hexdigest()[:12]


def _microseconds(works: Sequence[Callable[[], None]]) -> float:
    """The least time that they took in a few runs, in a graph, so that launching takes no part in it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())

    def all_of_them() -> None:
        for work in works:
            work()

    with torch.cuda.stream(stream):
        all_of_them()
        graph = captured(all_of_them)
        times = []
        for _ in range(_REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) * 1000)
    return min(times)
