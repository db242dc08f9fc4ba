"""Products of very many rows: `dequantize.cu` unpacks the weights, cuBLAS multiplies."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from exl_cli.engines.exllamav2.kernels.compiler import Kernel, Launch
from exl_cli.engines.exllamav2.kernels.quantized_linear import QuantizedMatrix

FILE, NAME = "dequantize.cu", "dequantize"
THREADS = 128
_TILE = 128  # rows and columns of a block


@dataclass(frozen=True)
class DenseConfig:
    """Unpack the weights, then multiply with cuBLAS."""


class DequantizeArgument(ctypes.Structure):
    """`Dequantize` of dequantize.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "four", "scale", "block", "perm", "out")),
        *((name, ctypes.c_uint32) for name in ("n", "k", "stride", "group_shift")),
    )


def defines(matrix: QuantizedMatrix) -> dict[str, int]:
    """Macro definitions of the build for a matrix."""
    return {"FORMAT": int(matrix.exl2)}


def grid(matrix: QuantizedMatrix) -> tuple[int, int]:
    """The launch grid."""
    return -(-matrix.n // _TILE), -(-matrix.k // _TILE)


def argument(matrix: QuantizedMatrix, out: torch.Tensor) -> DequantizeArgument:
    """The kernel's argument.

    Args:
        matrix: the matrix to unpack.
        out: float16, shape (k, n or more), at any row stride: the matrix, its rows in the model's order.
    """
    own = matrix.argument()
    return DequantizeArgument(
        weight=own.weight, four=own.four, scale=own.scale, block=own.block, perm=matrix.order, out=out.data_ptr(),
        n=matrix.n, k=matrix.k, stride=out.stride(0), group_shift=own.group_shift,
    )  # fmt: skip


def dequantize(matrix: QuantizedMatrix, out: torch.Tensor, device: torch.device) -> Launch:
    """A launch that unpacks a matrix; see `argument`."""
    return Kernel(FILE, NAME, defines(matrix), device).bind(grid(matrix), THREADS, argument(matrix, out))
