// Attention of a few new tokens over a paged cache, in one launch: head norm and rotary embedding of their queries and
// keys, keys and values into their pages, and what the queries see, up to 8 TILES of them for each KV head.
//
// The queries of a KV head are its tokens' `groups` heads, token by token: they share every key that is loaded. Keys are
// divided among blocks ("shares"), by the sequence's own length, and a share among warps, a piece of 16 keys at a time;
// online softmax as in FlashAttention-2 (Dao 2023, arXiv 2307.08691), shares as in Flash-Decoding (Dao, Haziza, Massa,
// Sizov 2023). Sums are float32, scores powers of two.
//
// Keys and values are copied asynchronously into shared memory, the first of them while the product before is still at
// work. What lane (g, t), g = lane / 4 and t = lane % 4, reads of them, 16 bytes at a time as the tensor cores want it:
// - scores are queries (the operand of 16) times keys (8): of keys g and g + 8 of a piece, dims 32 i + 8 t to + 7. The sum
//   over dims may take them in any order, so long as both sides take the same: queries are read alike.
// - the lane then has keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of query g, which is its part of the operand of 8 where values
//   are that of 16. Of the values of these keys it takes dims 64 i + 8 g to + 7, and puts two keys' halves together.
// - so it ends with those dims of queries 2 t and 2 t + 1.
//
// 384 keys of 128 sequences and 8 KV heads, H200, microseconds, beside 47 for every byte once at 4.3 TB/s:
//
// | version                                                                | predicted | measured    |
// |------------------------------------------------------------------------|-----------|-------------|
// | 1: a lane copies the 16 bytes at a time that it reads itself           |           | 66          |
// | 2: neighbouring lanes copy whole rows, into the places of the first    | 52        | 66          |
// | 3: whole rows, as they are but for a gap behind each                   |           | 56          |
// | 4: the same by the copy engine (cp.async.bulk)                         | 50        | 53 to 59    |
//
// With few sequences the fourth is slower than the third, by up to 15 %, so this is the third.
//
// Compiled with: HEAD_DIM 64, 96 or 128, TILES of 8 queries (1 or 2), WARPS a block, PAGE_SIZE a multiple of 16.

#include "device.cuh"
#include "rope.cuh"
#include "kv_tile.cuh"
#include "heads.cuh"

const u32 RESIDENT = TILES > 1 ? 12 : 16;               // warps that fit on a multiprocessor, by their registers
const u32 SHARES_AT_ONCE = 16;                          // whose sums a thread asks for together
const u32 UNITS = HEAD_DIM / 4;                         // of four dims, of a row of sums

// Mask the keys that a query must not see: those after its own, and those outside its window.
DEVICE void hide(const Lane& l, const Attention& p, const Block& b, u32 piece, float nothing, float (&s)[2][4])
{
    #pragma unroll
    for (u32 i = 0; i < 4; i++)
    {
        u32 last = b.length + token_of(b, 8 * (i >> 1) + l.g);
        #pragma unroll
        for (u32 n = 0; n < 2; n++)
        {
            u32 at = piece * PIECE + 8 * n + 2 * l.t + (i & 1);
            if (at > last || (p.window && at + p.window <= last)) s[n][i] = nothing;
        }
    }
}

struct Total { Mark mark; Four sum; };

// Add what N others saw, always in the same order.
template <u32 N> DEVICE void merge(Total& total, const Mark (&marks)[N], const Four (&sums)[N], float nothing)
{
    float higher = total.mark.peak;
    #pragma unroll
    for (u32 n = 0; n < N; n++) higher = fmaxf(higher, marks[n].peak);
    float base = higher == nothing ? 0.0f : higher;
    float decay = power_of_two(total.mark.peak - base);
    total.mark = Mark{higher, total.mark.mass * decay};
    #pragma unroll
    for (u32 i = 0; i < 4; i++) total.sum.v[i] *= decay;
    #pragma unroll
    for (u32 n = 0; n < N; n++)
    {
        float weight = power_of_two(marks[n].peak - base);
        total.mark.mass += marks[n].mass * weight;
        #pragma unroll
        for (u32 i = 0; i < 4; i++) total.sum.v[i] += sums[n].v[i] * weight;
    }
}

