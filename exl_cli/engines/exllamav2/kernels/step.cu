// What stands between the matrix products of a decode step. Rows are tokens; numbers are half, sums float32.

#include "device.cuh"
#include "rope.cuh"
#include "matrix.cuh"

const u32 MOST_WARPS = 16;
const u32 MOST_OUTS = 3;    // of a norm
const u32 AT_ONCE = 4;      // words that a thread asks for together

struct Norm
{
    u16* x;                 // infinities in it become the largest finite halves
    const u16* weight;      // or null: no norm, the numbers as they are
    u16* out[MOST_OUTS];
    const u16* perm[MOST_OUTS]; // out[i][j] comes from place perm[i][j]; or null: from j
    float epsilon;
    u32 dim, outs;          // dim a multiple of 8
};

// RMS norm of each row (Zhang and Sennrich 2019, arXiv 1910.07467), written in up to three orders. A block a row.
extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) rms_norm(const Norm p)
{
    float* scratch = (float*) shared_memory;
    u16* y = (u16*) shared_memory + MOST_WARPS * 2;
    let_next_start();
    const u32 stride = blockDim.x * 8;
    for (u32 i = threadIdx.x * 8; i < p.dim; i += stride)
    {
        if (p.weight) prefetch(p.weight + i);
        #pragma unroll
        for (u32 n = 0; n < MOST_OUTS; n++)
            if (n < p.outs && p.perm[n]) prefetch(p.perm[n] + i);
    }
    wait_for_inputs();
    u16* x = p.x + (u64) blockIdx.x * p.dim;
    float squares = 0.0f;
    for (u32 from = threadIdx.x * 8; from < p.dim; from += AT_ONCE * stride)
    {
        Words before[AT_ONCE];
        #pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++)
            if (from + n * stride < p.dim) before[n] = *(const Words*) (x + from + n * stride);
        #pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++)
        {
            const u32 i = from + n * stride;
            if (i >= p.dim) continue;
            const Words b = before[n], w = saturate(b);
            // Only torch's products leave infinities.
            if ((b.x ^ w.x) | (b.y ^ w.y) | (b.z ^ w.z) | (b.w ^ w.w)) *(Words*) (x + i) = w;
            *(Words*) (y + i) = w;
            squares += square(w.x) + square(w.y) + square(w.z) + square(w.w);
        }
    }
    if (p.weight)
    {
        float factor = rsqrtf(block_sum(squares, scratch) / (float) p.dim + p.epsilon);
        for (u32 i = threadIdx.x * 8; i < p.dim; i += blockDim.x * 8)
        {
            Words w = *(Words*) (y + i), v = *(const Words*) (p.weight + i);
            *(Words*) (y + i) = Words{scaled(w.x, v.x, factor), scaled(w.y, v.y, factor), scaled(w.z, v.z, factor),
                                      scaled(w.w, v.w, factor)};
        }
    }
    __syncthreads();
    #pragma unroll
    for (u32 n = 0; n < MOST_OUTS; n++)
    {
        if (n >= p.outs) continue;
        u16* out = p.out[n] + (u64) blockIdx.x * p.dim;
        const u16* perm = p.perm[n];
        for (u32 i = threadIdx.x * 8; i < p.dim; i += blockDim.x * 8)
        {
            Words o = *(Words*) (y + i);
            if (perm)
            {
                Words from = *(const Words*) (perm + i);
                o = Words{gather(y, from.x), gather(y, from.y), gather(y, from.z), gather(y, from.w)};
            }
            *(Words*) (out + i) = o;
        }
    }
}

struct Gate
{
    const u16* gate;        // half, row r at gate + r stride
    const u16* up;          // row r at up + r dim
    u16* out;               // laid out as the gate, which it may be
    const u16* perm;        // out[j] comes from place perm[j]; or null: from j
    u32 dim, stride, activation;    // dim a multiple of 8; see `activate`
};

DEVICE u32 gated(u32 gate, u32 up, u32 activation)
{
    gate = saturate(gate);
    up = saturate(up);
    return to_halves(activate(to_float((u16) gate), activation) * to_float((u16) up),
                     activate(to_float((u16) (gate >> 16)), activation) * to_float((u16) (up >> 16)));
}

