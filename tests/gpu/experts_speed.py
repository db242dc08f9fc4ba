"""Microseconds of a mixture of experts by exl's kernels, in a CUDA graph, by number of tokens.

    PYTHONPATH=.:tests python tests/gpu/experts_speed.py [--exl2] [--shape mixtral|qwen3-30b] [--rows 8,512]

Beside each time stands the floor: the chosen experts' weights once at 4.3 TB/s, or all multiplications at 758 TFLOP/s
if that takes longer, as an H200 reaches them. Weights are random, and so are the tokens' experts.
"""

from __future__ import annotations

import argparse
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from exl_cli.engines.exllamav2.kernels.quantized_linear import ROWS, Product, QuantizedMatrix
from exl_cli.engines.exllamav2.kernels.tuning import Tuner, shortest_microseconds
from exl_cli.engines.exllamav2.mixtures import Mixtures

# Hidden and inner size, experts, experts of a token, layers.
SHAPES = {"mixtral": (4096, 14336, 8, 2, 3), "qwen3-30b": (2048, 768, 128, 8, 6)}
GROUP, REPEATS = 128, 20
BANDWIDTH, FLOPS = 4.3e12, 758e12


def matrix(k: int, n: int, *, exl2: bool, device: torch.device) -> QuantizedMatrix:
    """A 4-bit matrix with a random order of rows."""

    def integers(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (rows, columns), dtype=torch.int64, device=device).to(torch.int32)

    perm = torch.randperm(k, device=device)
    inverse = torch.argsort(perm).to(torch.int16)
    scale = torch.full((k // GROUP, n), 0.002, dtype=torch.half, device=device)
    block = torch.arange(k // 32, dtype=torch.int64, device=device)
    small = int(torch.tensor(1e-5).half().view(torch.int16))
    blocks = block * 4 | 4 << 24 | small << 32 | block // (GROUP // 32) << 48
    return QuantizedMatrix(
        integers(k // 8, n), integers(k // GROUP, n // 8), None if exl2 else scale, blocks if exl2 else None, None,
        perm.to(torch.int16), inverse, k, n, 1 if exl2 else GROUP, coarse=True, max_bits=4,
    )  # fmt: skip


def mixture(shape: tuple[int, int, int, int, int], *, exl2: bool, device: torch.device) -> Any:
    hidden, inner, count, chosen, _ = shape
    both: list[QuantizedMatrix] = []
    for _ in range(count):
        gate, up = (matrix(hidden, inner, exl2=exl2, device=device) for _ in range(2))
        # As calibration leaves them: both see the same input.
        both += [gate, QuantizedMatrix(**{**up.__dict__, "perm": gate.perm, "inverse": gate.inverse})]
    downs = [matrix(inner, hidden, exl2=exl2, device=device) for _ in range(count)]
    return SimpleNamespace(
        gate_up=Product(tuple(both), paired=True, experts=count, chosen=chosen),
        down=Product(tuple(downs), experts=count, chosen=chosen),
        router=torch.randn((count, hidden), device=device).half() / hidden**0.5, normalized=True,
    )  # fmt: skip


def floor(shape: tuple[int, int, int, int, int], rows: int, used: float, each: int) -> float:
    hidden, inner, _, chosen, _ = shape
    return 1e6 * max(used * each / BANDWIDTH, 2 * 3 * hidden * inner * rows * chosen / FLOPS)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b")
    parser.add_argument("--exl2", action="store_true")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    options = parser.parse_args()
    shape, device = SHAPES[options.shape], torch.device("cuda", 0)
    hidden, _, count, chosen, layers = shape
    mixtures = [mixture(shape, exl2=options.exl2, device=device) for _ in range(layers)]

    def room(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.half, device=device)

    products = [product for it in mixtures for product in (it.gate_up, it.down)]
    tuner = Tuner(device, products, room)
    own = Mixtures(device, mixtures, "silu", tuner, room)
    each = sum(product.bytes for product in products[:2]) // count
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        for rows in map(int, options.rows.split(",")):
            x, states = (torch.randn((rows, hidden), device=device).half() for _ in range(2))
            stream = torch.cuda.current_stream().cuda_stream
            launches = [partial(launch, stream) for it in mixtures for launch in own.bind(it, x, states, rows)]
            time = shortest_microseconds(launches, REPEATS) / layers
            logits = x.float() @ mixtures[0].router.float().T
            used = len(logits.topk(chosen).indices.unique())
            print(f"{rows:5} {time:9.1f} floor {floor(shape, rows, used, each):9.1f}  {used} experts")


if __name__ == "__main__":
    main()
