"""The arguments of `step.cu`: embeddings, norms and rotary embedding."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from exl_cli.engines.exllamav2.kernels.compiler import Kernel, Launch

FILE = "step.cu"
_SCRATCH = 64  # bytes that a block's sum takes
# Up to this many rows, `rotate` with its block per head is faster than `rotate_many`.
_FEW_ROWS = 32
# With more rows than this, blocks of `rms_norm` and `gate` have fewer threads.
_MANY_ROWS = 256
_LINE_WARPS, _MOST_LINE_DIM = 8, 512  # of `rotate_many`


class NormArgument(ctypes.Structure):
    """`Norm` of step.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p * 3),
        ("perm", ctypes.c_void_p * 3),
        ("epsilon", ctypes.c_float),
        ("dim", ctypes.c_uint32),
        ("outs", ctypes.c_uint32),
    )


class GateArgument(ctypes.Structure):
    """`Gate` of step.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "out", "perm")),
        *((name, ctypes.c_uint32) for name in ("dim", "stride", "activation")),
    )


class RopeArgument(ctypes.Structure):
    """`Rope` of step.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "sine", "cosine", "lengths", "table", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("rope_offsets", "q_weight", "k_weight")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_uint32) for name in ("heads", "kv_heads", "head_dim", "turned", "tokens")),
        *((name, ctypes.c_uint32) for name in ("stride", "table_stride", "page_size", "rows")),
    )


class EmbedArgument(ctypes.Structure):
    """`Embed` of step.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "tokens", "to")),
        ("dim", ctypes.c_uint32),
    )


def embed_kernel(device: torch.device) -> Kernel:
    """The kernel that looks up embeddings."""
    return Kernel(FILE, "embed", {}, device, _SCRATCH)


def embed(kernel: Kernel, rows: int, table: int, tokens: torch.Tensor, out: torch.Tensor) -> Launch:
    """A launch that writes the embeddings of tokens.

    Args:
        kernel: `embed_kernel`.
        rows: number of tokens.
        table: device-readable address of the embedding table, float16, shape (vocabulary, dim).
        tokens: int64, shape (rows or more,): the device address of each token's id.
        out: float16, shape (rows or more, dim), dim a multiple of 8.
    """
    dim = out.shape[-1]
    argument = EmbedArgument(table=table, tokens=tokens.data_ptr(), to=out.data_ptr(), dim=dim)
    return kernel.bind((rows,), norm_threads(dim), argument)


def norm_kernel(device: torch.device, dim: int) -> Kernel:
    """The kernel of RMS norms of rows of `dim` numbers, a multiple of 8."""
    return Kernel(FILE, "rms_norm", {}, device, _SCRATCH + 2 * dim)


def norm_threads(dim: int, rows: int = 1) -> int:
    """Threads of a block: one for eight numbers, in whole warps, at most 512.

    Many rows fill the GPU with a quarter of them, which wait less for each other.
    """
    threads = min(512, -(-dim // 256) * 32)
    return threads if rows <= _MANY_ROWS else max(32, threads // 128 * 32)


def norm(
    kernel: Kernel,
    rows: int,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    outs: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> Launch:
    """A launch that writes the normalized rows of x to each of `outs`, permuted if that asks for it.

    Args:
        kernel: `norm_kernel` of the rows' length.
        rows: number of rows.
        x: float16, shape (rows or more, dim).
        weight: float16, shape (dim,); None to permute without normalizing.
        epsilon: added to the mean square.
        outs: up to three outputs like x, each with the column of x for each of its columns (uint16 values in an int16
            tensor), or None for the same order.
    """
    dim = x.shape[-1]
    argument = NormArgument(
        x=x.data_ptr(),
        weight=None if weight is None else weight.data_ptr(),
        epsilon=epsilon,
        dim=dim,
        outs=len(outs),
    )
    for index, (out, perm) in enumerate(outs):
        argument.out[index] = out.data_ptr()
        argument.perm[index] = None if perm is None else perm.data_ptr()
    return kernel.bind((rows,), norm_threads(dim, rows), argument)


def gate_kernel(device: torch.device, dim: int) -> Kernel:
    """The kernel that applies a gate, for rows of `dim` values, a multiple of 8."""
    return Kernel(FILE, "gate", {}, device, 2 * dim)


def gate_threads(dim: int, rows: int) -> int:
    """Threads of a block: one for eight numbers, in whole warps, at most 1,024, or 512 where many rows fill the GPU."""
    return min(1024 if rows <= _MANY_ROWS else 512, -(-dim // 256) * 32)


def rotate(device: torch.device, rows: int, argument: RopeArgument) -> Launch:
    """A launch that norms heads, applies the rotary embedding, and stores keys and values in their pages.

    Args:
        device: the GPU.
        rows: tokens.
        argument: where they are; its `rows` is set.
    """
    heads, dim = argument.heads + 2 * argument.kv_heads, argument.head_dim
    if rows > _FEW_ROWS and not (dim % 4 or argument.turned % 4) and dim <= _MOST_LINE_DIM:
        argument.rows = rows
        blocks = -(-rows * heads // _LINE_WARPS)
        return Kernel(FILE, "rotate_many", {}, device).bind((blocks,), 32 * _LINE_WARPS, argument)
    kernel = Kernel(FILE, "rotate", {}, device, _SCRATCH)
    return kernel.bind((rows, heads), -(-dim // 2 // 32) * 32, argument)