// A gate's activation times what it gates, where two products left them. A block a row.
extern "C" __global__ void __launch_bounds__(1024) gate(const Gate p)
{
    u16* y = (u16*) shared_memory;
    let_next_start();
    const u32 stride = blockDim.x * 8;
    if (p.perm)
        for (u32 i = threadIdx.x * 8; i < p.dim; i += stride) prefetch(p.perm + i);
    wait_for_inputs();
    const u16 *gate = p.gate + (u64) blockIdx.x * p.stride, *up = p.up + (u64) blockIdx.x * p.dim;
    u16* out = p.out + (u64) blockIdx.x * p.stride;
    for (u32 from = threadIdx.x * 8; from < p.dim; from += AT_ONCE * stride)
    {
        Words g[AT_ONCE], u[AT_ONCE];
        #pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++)
        {
            const u32 i = from + n * stride;
            if (i >= p.dim) continue;
            g[n] = *(const Words*) (gate + i);
            u[n] = *(const Words*) (up + i);
        }
        #pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++)
        {
            const u32 i = from + n * stride;
            if (i >= p.dim) continue;
            const Words w = {gated(g[n].x, u[n].x, p.activation), gated(g[n].y, u[n].y, p.activation),
                             gated(g[n].z, u[n].z, p.activation), gated(g[n].w, u[n].w, p.activation)};
            *(Words*) ((p.perm ? y : out) + i) = w;
        }
    }
    if (!p.perm) return;
    __syncthreads();
    for (u32 i = threadIdx.x * 8; i < p.dim; i += blockDim.x * 8)
    {
        const Words from = *(const Words*) (p.perm + i);
        *(Words*) (out + i) = Words{gather(y, from.x), gather(y, from.y), gather(y, from.z), gather(y, from.w)};
    }
}

// `rotate` for many rows, a warp a head: at 512 rows of a 7B 9 us on an H200 where `rotate` takes 31. head_dim and `turned`
// are multiples of four. A lane takes two neighbouring pairs at a time. Grid: eight heads a block, of all rows in a line.
const u32 LINE_WARPS = 8, MOST_LANE_PAIRS = 4;              // head_dim up to 512

extern "C" __global__ void __launch_bounds__(LINE_WARPS * 32) rotate_many(const Rope p)
{
    let_next_start();
    wait_for_inputs();
    const u32 lane = threadIdx.x % 32, all = p.heads + 2 * p.kv_heads;
    const u32 at = blockIdx.x * LINE_WARPS + same_in_warp(threadIdx.x / 32), row = at / all, head = at - row * all;
    if (row >= p.rows) return;
    const u32 sequence = row / p.tokens, position = p.lengths[sequence] + row % p.tokens;
    u16* from = p.qkv + (u64) row * p.stride + head * p.head_dim;
    u16* to = from;
    if (head >= p.heads)
    {
        const u64 place = place_in(p, page_of(p, sequence, position), position, (head - p.heads) % p.kv_heads);
        to = (head < p.heads + p.kv_heads ? p.keys : p.values) + place;
    }
    if (head >= p.heads + p.kv_heads)
    {
        for (u32 i = lane * 4; i < p.head_dim; i += 128)
        {
            const u64 v = *(const u64*) (from + i);
            *(u64*) (to + i) = saturate((u32) v) | (u64) saturate((u32) (v >> 32)) << 32;
        }
        return;
    }
    const u16* weight = head < p.heads ? p.q_weight : p.k_weight;
    if (weight) weight += (head < p.heads ? head : head - p.heads) * p.head_dim;
    const u32 pairs = p.turned / 2, row_of_angles = rope_row(p, sequence, position);
    const u16 *sine = p.sine + (u64) row_of_angles * p.turned, *cosine = p.cosine + (u64) row_of_angles * p.turned;
    u32 firsts[MOST_LANE_PAIRS], seconds[MOST_LANE_PAIRS];
    float squares = 0.0f;
    #pragma unroll
    for (u32 n = 0; n < MOST_LANE_PAIRS; n++)
    {
        const u32 i = (n * 32 + lane) * 2;
        if (i >= p.head_dim / 2) continue;
        const bool turns = i < pairs;
        firsts[n] = saturate(*(const u32*) (from + (turns ? i : i + pairs)));
        seconds[n] = saturate(*(const u32*) (from + (turns ? i + pairs : i + p.head_dim / 2)));
        squares += square(firsts[n]) + square(seconds[n]);
    }
    const float factor = weight ? norm_factor(p, warp_sum(squares)) : 1.0f;
    #pragma unroll
    for (u32 n = 0; n < MOST_LANE_PAIRS; n++)
    {
        const u32 i = (n * 32 + lane) * 2;
        if (i >= p.head_dim / 2) continue;
        const bool turns = i < pairs;
        const u32 first = turns ? i : i + pairs, second = turns ? i + pairs : i + p.head_dim / 2;
        float out[2][2];
        #pragma unroll
        for (u32 j = 0; j < 2; j++)
        {
            float a = to_float((u16) (firsts[n] >> (16 * j))), b = to_float((u16) (seconds[n] >> (16 * j)));
            if (weight)
            {
                a *= factor * to_float(weight[first + j]);
                b *= factor * to_float(weight[second + j]);
            }
            const float s = turns ? to_float(sine[i + j]) : 0.0f;
            const float c = turns ? to_float(cosine[i + j]) : 1.0f;
            out[0][j] = a * c - b * s;
            out[1][j] = b * c + a * s;
        }
        *(u32*) (to + first) = to_halves(out[0][0], out[0][1]);
        *(u32*) (to + second) = to_halves(out[1][0], out[1][1]);
    }
}

