// A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538) but for its matrix products: the choice of each token's
// experts, copies of its row for them, and the sum of their outputs. A "slot" is a token with one of its experts. Slots are
// sorted by expert, then by token, as `gemm.cu` takes consecutive rows of an expert.

#define EXPERTS 1
#include "device.cuh"
#include "matrix.cuh"

// Compiled with MOST_EXPERTS and MOST_ROWS, tokens at once; multiples of 32.
const u32 OF_A_LANE = MOST_EXPERTS / 32, MASKS = MOST_ROWS / 32;

struct Route
{
    const u16* logits;      // half, a row of `experts` for each token
    float* weights;         // `chosen` of each token, the largest first
    u32* places;            // the slot of each of those
    u32* sources;           // of each slot: token | expert << 16
    RowTile* tiles;
    u32* row_tiles;         // the number of tiles
    u32 rows, experts, chosen, tile_rows, normalized;
};

// Greater for a larger logit, among equal ones for a lower expert: no two keys of a row are equal, and none is zero.
DEVICE u32 key_of(u16 logit, u32 expert)
{
    return (u32) (u16) (logit & 0x8000 ? ~logit : logit | 0x8000) << 16 | (0xffff - expert);
}
DEVICE u32 expert_of(u32 key) { return 0xffff - (key & 0xffff); }
DEVICE float logit_of(u32 key)
{
    const u32 half = key >> 16;
    return to_float((u16) (half & 0x8000 ? half ^ 0x8000 : ~half));
}
DEVICE float share_of(u32 key, float largest) { return power_of_two(1.4426950408889634f * (logit_of(key) - largest)); }

// Softmax, its `chosen` largest (of equal ones the lowest expert's first), and the order of all slots. A single block, a
// warp a token. Atomics only set bits, so the result is always the same.
extern "C" __global__ void __launch_bounds__(1024) route(const Route p)
{
    u32* masks = (u32*) shared_memory;              // for each expert a bit of each token
    u32* counts = masks + p.experts * MASKS;        // slots of each expert
    u32* begins = counts + p.experts;               // its first one
    const u32 lane = threadIdx.x % 32, slots = p.rows * p.chosen;
    let_next_start();
    for (u32 i = threadIdx.x; i < p.experts * MASKS; i += blockDim.x) masks[i] = 0;
    __syncthreads();
    wait_for_inputs();
    for (u32 row = threadIdx.x / 32; row < p.rows; row += blockDim.x / 32)
    {
        u32 keys[OF_A_LANE], mine = 0;
        #pragma unroll
        for (u32 n = 0; n < OF_A_LANE; n++)
        {
            const u32 expert = n * 32 + lane;
            keys[n] = expert < p.experts ? key_of((u16) saturate(p.logits[row * p.experts + expert]), expert) : 0;
        }
        float largest = 0.0f, sum = 0.0f;
        for (u32 j = 0; j < p.chosen; j++)
        {
            u32 best = 0;
            #pragma unroll
            for (u32 n = 0; n < OF_A_LANE; n++) best = max(best, keys[n]);
            best = warp_max(best);
            if (lane == j) mine = best;
            if (j == 0)
            {
                largest = logit_of(best);
                #pragma unroll
                for (u32 n = 0; n < OF_A_LANE; n++) sum += keys[n] ? share_of(keys[n], largest) : 0.0f;
            }
            #pragma unroll
            for (u32 n = 0; n < OF_A_LANE; n++) keys[n] = keys[n] == best ? 0 : keys[n];
        }
        const bool takes = lane < p.chosen;
        const float share = takes ? share_of(mine, largest) : 0.0f;
        sum = warp_sum(p.normalized ? share : sum);
        if (takes)
        {
            const u32 at = row * p.chosen + lane, expert = expert_of(mine);
            p.weights[at] = share / sum;
            p.places[at] = expert;
            add_shared(masks + expert * MASKS + row / 32, 1u << row % 32);
        }
    }
    __syncthreads();
    for (u32 expert = threadIdx.x; expert < p.experts; expert += blockDim.x)
    {
        u32 count = 0;
        for (u32 i = 0; i < MASKS; i++) count += ones(masks[expert * MASKS + i]);
        counts[expert] = count;
    }
    __syncthreads();
    for (u32 expert = threadIdx.x; expert < p.experts; expert += blockDim.x)
    {
        u32 begin = 0, tile = 0;
        for (u32 before = 0; before < expert; before++)
        {
            begin += counts[before];
            tile += (counts[before] + p.tile_rows - 1) / p.tile_rows;
        }
        begins[expert] = begin;
        const u32 end = begin + counts[expert];
        for (u32 first = begin; first < end; first += p.tile_rows)
            p.tiles[tile++] = RowTile{expert, first, min(first + p.tile_rows, end)};
        if (expert + 1 == p.experts) *p.row_tiles = tile;
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < slots; at += blockDim.x)
    {
        const u32 row = at / p.chosen, expert = p.places[at], *mask = masks + expert * MASKS;
        u32 slot = begins[expert] + ones(mask[row / 32] & ((1u << row % 32) - 1));
        for (u32 i = 0; i < row / 32; i++) slot += ones(mask[i]);
        p.places[at] = slot;
        p.sources[slot] = row | expert << 16;
    }
}

