// What stands between the matrix products of a decode step. Rows are tokens; numbers are half, sums float32.

#include "device.cuh"
#include "rope.cuh"

const u32 MOST_WARPS = 16;

struct Norm
{
    const u16* x;
    const u16* weight;      // or null: no norm, the numbers as they are
    u16* out[3];
    const u16* perm[3];     // out[i][j] comes from place perm[i][j]; or null: from j
    float epsilon;
    u32 dim, outs;          // dim a multiple of 8
};

// RMS norm of each row (Zhang and Sennrich 2019, arXiv 1910.07467), written in up to three orders. A block a row.
extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) rms_norm(const Norm p)
{
    float* scratch = (float*) shared_memory;
    u16* y = (u16*) shared_memory + MOST_WARPS * 2;
    let_next_start();
    wait_for_inputs();
    const u16* x = p.x + (u64) blockIdx.x * p.dim;
    float squares = 0.0f;
    for (u32 i = threadIdx.x * 8; i < p.dim; i += blockDim.x * 8)
    {
        Words w = saturate(*(const Words*) (x + i));
        *(Words*) (y + i) = w;
        squares += square(w.x) + square(w.y) + square(w.z) + square(w.w);
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
    for (u32 n = 0; n < p.outs; n++)
    {
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
