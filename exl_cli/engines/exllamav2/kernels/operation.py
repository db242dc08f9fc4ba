"""Matrix products with their inputs and outputs, and launches of the kernel chosen for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from exl_cli.engines.exllamav2.kernels import dense, experts, many_rows, norm_rope, quantized_linear
from exl_cli.engines.exllamav2.kernels.compiler import Kernel
from exl_cli.engines.exllamav2.kernels.dense import DenseConfig
from exl_cli.engines.exllamav2.kernels.experts import ExpertOperation
from exl_cli.engines.exllamav2.kernels.many_rows import Config, GemmConfig, Workspace
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product, Products, QuantizedMatrix, TileConfig, Variant

# Launches on the current stream, whose handle is the argument.
Run = Callable[[int], None]


@dataclass(eq=False)
class Operation:
    """A matrix product to compute.

    Attributes:
        product: the matrices.
        rows: rows of the input.
        xs: the input of each matrix, float16, shape (rows or more, k) at any row stride. The columns of several rows
            are in the order of `many_rows.order`.
        outs: the output of each matrix, shape (rows or more, n or more); for a pair, both are the same.
        norms: for a single row: weight and epsilon of the norm to apply first, per matrix; empty for none.
        residual: whether to add to the outputs instead of overwriting them.
        activation: a pair's.
        places: for each column of a pair's output, where to write it; None for in order.
        sources: the inverse of `places`.
    """

    product: Product
    rows: int
    xs: Sequence[torch.Tensor]
    outs: Sequence[torch.Tensor]
    norms: Sequence[tuple[torch.Tensor, float]] = ()
    residual: bool = False
    activation: str = "silu"
    places: torch.Tensor | None = None
    sources: torch.Tensor | None = None

    def argument(self) -> Products:
        """The argument of `gemv.cu` and `gemm.cu`."""
        argument = quantized_linear.argument(self.product, self.rows, self.activation)
        quantized_linear.connect(argument, self.xs, self.outs)
        for target, (weight, epsilon) in zip(argument.matrix, self.norms, strict=False):
            target.norm, target.epsilon = weight.data_ptr(), epsilon
        if self.residual:
            for target, out in zip(argument.matrix, self.outs, strict=False):
                target.add = out.data_ptr()
        if self.product.paired:
            argument.matrix[0].scatter = None if self.places is None else self.places.data_ptr()
        return argument


def variant(product: Product, rows: int, config: Config) -> Variant:
    """The build for a product in a config."""
    if isinstance(config, TileConfig):
        return quantized_linear.variant(product, rows, config)
    if isinstance(config, DenseConfig):
        return many_rows.dense_variant(product)
    return many_rows.variant(product, config)


def _side_by_side(outs: Sequence[torch.Tensor], product: Product) -> bool:
    """Whether the outputs of all matrices are neighbouring columns of the first."""
    begins = quantized_linear.first_columns(product.matrices)
    return outs[0].shape[1] >= sum(matrix.n for matrix in product.matrices) and all(
        out.stride() == outs[0].stride() and out.data_ptr() == outs[0][:, begin:].data_ptr()
        for out, begin in zip(outs, begins, strict=False)
    )


def _dequantized_at_once(product: Product) -> int:
    """Most values that one dense product of it has: a pair's matrices are unpacked one after the other."""
    widths = [matrix.n for matrix in product.matrices]
    return product.matrices[0].k * (max(widths) if product.paired else sum(widths))