struct Dispatch
{
    const u16* x;           // rows of `dim` numbers, a multiple of 8
    const u32* sources;     // of each slot: row | expert << 16
    const Matrix* matrix;   // two of each expert, which say where their rows lie and in which order
    u32 dim, orders;        // orders of the input: 2 if gates want another than what they gate
    u32 wgmma;              // whether the products are computed with WGMMA
};

// Copy a slot's row, in the order that each of its expert's matrices wants. A block a slot.
extern "C" __global__ void __launch_bounds__(512) dispatch(const Dispatch p)
{
    u16* y = (u16*) shared_memory;
    let_next_start();
    wait_for_inputs();
    const u32 source = p.sources[blockIdx.x], stride = blockDim.x * 8;
    const u16* x = p.x + (u64) (source & 0xffff) * p.dim;
    for (u32 i = threadIdx.x * 8; i < p.dim; i += stride) *(Words*) (y + i) = *(const Words*) (x + i);
    __syncthreads();
    for (u32 n = 0; n < p.orders; n++)
    {
        const Matrix& m = p.matrix[(source >> 16) * 2 + n];
        u16* to = (u16*) m.x + (u64) blockIdx.x * p.dim;
        const u16* perm = m.perm;
        for (u32 i = threadIdx.x * 8; i < p.dim; i += stride)
        {
            Words o = p.wgmma ? eight_for_wgmma(y, i) : *(const Words*) (y + i);
            if (perm)
            {
                const Words from = p.wgmma ? eight_for_wgmma(perm, i) : *(const Words*) (perm + i);
                o = Words{gather(y, from.x), gather(y, from.y), gather(y, from.z), gather(y, from.w)};
            }
            *(Words*) (to + i) = o;
        }
    }
}

struct Combine
{
    const u16* outs;        // a row of `dim` numbers, a multiple of 8, for each slot, and for each split of the products
    const float* weights;
    const u32* places;
    u16* to;                // a row for each token, to which is added
    u32 dim, chosen, splits, split_rows;
};

DEVICE void add_halves(float* sums, u32 w, float factor)
{
    sums[0] += factor * to_float((u16) w);
    sums[1] += factor * to_float((u16) (w >> 16));
}
DEVICE void add_halves(float (&sums)[8], Words w, float factor)
{
    add_halves(sums, w.x, factor);
    add_halves(sums + 2, w.y, factor);
    add_halves(sums + 4, w.z, factor);
    add_halves(sums + 6, w.w, factor);
}

// Add the outputs of a token's experts, times their weights, to its row: the largest weight's first. A block a token.
extern "C" __global__ void __launch_bounds__(512) combine(const Combine p)
{
    let_next_start();
    wait_for_inputs();
    const u32 first = blockIdx.x * p.chosen;
    u16* to = p.to + (u64) blockIdx.x * p.dim;
    for (u32 i = threadIdx.x * 8; i < p.dim; i += blockDim.x * 8)
    {
        float sums[8] = {};
        add_halves(sums, saturate(*(const Words*) (to + i)), 1.0f);
        #pragma unroll 4
        for (u32 n = 0; n < p.chosen * p.splits; n++)
        {
            const u32 at = first + n / p.splits, row = p.places[at] + n % p.splits * p.split_rows;
            add_halves(sums, *(const Words*) (p.outs + (u64) row * p.dim + i), p.weights[at]);
        }
        *(Words*) (to + i) = Words{to_halves(sums[0], sums[1]), to_halves(sums[2], sums[3]), to_halves(sums[4], sums[5]),
                                   to_halves(sums[6], sums[7])};
    }
}
