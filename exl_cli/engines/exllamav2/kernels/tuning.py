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
from exl_cli.engines.exllamav2.kernels import compiler, dense, experts, many_rows, quantized_linear
from exl_cli.engines.exllamav2.kernels.dense import DenseConfig
from exl_cli.engines.exllamav2.kernels.experts import ExpertOperation
from exl_cli.engines.exllamav2.kernels.many_rows import Config, GemmConfig
from exl_cli.engines.exllamav2.kernels.operation import Launcher, Operation, Run
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product, Variant
from exl_cli.errors import EngineError
from exl_cli.system.files import user_cache, write_atomically

# Bytes of matrices to cycle through, so that none is still in the L2 cache when its turn comes again.
_MORE_THAN_CACHED = 200 << 20
_REPEATS = 4
# Bytes. Smaller products take as long as a launch with any config.
_WORTH_MEASURING = 1 << 20


class Tuner:
    """Chooses kernels and tile configs for the products of one model on one device, and launches them.

    Args:
        device: the GPU.
        of: all the products.
        scratch: see `Launcher`.
    """

    def __init__(self, device: torch.device, of: Iterable[Product], scratch: Callable[[int], torch.Tensor]) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._device = device
        self._alike: dict[tuple[object, ...], list[Product]] = {}
        for product in of:
            self._alike.setdefault(product.kind, []).append(product)
        self._shared_bytes = int(
            getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        )
        name = "".join(c if c.isalnum() else "-" for c in properties.name)
        self._path = user_cache() / "kernels" / f"tiles-{name}.json"
        # Builds, in the order in which they were wanted.
        self._begun: dict[compiler.Build, None] = {}
        self._ready: set[int] = set()
        # By kind and most rows.
        self._chosen: dict[tuple[tuple[object, ...], int], Config] = {}
        self._wgmma = (properties.major, properties.minor) == (9, 0)
        self._launcher = Launcher(
            device,
            [product for product, *_ in self._alike.values()],
            self._shared_bytes,
            wgmma=self._wgmma,
            scratch=scratch,
        )
        self._orders: dict[tuple[int | None, int, bool, bool], tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def microseconds(self, product: Product, rows: int) -> float | None:
        """Of a launch in the config that `config` chose; None where it measured nothing."""
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return float(self._read()[_key(product, _most_rows(product, rows))]["microseconds"])
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
        time = shortest_microseconds(works) / len(works)
        self._write({**known, key: round(time, 2)})
        return time

    def begin(self, *rows: int) -> None:
        """Have everything compiled in the background that the products of so many rows want, in this order."""
        known = self._read()
        wanted: list[Variant] = []
        for count in rows:
            for kind, (product, *_) in self._alike.items():
                most = _most_rows(product, count)
                if (kind, most) not in self._chosen:
                    builds = self._builds(product, most)
                    config = _settled(product, most, builds, known)
                    wanted += builds.values() if config is None else [builds[config]]
        for file in dict.fromkeys(build.file for build in wanted):
            defines = [build.defines for build in wanted if build.file == file]
            self._begun.update(dict.fromkeys(compiler.begin(file, defines, self._device)))

    def ready(self, rows: int) -> bool:
        """Whether all builds for products of this many rows are compiled. If not, start compiling them."""
        most = quantized_linear.most_rows(rows)
        if most not in self._ready:
            before = len(self._begun)
            self.begin(rows)
            if len(self._begun) == before and compiler.done(self._begun):
                self._ready.add(most)
        return most in self._ready

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
        key = (product.kind, _most_rows(product, rows))
        if key not in self._chosen:
            self._chosen[key] = self._choose(self._alike[product.kind], key[1])
        return self._chosen[key]

    def bind(self, operation: Operation | ExpertOperation) -> Run:
        """Bind an operation to the kernel that `config` chooses."""
        return self._launcher.bind(operation, self.config(operation.product, operation.rows))

    def order(self, product: Product, rows: int, index: int = 0) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`many_rows.order` of one of the product's matrices, in the config that `config` chooses."""
        config, matrix = self.config(product, rows), product.matrices[index]
        key = (matrix.order, matrix.k, isinstance(config, GemmConfig) and config.wgmma, isinstance(config, DenseConfig))
        if key not in self._orders:
            self._orders[key] = many_rows.order(matrix, config)
        return self._orders[key]

    def _builds(self, product: Product, rows: int) -> dict[Config, Variant]:
        return many_rows.builds(product, rows, self._shared_bytes, wgmma=self._wgmma)

    def _choose(self, alike: Sequence[Product], rows: int) -> Config:
        builds = self._builds(alike[0], rows)
        if not builds:
            raise EngineError("this GPU has too little shared memory for the kernels")
        known = self._read()
        if (config := _settled(alike[0], rows, builds, known)) is not None:
            return config
        if len(builds) == 1:
            return next(iter(builds))
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
        for build in reversed([*builds.values()]):
            self._launcher.kernel(build)
        operations = self._trials(alike, rows)
        times = {}
        for config in builds:
            launches = [partial(_on_current_stream, self._launcher.bind(each, config)) for each in operations]
            times[config] = shortest_microseconds(launches) / len(operations)
        return times

    def _trials(self, alike: Sequence[Product], rows: int) -> Sequence[Operation | ExpertOperation]:
        """Operations to measure, which read so many matrices that none is still cached when its turn comes again."""
        matrices, of_experts = alike[0].matrices, alike[0].experts
        # A mixture's launch reads only some of its experts.
        count = 8 if of_experts else min(-(-_MORE_THAN_CACHED // alike[0].bytes), max(len(alike), 8))
        used = [alike[index % len(alike)] for index in range(count)]
        if of_experts:
            return experts.trials(used, rows, self._device)
        x = torch.randn((rows, matrices[0].k), device=self._device).half()
        # Side by side, as the outputs of queries, keys and values are.
        out = torch.empty((rows, sum(m.n for m in matrices)), dtype=torch.half, device=self._device)
        outs = [out[:, begin:] for begin in quantized_linear.first_columns(matrices)]
        return [Operation(product, rows, [x] * len(outs), outs) for product in used]


def _most_rows(product: Product, rows: int) -> int:
    """`quantized_linear.most_rows`, for a mixture of experts of a block of its rows."""
    most = quantized_linear.most_rows(rows)
    return min(most, many_rows.MOST_ROWS) if product.experts else most


def _described(config: Config) -> list[Any]:
    return [type(config).__name__, *astuple(config)]


def _on_current_stream(launch: Run) -> None:
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
    sources = (compiler.source(file) for file in (quantized_linear.FILE, many_rows.FILE, dense.FILE))
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:12]


def shortest_microseconds(works: Sequence[Callable[[], None]], repeats: int = _REPEATS) -> float:
    """The shortest time of a few runs of all, in a CUDA graph, so that launch overhead is not measured."""
    # The model's own stream if possible, as cuBLAS allocates a workspace for each. The default one cannot be captured.
    stream = before = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(before)

    def all_of_them() -> None:
        for work in works:
            work()

    with torch.cuda.stream(stream):
        all_of_them()
        graph = captured(all_of_them)
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) * 1000)
    return min(times)