// Head norm and rotary embedding of q, in place, and of k, into the cache with v. A block of head_dim / 2 threads, rounded
// up to warps, for a row (x) and a head (y).
extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) rotate(const Rope p)
{
    float* scratch = (float*) shared_memory;
    u32 i = threadIdx.x, head = blockIdx.y;
    bool real = i < p.head_dim / 2;
    let_next_start();
    wait_for_inputs();
    u32 sequence = blockIdx.x / p.tokens;
    u32 position = p.lengths[sequence] + blockIdx.x % p.tokens;
    u16* from = p.qkv + (u64) blockIdx.x * p.stride + head * p.head_dim;
    u16* to = from;
    if (head >= p.heads)
    {
        u64 place = place_in(p, page_of(p, sequence, position), position, (head - p.heads) % p.kv_heads);
        to = (head < p.heads + p.kv_heads ? p.keys : p.values) + place;
    }
    if (head >= p.heads + p.kv_heads)
    {
        if (real) ((u32*) to)[i] = saturate(((const u32*) from)[i]);
        return;
    }
    const u16* weight = head < p.heads ? p.q_weight : p.k_weight;
    if (weight) weight += (head < p.heads ? head : head - p.heads) * p.head_dim;
    Pair pair = {};
    if (real)
    {
        pair = pair_of(p, i, rope_row(p, sequence, position), weight);
        fetch(pair, from);
    }
    if (weight) scale(pair, norm_factor(p, block_sum(square(pair), scratch)));
    if (!real) return;
    turn(pair);
    put(pair, to);
}

struct Embed
{
    const u16* table;       // embeddings, `dim` numbers each: the CPU's memory
    const int* const* from; // where each row's token is; null for a row that is there already
    u16* to;
    u32 dim;                // a multiple of 8
};

// The embeddings of tokens that the CPU has not seen yet. A block a row.
extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) embed(const Embed p)
{
    let_next_start();
    wait_for_inputs();
    const int* from = p.from[blockIdx.x];
    if (!from) return;
    int token = *from;
    if (token < 0) return;      // none was chosen
    const u16* row = p.table + (u64) token * p.dim;
    u16* to = p.to + (u64) blockIdx.x * p.dim;
    for (u32 i = threadIdx.x * 8; i < p.dim; i += blockDim.x * 8) *(Words*) (to + i) = *(const Words*) (row + i);
}