class Launcher:
    """Makes launches of one model's products on one GPU.

    Args:
        device: the GPU.
        products: one of each kind.
        shared_bytes, wgmma: see `many_rows.configs`.
        scratch: allocates float16 values that nothing else uses while a product runs.
    """

    def __init__(
        self,
        device: torch.device,
        products: Iterable[Product],
        shared_bytes: int,
        *,
        wgmma: bool,
        scratch: Callable[[int], torch.Tensor],
    ) -> None:
        # Mixtures of experts need none of the buffers here.
        self._device, self._products = device, [product for product in products if not product.experts]
        self._shared_bytes, self._wgmma = shared_bytes, wgmma
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        # The key is whether there are more rows than `gemv.cu` takes.
        self._workspaces: dict[bool, Workspace] = {}
        # For dequantized matrices, and for the output of a pair's second one.
        sizes = map(_dequantized_at_once, self._products)
        self._weights = scratch(max((size for size in sizes if size <= many_rows.DENSE_NUMBERS), default=0))
        widest = max((product.matrices[1].n for product in self._products if product.paired), default=0)
        self._ups = scratch(quantized_linear.MOST_TOKENS * widest)

    def kernel(self, build: Variant) -> Kernel:
        """The compiled kernel of a build."""
        return Kernel(build.file, build.name, build.defines, self._device, build.shared_bytes)

    def bind(self, operation: Operation | ExpertOperation, config: Config) -> Run:
        """Bind an operation to the kernel of a config. The result may be called several times."""
        if isinstance(operation, ExpertOperation):
            return self._experts(operation, cast(GemmConfig, config))
        product, rows = operation.product, operation.rows
        if isinstance(config, DenseConfig):
            return self._dense(operation)
        kernel = self.kernel(variant(product, rows, config))
        if isinstance(config, TileConfig):
            return kernel.bind((product.blocks(config),), 32 * config.warps, operation.argument())
        if config.unfused:
            return self._unfused(operation, config)
        at_once = min(config.resident, kernel.resident(config.threads)) * self._processors
        grid = (config.blocks(product, rows, at_once),)
        argument = operation.argument()
        argument.splits = config.splits(product, rows, at_once)
        self._workspace(rows).connect(argument)
        if not config.wgmma:
            return kernel.bind(grid, config.threads, argument)
        mapped = many_rows.with_maps(argument)
        many_rows.write_maps(mapped, [x[:rows] for x in operation.xs], config)
        return kernel.bind(grid, config.threads, mapped)

    def _experts(self, operation: ExpertOperation, config: GemmConfig) -> Run:
        product, at_once = operation.product, config.resident * self._processors
        blocks, operation.splits = experts.grid(product, operation.rows, config, at_once)
        kernel, argument = self.kernel(many_rows.variant(product, config)), operation.argument()
        if not config.wgmma:
            return kernel.bind((blocks,), config.threads, argument)
        mapped = many_rows.with_maps(argument)
        many_rows.write_maps(mapped, operation.xs, config)
        return kernel.bind((blocks,), config.threads, mapped)

    def _unfused(self, operation: Operation, config: GemmConfig) -> Run:
        """Compute both products of a pair in one launch, and combine them in a second one."""
        both = replace(operation, product=config.product(operation.product))
        both.outs = gate, up = [operation.outs[0], self._up(operation)]
        multiply, combine = self.bind(both, replace(config, unfused=False)), self._gate(operation, gate, up)

        def run(stream: int) -> None:
            multiply(stream)
            combine(stream)

        return run

    def _dense(self, operation: Operation) -> Run:
        product, rows = operation.product, operation.rows
        outs = [operation.outs[0], self._up(operation)] if product.paired else operation.outs
        if not product.paired and _side_by_side(outs, product):
            # The order in which matrices want their input is undone as they are unpacked, so one input is like another.
            width = sum(matrix.n for matrix in product.matrices)
            parts = [(product.matrices, operation.xs[0], outs[0][:, :width])]
        else:
            parts = [
                ((matrix,), x, out[:, : matrix.n])
                for matrix, x, out in zip(product.matrices, operation.xs, outs, strict=False)
            ]
        steps = [
            self._dense_part(matrices, x[:rows], out[:rows], residual=operation.residual) for matrices, x, out in parts
        ]
        if product.paired:
            steps.append(self._gate(operation, outs[0], outs[1]))

        def run(stream: int) -> None:
            for step in steps:
                step(stream)

        return run

    def _dense_part(
        self, matrices: Sequence[QuantizedMatrix], x: torch.Tensor, out: torch.Tensor, *, residual: bool
    ) -> Run:
        """Unpack matrices side by side and multiply once."""
        k, width = matrices[0].k, out.shape[1]
        if k * width > len(self._weights):
            self._weights = torch.empty(k * width, dtype=torch.half, device=self._device)
        weights = self._weights[: k * width].view(k, width)
        unpacks = [
            dense.dequantize(matrix, weights[:, begin:], self._device)
            for matrix, begin in zip(matrices, quantized_linear.first_columns(matrices), strict=True)
        ]
        bias: torch.Tensor | None = None
        if any(matrix.bias is not None for matrix in matrices):
            biases = [out.new_zeros(matrix.n) if matrix.bias is None else matrix.bias for matrix in matrices]
            bias = biases[0] if len(biases) == 1 else torch.cat(biases)

        def run(stream: int) -> None:
            for unpack in unpacks:
                unpack(stream)
            if residual:
                torch.addmm(out, x, weights, out=out)
                if bias is not None:
                    out.add_(bias)
            elif bias is not None:
                torch.addmm(bias, x, weights, out=out)
            else:
                torch.mm(x, weights, out=out)

        return run

    def _up(self, operation: Operation) -> torch.Tensor:
        """The buffer for the output of a pair's second matrix."""
        width = operation.product.matrices[0].n
        return self._ups[: operation.rows * width].view(operation.rows, width)

    def _gate(self, operation: Operation, gate: torch.Tensor, up: torch.Tensor) -> Run:
        dim, sources = operation.product.matrices[0].n, operation.sources
        argument = norm_rope.GateArgument(
            gate=gate.data_ptr(), up=up.data_ptr(), out=gate.data_ptr(), dim=dim, stride=gate.stride(0),
            perm=None if sources is None else sources.data_ptr(),
            activation=quantized_linear.ACTIVATIONS[operation.activation],
        )  # fmt: skip
        kernel = norm_rope.gate_kernel(self._device, dim)
        return kernel.bind((operation.rows,), norm_rope.gate_threads(dim, operation.rows), argument)

    def _workspace(self, rows: int) -> Workspace:
        """The workspace of all products with as many rows as `gemv.cu` takes, or of all with more."""
        many = rows > quantized_linear.MOST_ROWS
        if many not in self._workspaces:
            floats = tiles = 0
            for product in self._products:
                for most in quantized_linear.ROWS:
                    if many != (most > quantized_linear.MOST_ROWS):
                        continue
                    for config in many_rows.configs(product, most, self._shared_bytes, wgmma=self._wgmma):
                        floats = max(floats, many_rows.partial_floats(config, config.resident * self._processors))
                        tiles = max(tiles, config.tiles_of(product, most))
            self._workspaces[many] = Workspace(self._device, floats, tiles)
        return self._workspaces[many]
