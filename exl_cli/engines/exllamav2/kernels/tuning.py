"""Picks the fastest kernel and tile config for each matrix product by measuring, once per shape and GPU.

Results are cached in the user's cache folder, in a file per GPU model, keyed by shape and the kernels' source.
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
from exl_cli.engines.exllamav2.kernels import compiler, many_rows, quantized_linear
from exl_cli.engines.exllamav2.kernels.compiler import Kernel, Launch
from exl_cli.engines.exllamav2.kernels.many_rows import GemmConfig, Workspace
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product, Products, TileConfig, Variant
from exl_cli.errors import EngineError
from exl_cli.system.files import user_cache, write_atomically

# Bytes of matrices to cycle through, so that none is still in the L2 cache when its turn comes again.
_MORE_THAN_CACHED = 200 << 20
_REPEATS = 4
# Bytes. Smaller products take as long as a launch with any config.
_WORTH_MEASURING = 1 << 20

Config = TileConfig | GemmConfig


class Tuner:
    """Chooses kernels and tile configs for the products of one model on one device, and launches them.

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
        self._chosen: dict[tuple[tuple[object, ...], int], Config] = {}
        self._processors = properties.multi_processor_count
        self._workspace: Workspace | None = None

    def microseconds(self, product: Product, rows: int) -> float | None:
        """Of a launch in the config that `config` chose; None where it measured nothing."""
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
        wanted: list[Variant] = []
        for most in map(quantized_linear.most_rows, rows):
            for kind, (product, *_) in self._alike.items():
                if (kind, most) not in self._chosen:
                    builds = many_rows.builds(product, most, self._shared_bytes)
                    config = _settled(product, most, builds, known)
                    wanted += builds.values() if config is None else [builds[config]]
        for file in dict.fromkeys(build.file for build in wanted):
            defines = [build.defines for build in wanted if build.file == file]
            self._begun += compiler.begin(file, defines, self._device)

    def close(self) -> None:
        """Compile no further in the background; what is asked for is still compiled."""
        compiler.forget(self._begun)

    def config(self, product: Product, rows: int) -> Config:
        """The fastest for a product and all those of its kind; begin what it needs before.

        Args:
            product: one of the model's.
            rows: of the input; all numbers of rows that share a build share the result.

        Raises:
            EngineError: nothing can be built or run here.
        """
        key = (product.kind, quantized_linear.most_rows(rows))
        if key not in self._chosen:
            self._chosen[key] = self._choose(self._alike[product.kind], key[1])
        return self._chosen[key]

    def bind(self, product: Product, rows: int, argument: Products) -> Launch:
        """A launch of a product in the config that suits it; see `config`."""
        config = self.config(product, rows)
        return self._bind(product, rows, config, self._kernel(_variant(product, rows, config)), argument)

    def _kernel(self, build: Variant) -> Kernel:
        return Kernel(build.file, build.name, build.defines, self._device, build.shared_bytes)

    def _bind(self, product: Product, rows: int, config: Config, kernel: Kernel, argument: Products) -> Launch:
        threads = 32 * config.warps
        if isinstance(config, TileConfig):
            return kernel.bind((product.blocks(config),), threads, argument)
        at_once = min(config.resident, kernel.resident(threads)) * self._processors
        if self._workspace is None:
            self._workspace = self._shared_sums()
        self._workspace.connect(argument)
        return kernel.bind((config.blocks(product, rows, at_once),), threads, argument)

    def _shared_sums(self) -> Workspace:
        """Enough for all products of all configs."""
        products = [product for product, *_ in self._alike.values()]
        floats = tiles = 0
        for product in products:
            for rows in (16, quantized_linear.MOST_ROWS):
                for config in many_rows.configs(product, rows):
                    floats = max(floats, many_rows.partial_floats(config, config.resident * self._processors))
            # No tile has fewer columns than a strip, or fewer rows than can be.
            tiles = max(tiles, sum(-(-matrix.n // 32) for matrix in product.matrices))
        return Workspace(self._device, floats, tiles)

    def _choose(self, alike: Sequence[Product], rows: int) -> Config:
        builds = many_rows.builds(alike[0], rows, self._shared_bytes)
        if not builds:
            raise EngineError("this GPU has too little shared memory for the kernels")
        known = self._read()
        if (config := _settled(alike[0], rows, builds, known)) is not None:
            return config
        times = self._measure(alike, rows, builds)
        best = min(times, key=lambda config: times[config])
        entry = {"tile": _described(best), "microseconds": round(times[best], 2)}
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

    def _measure(self, alike: Sequence[Product], rows: int, builds: Mapping[Config, Variant]) -> dict[Config, float]:
        """Microseconds of a launch, for every config."""
        # Get all kernels first: a GPU that had to wait for one would be slower at first, which distorts the times.
        # Last one first, as the background threads compile from the front of the queue.
        kernels = {config: self._kernel(build) for config, build in reversed([*builds.items()])}
        matrices = alike[0].matrices
        x = torch.randn((rows, matrices[0].k), device=self._device).half()
        outs = [torch.empty((rows, m.n), dtype=torch.half, device=self._device) for m in matrices]
        count = -(-_MORE_THAN_CACHED // alike[0].bytes)
        used = [alike[index % len(alike)] for index in range(min(count, max(len(alike), 8)))]
        times = {}
        for config in builds:
            launches: list[Callable[[], None]] = []
            for product in used:
                argument = quantized_linear.argument(product, rows)
                quantized_linear.connect(argument, [x] * len(outs), outs)
                launch = self._bind(product, rows, config, kernels[config], argument)
                launches.append(partial(_on_current_stream, launch))
            times[config] = _microseconds(launches) / len(used)
        return times


def _variant(product: Product, rows: int, config: Config) -> Variant:
    if isinstance(config, TileConfig):
        return quantized_linear.variant(product, rows, config)
    return many_rows.variant(product, config)


def _described(config: Config) -> list[Any]:
    return [type(config).__name__, *astuple(config)]


def _on_current_stream(launch: Launch) -> None:
    launch(torch.cuda.current_stream().cuda_stream)


def _settled(product: Product, rows: int, builds: Mapping[Config, Variant], known: Mapping[str, Any]) -> Config | None:
    """The config to use without measuring, for a small product or one measured before; None if it must be measured.

    Args:
        product, rows: the product, and the rows of its input.
        builds: configs to choose from.
        known: earlier measurements.
    """
    if product.bytes < _WORTH_MEASURING:
        return next(iter(builds), None)
    with contextlib.suppress(KeyError, TypeError):
        tile = known[_key(product, rows)]["tile"]
        return next((config for config in builds if _described(config) == tile), None)
    return None


def _key(product: Product, rows: int) -> str:
    return json.dumps([_source_key(), product.kind, rows])


@lru_cache
def _source_key() -> str:
    sources = (compiler.source(file) for file in (quantized_linear.FILE, many_rows.FILE))
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:12]


def _microseconds(works: Sequence[Callable[[], None]]) -> float:
    """The shortest time of a few runs of all, in a CUDA graph, so that launch overhead is not measured."""
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