// Of a row and four dims: what all warps of the block saw, and all shares; of these `first` is the place of the first one's
// row, and they are `stride` apart.
DEVICE Total of_warps(const Shared& shared, u32 row, u32 dim, float nothing)
{
    Mark marks[WARPS];
    Four sums[WARPS];
    #pragma unroll
    for (u32 w = 0; w < WARPS; w++)
    {
        marks[w] = shared.marks[w][row];
        sums[w] = *(const Four*) (shared.own[w].sums[row] + dim);
    }
    Total all = {{nothing, 0.0f}, {}};
    merge(all, marks, sums, nothing);
    return all;
}

DEVICE Total of_shares(const Attention& p, u64 first, u32 stride, u32 count, u32 dim, float nothing)
{
    Total all = {{nothing, 0.0f}, {}};
    for (u32 from = 0; from < count; from += SHARES_AT_ONCE)
    {
        Mark marks[SHARES_AT_ONCE];
        Four sums[SHARES_AT_ONCE];
        #pragma unroll
        for (u32 i = 0; i < SHARES_AT_ONCE; i++)
        {
            marks[i] = Mark{nothing, 0.0f};
            sums[i] = Four{};
            if (from + i >= count) continue;
            const u64 place = first + (from + i) * stride;
            float mark[2];
            from_others(mark, p.marks + place);
            from_others(sums[i].v, p.parts + place * HEAD_DIM + dim);
            marks[i] = Mark{mark[0], mark[1]};
        }
        merge(all, marks, sums, nothing);
    }
    return all;
}

DEVICE void write(const Attention& p, const Block& b, u32 row, u32 dim, const Total& total)
{
    u32 token = token_of(b, row), head = b.kv_head * p.groups + row - token * p.groups;
    float factor = reciprocal(total.mark.mass);
    const float (&sum)[4] = total.sum.v;
    u64 words = to_halves(sum[0] * factor, sum[1] * factor) | (u64) to_halves(sum[2] * factor, sum[3] * factor) << 32;
    u16* out = p.out + (u64) (b.sequence * b.rope.tokens + token) * b.rope.heads * HEAD_DIM;
    const u32 at = head * HEAD_DIM + dim;
    if (!p.places)
    {
        *(u64*) (out + at) = words;
        return;
    }
    const u64 places = *(const u64*) (p.places + at);
    #pragma unroll
    for (u32 i = 0; i < 64; i += 16) out[(u16) (places >> i)] = (u16) (words >> i);
}

