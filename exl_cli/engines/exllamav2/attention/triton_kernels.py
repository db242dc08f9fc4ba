# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels of attention over a paged KV cache: the device side of `launch`.

Tiled attention with an online softmax after Dao, FlashAttention-2 (arXiv 2307.08691), its keys divided among programs
for decoding as in Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023).

A program takes a tile of query rows of one KV head. The rows of a KV head are its `q_len * groups` queries, token by
token, so that all queries that share a key are computed on one load of it, and a tile may take a share ("split") of
its keys only. Shares are cut by the sequence's actual length, which only the device knows; the host chooses no more
than how many there may be. What each share found, a normalised output and the log2 of its sum of exponentials, is
merged either by whichever program of a tile comes last (`merges`), or by `merge_kernel`.

All scores are in powers of two: `scale` carries a factor log2(e). Where scores are capped, the product with `scale` is
2 / softcap * log2(e) times the dot product and `softcap` carries log2(e), so that one exp2 makes the tanh.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Splits merged per step, and float32 values per split of that step: together what fits into registers.
MERGED_SPLITS = 16
MERGED_VALUES = 512


@triton.jit
def _tile_blocks(
    tile, total, q_len, groups, window,
    block_m: tl.constexpr, block_n: tl.constexpr, windowed: tl.constexpr, appends: tl.constexpr,
):  # fmt: skip
    """The blocks of keys that a tile's queries see: first, one past the last, and one past the last of the plain ones.

    A plain block is in the cache entirely and lies before every query of the tile.
    """
    rows = q_len * groups
    past = total - q_len
    first = past + (tile * block_m) // groups
    last = past + (tl.minimum(tile * block_m + block_m, rows) - 1) // groups
    sure = first + 1
    begin = 0
    if windowed:
        begin = tl.maximum(first - window + 1, 0)
    if appends:
        # The last tile writes the new keys, so it must come across all of them, in or out of its window.
        sure = past
        begin = tl.minimum(begin, past)
    start = begin // block_n
    stop = tl.cdiv(tl.maximum(last + 1, 0), block_n)
    return start, tl.maximum(stop, start), tl.maximum(sure, 0) // block_n


@triton.jit
def _scores(q, k, scale, softcap, softcapped: tl.constexpr):
    s = tl.dot(q, tl.trans(k)) * scale
    if softcapped:
        s = softcap * (1.0 - 2.0 / (tl.exp2(s) + 1.0))
    return s


@triton.jit
def _accumulate(s, v, peak, mass, acc):
    """One step of the online softmax. A row that has seen no key yet has peak -inf, and stays zero."""
    higher = tl.maximum(peak, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - base[:, None])
    decay = tl.exp2(peak - base)
    mass = mass * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
    return higher, mass, acc


