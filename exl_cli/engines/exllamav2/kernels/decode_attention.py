"""Attention of few tokens by `attention.cu`: the models it takes, the division of its work, its workspace."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from exl_cli.engines.exllamav2.attention.paged import VARIABLE
from exl_cli.engines.exllamav2.kernels import compiler
from exl_cli.engines.exllamav2.kernels.compiler import Kernel, Launch
from exl_cli.engines.exllamav2.kernels.norm_rope import RopeArgument
from exl_cli.engines.exllamav2.kernels.quantized_linear import MOST_SEQUENCES

FILE, NAME = "attention.cu", "attend"
HEAD_DIMS = (64, 96, 128)
# Rows of queries that share a KV head: two tiles of the tensor cores' eight.
MOST_QUERIES = 16
_TILE = 8
_PIECE = 16  # keys that a warp takes at a time
# Most shares of a sequence: merging more takes longer than they save.
_MOST_SHARES = 64
# With so many multiprocessors for each sequence and KV head, blocks are small, and find room beside the product before
# them; with fewer, one large block on each has as many keys under way.
_MANY = 4
# With so many sequences and KV heads for each multiprocessor, blocks are small again, and fill it.
_VERY_MANY = 3
# Where blocks of other sequences fill the GPU, a share of a long one has this many keys at least.
_LONG_SHARE = 1024
_MOST_SPREAD = 8
# Tokens times shares, where shares only serve a long sequence among many.
_MOST_SPREAD_TOKENS = 512
# Bounds that between them lead to every plan.
_BOUNDS = tuple(1024 << doubled for doubled in range(8))
_LOG2_E = math.log2(math.e)


class AttentionArgument(ctypes.Structure):
    """`Attention` of attention.cu."""

    _fields_ = (
        ("rope", RopeArgument),
        *((name, ctypes.c_void_p) for name in ("out", "places", "parts", "marks", "arrived")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_uint32) for name in ("groups", "window", "least")),
    )


class Plan(NamedTuple):
    """How a launch divides its work.

    Attributes:
        tiles: of eight rows of queries.
        warps: of a block.
        shares: blocks that may divide the keys of one sequence and KV head.
        least: pieces of 16 keys that are worth a share.
    """

    tiles: int
    warps: int
    shares: int
    least: int

    def defines(self, head_dim: int, page_size: int) -> dict[str, int]:
        """Values of the source's names."""
        return {
            "HEAD_DIM": head_dim,
            "PAGE_SIZE": page_size,
            "TILES": self.tiles,
            "WARPS": self.warps,
            "SHARED_BYTES": self.shared_bytes(head_dim),
        }

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a block: `Shared` of attention.cu."""
        rows = _TILE * self.tiles
        heads = 2 * 3 * rows * (head_dim if head_dim % 64 else head_dim + 32)
        piece = _PIECE * (2 * 2 * head_dim + (16 if head_dim % 64 else 80))
        own = max(piece, 4 * rows * (head_dim + 8))
        return heads + self.warps * (own + 8 * rows) + 16


def plan(batch: int, tokens: int, heads: int, kv_heads: int, most_keys: int, processors: int) -> Plan:
    """Divide the work of a launch.

    Args:
        batch: sequences.
        tokens: new ones, of each.
        heads, kv_heads: of the model.
        most_keys: no sequence has more, the new ones included.
        processors: multiprocessors of the GPU.
    """
    tiles = 1 if tokens * (heads // kv_heads) <= _TILE else 2
    few = processors >= _MANY * batch * kv_heads
    warps = 4 if tiles > 1 or few or batch * kv_heads >= _VERY_MANY * processors else 8
    to_fill = processors * (8 // warps) // (batch * kv_heads)
    least = warps if to_fill > 1 else _LONG_SHARE // _PIECE
    # With many sequences there is work for all, unless one of them is much longer than the others.
    spread = min(most_keys // (2 * _LONG_SHARE), _MOST_SPREAD, _MOST_SPREAD_TOKENS // (batch * tokens))
    worth = -(-(most_keys // _PIECE + 1) // least)
    return Plan(tiles, warps, max(1, min(max(to_fill, spread), worth, _MOST_SHARES)), least)


def why_not(heads: int, kv_heads: int, head_dim: int, page_size: int, *, quantized_cache: bool) -> str:
    """Why this attention does not serve a model, in a few words; empty where it does."""
    if os.environ.get(VARIABLE):
        return f"{VARIABLE} is set"
    if quantized_cache:
        return "the cache is quantized"
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} values"
    if heads % kv_heads or heads // kv_heads > MOST_QUERIES:
        return f"{heads} heads for {kv_heads} of keys"
    return "" if page_size % _PIECE == 0 else f"pages of {page_size} positions"


class DecodeAttention:
    """Attention of one model's layers on one GPU.

    The workspace is that of a single launch, as one runs at a time: some megabytes.

    Args:
        device: the GPU.
        heads, kv_heads, head_dim, page_size: of the model and its cache; `why_not` of them is empty.

    Raises:
        EngineError: the kernel cannot be compiled here.
    """

    def __init__(self, device: torch.device, heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
        self._device = device
        self._shape = (heads, kv_heads)
        self._processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
        rows = workspace_rows(heads, kv_heads, self._processors)
        self._parts = torch.empty((rows, head_dim), dtype=torch.float32, device=device)
        self._marks = torch.empty((rows, 2), dtype=torch.float32, device=device)
        self._arrived = torch.zeros(MOST_SEQUENCES * kv_heads, dtype=torch.int32, device=device)
        builds = {(tiles, warps): Plan(tiles, warps, 1, 1) for tiles, warps in ((1, 4), (1, 8), (2, 4))}
        # All of them now, rather than amid an answer.
        compiler.begin(FILE, [build.defines(head_dim, page_size) for build in builds.values()], device)
        self._kernels = {
            key: Kernel(FILE, NAME, build.defines(head_dim, page_size), device, build.shared_bytes(head_dim))
            for key, build in reversed(builds.items())  # threads do the others meanwhile
        }

    def takes(self, tokens: int) -> bool:
        """Whether it attends from so many tokens of each sequence at once."""
        heads, kv_heads = self._shape
        return tokens * (heads // kv_heads) <= MOST_QUERIES

    def bind(
        self,
        rope: RopeArgument,
        out: torch.Tensor,
        batch: int,
        *,
        scale: float,
        window: int,
        softcap: float,
        places: torch.Tensor | None = None,
    ) -> Callable[[int, int], None]:
        """Bind a layer's launch: norm and rotate new queries and keys, store keys and values, and attend.

        Args:
            rope: as for `rotate`; its `tokens` are `taken`. The queries stay as they are.
            out: float16, shape (batch * tokens or more, heads * head_dim), contiguous.
            batch: sequences.
            scale, window, softcap: as of `paged.attend_paged`.
            places: for each number of a row of `out`, where in the row it goes (uint16 values in an int16 tensor); None
                for in order.

        Returns:
            A function of a stream, by its handle, and of a bound of the keys of any sequence, new ones included.
        """
        heads, kv_heads = self._shape
        argument = AttentionArgument(
            rope=rope, out=out.data_ptr(), parts=self._parts.data_ptr(), marks=self._marks.data_ptr(),
            arrived=self._arrived.data_ptr(), groups=heads // kv_heads, window=window,
            places=None if places is None else places.data_ptr(),
        )  # fmt: skip
        argument.scale, argument.softcap = factors(scale, softcap)
        launches: dict[Plan, Launch] = {}

        def launch(most_keys: int) -> Launch:
            layout = plan(batch, rope.tokens, heads, kv_heads, most_keys, self._processors)
            if layout not in launches:
                own = AttentionArgument.from_buffer_copy(argument)
                own.least = layout.least
                kernel = self._kernels[layout.tiles, layout.warps]
                launches[layout] = kernel.bind((layout.shares, kv_heads, batch), 32 * layout.warps, own)
            return launches[layout]

        return lambda stream, most_keys: launch(most_keys)(stream)


def factors(scale: float, softcap: float) -> tuple[float, float]:
    """The kernel's `scale` and `softcap`, with the factor log2(e) that lets it use exp2, as in `triton_kernels`."""
    return (scale / softcap * 2 * _LOG2_E, softcap * _LOG2_E) if softcap else (scale * _LOG2_E, 0.0)


def workspace_rows(heads: int, kv_heads: int, processors: int) -> int:
    """Most partial results of any launch: query rows times shares."""
    groups = heads // kv_heads
    return max(
        batch * tokens * heads * plan(batch, tokens, heads, kv_heads, most_keys, processors).shares
        for batch in range(1, MOST_SEQUENCES + 1)
        for tokens in range(1, min(MOST_SEQUENCES // batch, MOST_QUERIES // groups) + 1)
        for most_keys in _BOUNDS
    )