// Grid: shares at most, KV heads, sequences.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS) attend(const Attention p)
{
    let_next_start();
    Shared& shared = *(Shared*) shared_memory;
    const float nothing = to_float(0xfc00);     // minus infinity
    const u32 warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
    const Lane l = {lane, lane / 4, lane % 4};

    // What is read here, before the kernels before this one have ended, none of them writes: lengths and tables were
    // copied before the first of them began, and what is in the cache at positions before `length` is of passes before.
    Block b;
    b.rope = p.rope;
    b.rope.head_dim = HEAD_DIM;
    b.rope.page_size = PAGE_SIZE;
    b.kv_head = blockIdx.y;
    b.sequence = blockIdx.z;
    b.rows = p.rope.tokens * p.groups;
    b.inverse = (255 + p.groups) / p.groups;
    b.length = (u32) p.rope.lengths[b.sequence];
    const Rope& r = b.rope;
    const u32 length = b.length, total = length + r.tokens;
    // Shares are cut before the piece in which the new keys begin: they belong to one share, with all that come after.
    const u32 first = p.window && length >= p.window ? (length + 1 - p.window) / PIECE : 0;
    const u32 count = length / PIECE + 1 - first;
    const u32 share = blockIdx.x, active = min(gridDim.x, (count + p.least - 1) / p.least);
    if (share >= active) return;
    const bool last = share + 1 == active;
    b.heads = b.rows + (last ? 2 * r.tokens : 0);
    u32 piece = first + share * count / active + warp;
    const u32 end = last ? (total + PIECE - 1) / PIECE : first + (share + 1) * count / active;

    const u32 stride = r.kv_heads * HEAD_DIM;
    Own& own = shared.own[warp];
    u32 page = 0;
    if (piece < end)
    {
        const u64 at = place_in(r, page_of(r, b.sequence, piece * PIECE), piece * PIECE, b.kv_head);
        copy_rows(l, own.keys, r.keys + at, stride);
        copies_commit();
        copy_rows(l, own.values, r.values + at, stride);
        copies_commit();
        // The page of a piece is read a step ahead, so that addresses need not be waited for.
        if (piece + WARPS < end) page = page_of(r, b.sequence, (piece + WARPS) * PIECE);
    }
    Head mine[HEADS_AT_ONCE];
    begin(p, b, lane, warp, mine);

    wait_for_inputs();
    for (u32 from = warp;;)
    {
        finish(b, lane, from, mine, shared);
        from += HEADS_AT_ONCE * WARPS;
        if (from >= b.heads) break;
        begin(p, b, lane, from, mine);
    }
    __syncthreads();

    Mark marks[TILES];
    Sums sums;
    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++)
    {
        marks[tile] = Mark{nothing, 0.0f};
        #pragma unroll
        for (u32 i = 0; i < VALUE_UNITS; i++)
            #pragma unroll
            for (u32 j = 0; j < VALUE_WORDS; j++)
                #pragma unroll
                for (u32 n = 0; n < 4; n++) sums[tile][i][j][n] = 0.0f;
    }
    #pragma unroll 1
    for (; piece < end; piece += WARPS)
    {
        const u32 next = piece + WARPS;
        const u64 at = place_in(r, page, next * PIECE, b.kv_head);
        if (next + WARPS < end) page = page_of(r, b.sequence, (next + WARPS) * PIECE);
        const bool fresh = (piece + 1) * PIECE > length;
        copies_wait<1>();
        __syncwarp();
        if (fresh) renew_keys(l, shared, own, piece, length, r.tokens);
        float s[2][4];
        multiply(l, shared, own, s);
        __syncwarp();
        if (next < end) copy_rows(l, own.keys, r.keys + at, stride);
        copies_commit();
        #pragma unroll
        for (u32 i = 0; i < 8; i++)
        {
            float& score = s[i / 4][i % 4];
            score *= p.scale;
            if (p.softcap != 0.0f) score = p.softcap * (1.0f - 2.0f * reciprocal(power_of_two(score) + 1.0f));
        }
        if (fresh || (p.window && piece * PIECE + p.window < total)) hide(l, p, b, piece, nothing, s);
        u32 weights[TILES][2];
        float decay[TILES];
        #pragma unroll
        for (u32 tile = 0; tile < TILES; tile++)
        {
            float &w0 = s[0][2 * tile], &w1 = s[0][2 * tile + 1], &w2 = s[1][2 * tile], &w3 = s[1][2 * tile + 1];
            decay[tile] = soften(w0, w1, w2, w3, marks[tile], nothing);
            weights[tile][0] = nearest_halves(w0, w1);
            weights[tile][1] = nearest_halves(w2, w3);
        }
        copies_wait<1>();
        __syncwarp();
        if (fresh) renew_values(l, shared, own, piece, length, r.tokens);
        accumulate(l, own, weights, decay, sums);
        __syncwarp();
        if (next < end) copy_rows(l, own.values, r.values + at, stride);
        copies_commit();
    }

    __syncwarp();
    store_sums(l, b.rows, marks, sums, own, shared.marks[warp]);
    __syncthreads();

    const u32 head = b.sequence * r.kv_heads + b.kv_head;
    const u64 before = (u64) head * gridDim.x * b.rows;
    for (u32 unit = threadIdx.x; unit < b.rows * UNITS; unit += WARPS * 32)
    {
        const u32 row = unit / UNITS, dim = unit % UNITS * 4;
        const Total all = of_warps(shared, row, dim, nothing);
        if (active == 1) write(p, b, row, dim, all);
        else
        {
            const u64 place = before + share * b.rows + row;
            *(Four*) (p.parts + place * HEAD_DIM + dim) = all.sum;
            if (dim == 0) p.marks[place] = all.mark;
        }
    }
    if (active == 1) return;

    // Whichever share of a sequence and KV head comes last puts them together, all in the order of their keys.
    __syncthreads();
    if (threadIdx.x == 0) shared.order = arrive(p.arrived + head);
    __syncthreads();
    if (shared.order + 1 < active) return;
    if (threadIdx.x == 0) p.arrived[head] = 0;
    for (u32 unit = threadIdx.x; unit < b.rows * UNITS; unit += WARPS * 32)
    {
        const u32 row = unit / UNITS, dim = unit % UNITS * 4;
        write(p, b, row, dim, of_shares(p, before + row, b.rows, active, dim, nothing));
    }
}
