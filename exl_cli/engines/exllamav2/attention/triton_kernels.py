# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels of attention over a paged KV cache: the device side of `launch`.

Tiled attention with an online softmax after Dao, FlashAttention-2 (arXiv 2307.08691), its keys divided among programs
for decoding as in Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023).

A program takes a tile of query rows of one KV head. The rows of a KV head are its `q_len * groups` queries, token by
token, so a key is loaded once for all queries that share it. The keys of a tile may be divided into shares ("splits").
Their bounds depend on the sequence's actual length, which only the device knows; the host just chooses the most splits.
The results of a share, a normalized output and the log2 of its sum of exponentials, are merged by `merge_kernel`. New
keys and values are written to the pages beforehand, by `append_kernel`.

All scores are in powers of two: `scale` carries a factor log2(e). Where scores are capped, the product with `scale` is
2 / softcap * log2(e) times the dot product and `softcap` carries log2(e), so that one exp2 makes the tanh.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile_blocks(
    tile, total, q_len, groups, window, block_m: tl.constexpr, block_n: tl.constexpr, windowed: tl.constexpr
):  # fmt: skip
    """The range of key blocks that a tile's queries see, and the end of the plain ones.

    In a plain block every key precedes every query of the tile, so it needs no causal mask.
    """
    rows = q_len * groups
    past = total - q_len
    first = past + (tile * block_m) // groups
    last = past + (tl.minimum(tile * block_m + block_m, rows) - 1) // groups
    start = 0
    if windowed:
        start = tl.maximum(first - window + 1, 0) // block_n
    stop = tl.cdiv(tl.maximum(last + 1, 0), block_n)
    return start, tl.maximum(stop, start), tl.maximum(first + 1, 0) // block_n


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
    """Clamp to float16's range: softmax weights are rounded, so a weighted average may exceed every value."""
    return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_of(b, r, kv_head, q_len, groups, kv_heads):
    """Where the rows of a KV head's queries lie in the output, in heads."""
    return (b * q_len + r // groups) * groups * kv_heads + kv_head * groups + r % groups


@triton.jit(do_not_specialize=["q_len", "added", "splits", "window", "table_b"])
def attend_kernel(
    q, k_cache, v_cache, out, parts, lses, table, lengths, q_b, q_t, q_h, table_b,
    q_len, added, splits, window, scale, softcap, groups, kv_heads,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    page_size: tl.constexpr, windowed: tl.constexpr, softcapped: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * splits, kv_heads, batch). Strides end in what they step over: batch, token or head.

    A sequence has `lengths` + `added` keys.
    """
    tiles = tl.num_programs(0) // splits
    # The last tile sees the most keys: it starts first.
    tile = tiles - 1 - tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)

    total = tl.load(lengths + b) + added
    start, stop, sure = _tile_blocks(tile, total, q_len, groups, window, block_m, block_n, windowed)
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
    cell = (kv_head + n[:, None] * kv_heads) * head_dim + d[None, :]

    peak = tl.full([block_m], float("-inf"), tl.float32)
    mass = tl.zeros([block_m], tl.float32)
    acc = tl.zeros([block_m, block_d], tl.float32)

    # The page of a block is read one step ahead, so that its keys' addresses need not be waited for.
    page = tl.load(row_of_table + low * block_n // page_size, mask=low < plain, other=0).to(tl.int64)
    for block in tl.range(low, plain):
        at = block * block_n
        block_cell = (page * page_size + at % page_size) * kv_heads * head_dim + cell
        if head_dim == block_d:
            k = tl.load(k_cache + block_cell)
            v = tl.load(v_cache + block_cell)
        else:
            k = tl.load(k_cache + block_cell, mask=in_dim[None, :], other=0.0)
            v = tl.load(v_cache + block_cell, mask=in_dim[None, :], other=0.0)
        after = (block + 1) * block_n
        page = tl.load(row_of_table + after // page_size, mask=block + 1 < plain, other=0).to(tl.int64)
        s = _scores(queries, k, scale, softcap, softcapped)
        if windowed:
            s = tl.where((at + n)[None, :] > position[:, None] - window, s, float("-inf"))
        peak, mass, acc = _accumulate(s, v, peak, mass, acc)

    # The blocks with keys that some query must not see: the contents past the end are undefined.
    for block in tl.range(plain, high, num_stages=1):
        at = block * block_n
        page = tl.load(row_of_table + at // page_size).to(tl.int64)
        block_cell = (page * page_size + at % page_size) * kv_heads * head_dim + cell
        key = at + n
        there = (key < total)[:, None] & in_dim[None, :]
        k = tl.load(k_cache + block_cell, mask=there, other=0.0)
        v = tl.load(v_cache + block_cell, mask=there, other=0.0)
        s = _scores(queries, k, scale, softcap, softcapped)
        seen = key[None, :] <= position[:, None]
        if windowed:
            seen = seen & (key[None, :] > position[:, None] - window)
        peak, mass, acc = _accumulate(tl.where(seen, s, float("-inf")), v, peak, mass, acc)

    empty = mass == 0.0
    mass = tl.where(empty, 1.0, mass)
    acc = acc / mass[:, None]
    if active == 1:
        target = out + _row_of(b, r, kv_head, q_len, groups, kv_heads) * head_dim
        tl.store(target[:, None] + d[None, :], _finite(acc).to(out.dtype.element_ty), mask=real)
    else:
        # Laid out (batch, kv_heads, splits, rows, head_dim).
        row = ((b * kv_heads + kv_head) * splits + split) * rows + r
        tl.store(parts + (row * head_dim)[:, None] + d[None, :], acc, mask=real)
        tl.store(lses + row, tl.where(empty, float("-inf"), peak + tl.log2(mass)), mask=r < rows)


@triton.jit(do_not_specialize=["q_len", "added", "splits", "window"])
def merge_kernel(
    out, parts, lses, lengths, q_len, added, splits, window, groups, kv_heads,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    windowed: tl.constexpr, merged_splits: tl.constexpr, merged_rows: tl.constexpr,
):  # fmt: skip
    """Merge the shares that `attend_kernel` left of rows, where there are several.

    Grid: (rows / merged_rows, kv_heads, batch); merged_rows divides block_m.
    """
    first = tl.program_id(0) * merged_rows
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    total = tl.load(lengths + b) + added
    start, stop, _ = _tile_blocks(first // block_m, total, q_len, groups, window, block_m, block_n, windowed)
    active = tl.minimum(stop - start, splits)
    if active <= 1:
        return
    rows = q_len * groups
    before = (b * kv_heads + kv_head) * splits * rows
    r = first + tl.arange(0, merged_rows)
    d = tl.arange(0, block_d)
    n = tl.arange(0, merged_splits)
    peak = tl.full([merged_rows], float("-inf"), tl.float32)
    mass = tl.zeros([merged_rows], tl.float32)
    acc = tl.zeros([merged_rows, block_d], tl.float32)
    for at in range(0, active, merged_splits):
        row = before + (at + n).to(tl.int64)[:, None] * rows + r[None, :]
        there = (at + n < active)[:, None] & (r < rows)[None, :]
        lse = tl.load(lses + row, mask=there, other=float("-inf"))
        cell = row[:, :, None] * head_dim + d[None, None, :]
        values = tl.load(parts + cell, mask=there[:, :, None] & (d < head_dim)[None, None, :], other=0.0)
        higher = tl.maximum(peak, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(lse - base[None, :])
        decay = tl.exp2(peak - base)
        mass = mass * decay + tl.sum(weight, 0)
        acc = acc * decay[:, None] + tl.sum(values * weight[:, :, None], 0)
        peak = higher
    acc = _finite(acc / tl.where(mass == 0.0, 1.0, mass)[:, None])
    target = out + _row_of(b, r, kv_head, q_len, groups, kv_heads) * head_dim
    real = (r < rows)[:, None] & (d < head_dim)[None, :]
    tl.store(target[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["q_len", "table_b"])
def append_kernel(
    k_cache, v_cache, k_new, v_new, table, lengths,
    kn_b, kn_t, kn_h, vn_b, vn_t, vn_h, table_b, q_len, kv_heads,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_h: tl.constexpr, page_size: tl.constexpr,
):  # fmt: skip
    """Write new keys and values after those in the pages. Grid: (q_len, batch), one position a program."""
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    at = tl.load(lengths + b) + i
    page = tl.load(table + b * table_b + at // page_size).to(tl.int64)
    h = tl.arange(0, block_h)[:, None]
    d = tl.arange(0, block_d)[None, :]
    real = (h < kv_heads) & (d < head_dim)
    cell = ((page * page_size + at % page_size) * kv_heads + h) * head_dim + d
    late = i.to(tl.int64)
    k = tl.load(k_new + b * kn_b + late * kn_t + h * kn_h + d, mask=real)
    v = tl.load(v_new + b * vn_b + late * vn_t + h * vn_h + d, mask=real)
    tl.store(k_cache + cell, k, mask=real)
    tl.store(v_cache + cell, v, mask=real)