@triton.jit
def _finite(x):
    """Within float16's range: weights are rounded for the product, so that an average may exceed what it is of."""
    return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _merge_rows(
    parts, lses, out, o_t, o_h, kv_head, first, stop, rows, groups, active,
    head_dim: tl.constexpr, block_d: tl.constexpr, merged_rows: tl.constexpr, merged_splits: tl.constexpr,
):  # fmt: skip
    """Merge the `active` shares of rows [first, first + merged_rows), those before `stop`, and write the output.

    `parts` and `lses` point to where the sequence's KV head begins, `out` to where the sequence does.
    """
    r = first + tl.arange(0, merged_rows)
    d = tl.arange(0, block_d)
    n = tl.arange(0, merged_splits)
    real = (r < stop)[:, None] & (d < head_dim)[None, :]
    peak = tl.full([merged_rows], float("-inf"), tl.float32)
    mass = tl.zeros([merged_rows], tl.float32)
    acc = tl.zeros([merged_rows, block_d], tl.float32)
    for at in range(0, active, merged_splits):
        row = (at + n).to(tl.int64)[:, None] * rows + r[None, :]
        there = (at + n < active)[:, None] & (r < stop)[None, :]
        # Other multiprocessors wrote these: read from the second-level cache that all share.
        lse = tl.load(lses + row, mask=there, other=float("-inf"), cache_modifier=".cg")
        cell = row[:, :, None] * head_dim + d[None, None, :]
        inside = there[:, :, None] & (d < head_dim)[None, None, :]
        values = tl.load(parts + cell, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(lse - base[None, :])
        decay = tl.exp2(peak - base)
        mass = mass * decay + tl.sum(weight, 0)
        acc = acc * decay[:, None] + tl.sum(values * weight[:, :, None], 0)
        peak = higher
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    target = out + (r // groups).to(tl.int64) * o_t + (kv_head * groups + r % groups) * o_h
    tl.store(target[:, None] + d[None, :], _finite(acc).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["q_len", "added", "splits", "window", "table_b"])
def attend_kernel(
    q, k_cache, v_cache, k_new, v_new, out, parts, lses, counters, table, lengths,
    q_b, q_t, q_h, kc_p, kc_t, kc_h, vc_p, vc_t, vc_h, kn_b, kn_t, kn_h, vn_b, vn_t, vn_h, o_b, o_t, o_h, table_b,
    q_len, added, splits, window, scale, softcap, groups, kv_heads,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    page_size: tl.constexpr, windowed: tl.constexpr, softcapped: tl.constexpr,
    appends: tl.constexpr, merges: tl.constexpr, merged_splits: tl.constexpr, merged_rows: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * splits, kv_heads, batch). Strides end in what they step over: batch, page, token or head.

    A sequence has `lengths` + `added` keys. With `appends`, the last `q_len` of them come from k_new and v_new, and
    are put into the cache.
    """
    tiles = tl.num_programs(0) // splits
    # The last tile sees the most keys: it starts first.
    tile = tiles - 1 - tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)

    total = tl.load(lengths + b) + added
    start, stop, sure = _tile_blocks(tile, total, q_len, groups, window, block_m, block_n, windowed, appends)
    count = stop - start
    active = tl.maximum(tl.minimum(count, splits), 1)
    if split >= active:
        return
    low = start + split * count // active
    high = start + (split + 1) * count // active
    plain = tl.maximum(tl.minimum(high, sure), low)

    rows = q_len * groups
    past = total - q_len
    r = tile * block_m + tl.arange(0, block_m)
    d = tl.arange(0, block_d)
    n = tl.arange(0, block_n)
    position = past + r // groups
    head = kv_head * groups + r % groups
    in_dim = d < head_dim
    real = (r < rows)[:, None] & in_dim[None, :]
    q_row = q + b * q_b + (r // groups).to(tl.int64) * q_t + head * q_h
    queries = tl.load(q_row[:, None] + d[None, :], mask=real, other=0.0)
    row_of_table = table + b * table_b
    k_cell = kv_head * kc_h + n[:, None] * kc_t + d[None, :]
    v_cell = kv_head * vc_h + n[:, None] * vc_t + d[None, :]

    peak = tl.full([block_m], float("-inf"), tl.float32)
    mass = tl.zeros([block_m], tl.float32)
    acc = tl.zeros([block_m, block_d], tl.float32)

    # The page of a block is read one step ahead, so that its keys' addresses need not be waited for.
    page = tl.load(row_of_table + low * block_n // page_size, mask=low < plain, other=0).to(tl.int64)
    for block in tl.range(low, plain):
        at = block * block_n
        k_block = k_cache + page * kc_p + (at % page_size).to(tl.int64) * kc_t
        v_block = v_cache + page * vc_p + (at % page_size).to(tl.int64) * vc_t
        if head_dim == block_d:
            k = tl.load(k_block + k_cell)
            v = tl.load(v_block + v_cell)
        else:
            k = tl.load(k_block + k_cell, mask=in_dim[None, :], other=0.0)
            v = tl.load(v_block + v_cell, mask=in_dim[None, :], other=0.0)
        after = (block + 1) * block_n
        page = tl.load(row_of_table + after // page_size, mask=block + 1 < plain, other=0).to(tl.int64)
        s = _scores(queries, k, scale, softcap, softcapped)
        if windowed:
            s = tl.where((at + n)[None, :] > position[:, None] - window, s, float("-inf"))
        peak, mass, acc = _accumulate(s, v, peak, mass, acc)

    # The blocks with keys that some query must not see, or that are new: what lies behind the end may be anything.
    for block in tl.range(plain, high, num_stages=1):
        at = block * block_n
        page = tl.load(row_of_table + at // page_size).to(tl.int64)
        k_block = k_cache + page * kc_p + (at % page_size).to(tl.int64) * kc_t
        v_block = v_cache + page * vc_p + (at % page_size).to(tl.int64) * vc_t
        key = at + n
        there = (key < total)[:, None] & in_dim[None, :]
        if appends:
            fresh = (key >= past)[:, None]
            late = (key - past)[:, None]
            k_late = k_new + b * kn_b + kv_head * kn_h + late * kn_t + d[None, :]
            v_late = v_new + b * vn_b + kv_head * vn_h + late * vn_t + d[None, :]
            k = tl.load(tl.where(fresh, k_late, k_block + k_cell), mask=there, other=0.0)
            v = tl.load(tl.where(fresh, v_late, v_block + v_cell), mask=there, other=0.0)
            # One program alone has both this block and the last tile. The others read the new keys where it does.
            if tile == tiles - 1:
                tl.store(k_block + k_cell, k, mask=there & fresh)
                tl.store(v_block + v_cell, v, mask=there & fresh)
        else:
            k = tl.load(k_block + k_cell, mask=there, other=0.0)
            v = tl.load(v_block + v_cell, mask=there, other=0.0)
        s = _scores(queries, k, scale, softcap, softcapped)
        seen = key[None, :] <= position[:, None]
        if windowed:
            seen = seen & (key[None, :] > position[:, None] - window)
        peak, mass, acc = _accumulate(tl.where(seen, s, float("-inf")), v, peak, mass, acc)

    empty = mass == 0.0
    mass = tl.where(empty, 1.0, mass)
    acc = acc / mass[:, None]
    out += b * o_b
    if active == 1:
        target = out + (r // groups).to(tl.int64) * o_t + head * o_h
        tl.store(target[:, None] + d[None, :], _finite(acc).to(out.dtype.element_ty), mask=real)
    else:
        # Laid out (batch, kv_heads, splits, rows, head_dim).
        before = (b * kv_heads + kv_head) * splits * rows
        row = before + split * rows + r
        tl.store(parts + (row * head_dim)[:, None] + d[None, :], acc, mask=real)
        tl.store(lses + row, tl.where(empty, float("-inf"), peak + tl.log2(mass)), mask=r < rows)
        if merges:
            # All threads have written before one of them says so, and what it releases includes the others' writes.
            tl.debug_barrier()
            counter = counters + (b * kv_heads + kv_head) * tiles + tile
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == active - 1:
                tl.store(counter, 0)
                end = tl.minimum(tile * block_m + block_m, rows)
                for first in range(tile * block_m, end, merged_rows):
                    _merge_rows(
                        parts + before * head_dim, lses + before, out, o_t, o_h, kv_head, first, end, rows,
                        groups, active, head_dim, block_d, merged_rows, merged_splits,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "added", "splits", "window"])
def merge_kernel(
    out, parts, lses, lengths, o_b, o_t, o_h, q_len, added, splits, window, groups, kv_heads,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    windowed: tl.constexpr, appends: tl.constexpr, merged_splits: tl.constexpr, merged_rows: tl.constexpr,
):  # fmt: skip
    """Merge what `attend_kernel` left. Grid: (rows / merged_rows, kv_heads, batch); merged_rows divides block_m."""
    first = tl.program_id(0) * merged_rows
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    total = tl.load(lengths + b) + added
    start, stop, _ = _tile_blocks(first // block_m, total, q_len, groups, window, block_m, block_n, windowed, appends)
    active = tl.minimum(stop - start, splits)
    if active > 1:
        rows = q_len * groups
        before = (b * kv_heads + kv_head) * splits * rows
        _merge_rows(
            parts + before * head_dim, lses + before, out + b * o_b, o_t, o_h, kv_head, first, rows, rows,
            groups, active, head_dim, block_d, merged_rows, merged_splits,
        )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "table_b"])
def append_kernel(
    k_cache, v_cache, k_new, v_new, table, lengths,
    kc_p, kc_t, kc_h, vc_p, vc_t, vc_h, kn_b, kn_t, kn_h, vn_b, vn_t, vn_h, table_b, q_len, kv_heads,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_h: tl.constexpr, page_size: tl.constexpr,
):  # fmt: skip
    """Write new keys and values behind what the pages hold. Grid: (q_len, batch), one position a program."""
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    at = tl.load(lengths + b) + i
    page = tl.load(table + b * table_b + at // page_size).to(tl.int64)
    h = tl.arange(0, block_h)[:, None]
    d = tl.arange(0, block_d)[None, :]
    real = (h < kv_heads) & (d < head_dim)
    within = (at % page_size).to(tl.int64)
    late = i.to(tl.int64)
    k = tl.load(k_new + b * kn_b + late * kn_t + h * kn_h + d, mask=real)
    v = tl.load(v_new + b * vn_b + late * vn_t + h * vn_h + d, mask=real)
    tl.store(k_cache + page * kc_p + within * kc_t + h * kc_h + d, k, mask=real)
    tl.store(v_cache + page * vc_p + within * vc_t + h * vc_h + d, v, mask=real)
