"""Launches of the kernels in `triton_kernels`: tile sizes, splits, workspace. Needs Triton."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from exl_cli.engines.exllamav2.attention import triton_kernels as kernels
from exl_cli.engines.exllamav2.attention.paged import Call

# Calls with up to this many queries are decoding, or verify draft tokens: they are bound by reading the cache.
_DECODE_QUERIES = 16
# Explicit although it is the default, because Triton 3.9 warns that the default will change.
_FUSED = {"enable_fp_fusion": True}
_LOG2_E = math.log2(math.e)
# More splits of one sequence than this cost more in merging than they bring.
_MOST_SPLITS = 64
# Splits merged per step, and float32 values per split of that step: together what fits into registers.
_MERGED_SPLITS = 16
_MERGED_VALUES = 512


class Plan(NamedTuple):
    """The launch configuration of a call.

    Attributes:
        block_m: query rows of a tile.
        block_n: keys of a block; divides 256.
        warps, stages: Triton's options.
        tiles: tiles of a KV head.
        splits: the most programs that share one tile's keys.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tiles: int
    splits: int


def plan(batch: int, q_len: int, heads: int, kv_heads: int, head_dim: int, keys: int, processors: int) -> Plan:
    """Lay out a call of this shape, with at most `keys` keys for a tile, for a GPU with this many multiprocessors."""
    rows = q_len * (heads // kv_heads)
    wide = head_dim > 128
    if q_len > _DECODE_QUERIES:
        block_m, block_n, warps = (64, 32, 8) if wide else (128, 64, 8)
        # Fewer key blocks than this per split are not worth writing float32 partial results to memory and merging them.
        least, target = 8, processors
    else:
        block_m = 16 if rows <= 16 else 64
        block_n, warps = (32 if wide else 64), (8 if wide and block_m > 16 else 4)
        least, target = 1, 2 * processors
    tiles = -(-rows // block_m)
    programs = batch * kv_heads * tiles
    blocks = -(-keys // block_n)
    # Round up for decoding, where idle multiprocessors cost most; round down for prompts, where merging does.
    wanted = -(-target // programs) if q_len <= _DECODE_QUERIES else target // programs
    splits = max(1, min(wanted, blocks // least, _MOST_SPLITS))
    return Plan(block_m, block_n, warps, 2 if wide and block_m > 16 else 3, tiles, splits)


def attend(call: Call) -> torch.Tensor:
    """Compute a call of `paged.attend_paged`."""
    q, k_cache, v_cache, window = call.q, call.k_cache, call.v_cache, call.window
    batch, q_len, heads, head_dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    groups = heads // kv_heads
    keys = min(call.max_len, window + q_len + 64) if window else call.max_len
    layout = plan(batch, q_len, heads, kv_heads, head_dim, keys, _processors(q.device))
    added = 0
    if call.k is not None and call.v is not None:
        _append(call, call.k, call.v)
        added = q_len
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if call.out is None else call.out
    shares = batch * heads * layout.splits * q_len if layout.splits > 1 else 1
    parts, lses = (torch.empty((shares, n), dtype=torch.float32, device=q.device) for n in (head_dim, 1))
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    common = {
        "head_dim": head_dim, "block_d": block_d, "block_m": layout.block_m, "block_n": layout.block_n,
        "windowed": window > 0,
    }  # fmt: skip
    kernels.attend_kernel[(layout.tiles * layout.splits, kv_heads, batch)](
        q, k_cache, v_cache, out, parts, lses, call.block_table, call.cache_seqlens, *q.stride()[:3],
        call.block_table.stride(0), q_len, added, layout.splits, window, *_factors(call.scale, call.softcap),
        groups, kv_heads, page_size=page_size, softcapped=call.softcap > 0,
        num_warps=layout.warps, num_stages=layout.stages, **_FUSED, **common,
    )  # fmt: skip
    if layout.splits > 1:
        merged_rows = min(layout.block_m, _MERGED_VALUES // block_d)
        kernels.merge_kernel[(-(-q_len * groups // merged_rows), kv_heads, batch)](
            out, parts, lses, call.cache_seqlens, q_len, added, layout.splits, window, groups, kv_heads,
            merged_splits=_MERGED_SPLITS, merged_rows=merged_rows, num_warps=4, **_FUSED, **common,
        )  # fmt: skip
    return out


def _append(call: Call, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write a call's new keys and values after the `cache_seqlens` earlier ones in the pages."""
    batch, new, kv_heads, head_dim = k.shape
    k_cache, v_cache, table = call.k_cache, call.v_cache, call.block_table
    kernels.append_kernel[(new, batch)](
        k_cache, v_cache, k, v, table, call.cache_seqlens,
        *k.stride()[:3], *v.stride()[:3], table.stride(0), new, kv_heads,
        head_dim=head_dim, block_d=1 << (head_dim - 1).bit_length(), block_h=1 << (kv_heads - 1).bit_length(),
        page_size=k_cache.shape[1], num_warps=4, **_FUSED,
    )  # fmt: skip


def _factors(scale: float, softcap: float) -> tuple[float, float]:
    """The kernels' `scale` and `softcap`: see `triton_kernels`."""
    return (scale / softcap * 2 * _LOG2_E, softcap * _LOG2_E) if softcap else (scale * _LOG2_E, 1.0)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
