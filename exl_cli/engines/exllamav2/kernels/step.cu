// What stands between the matrix products of a decode step. Rows are tokens; numbers are half, sums float32.

#include "device.cuh"

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
        Words w = *(const Words*) (x + i);
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

struct Rope
{
    u16* qkv;               // row r at qkv + r stride: heads of q, then kv_heads of k, then of v
    const u16* sine;        // rows of `turned` numbers, the second half of each like the first
    const u16* cosine;
    const int* lengths;     // positions in the cache before these, of each sequence
    const int* table;       // pages of each sequence, table_stride apart
    u16* keys;              // pages of page_size positions of kv_heads heads
    u16* values;
    const u16* q_weight;    // of a norm of each head, rows of head_dim; or null
    const u16* k_weight;
    float epsilon;
    u32 heads, kv_heads, head_dim, turned, tokens, stride, table_stride, page_size;
};

// Head norm and rotary embedding (Su et al. 2021, arXiv 2104.09864; halves paired as in GPT-NeoX) of q, in place, and of
// k, into the cache with v. A block of head_dim / 2 threads, rounded up to warps, for a row (x) and a head (y).
extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) rotate(const Rope p)
{
    float* scratch = (float*) shared_memory;
    u32 half = p.head_dim / 2, i = threadIdx.x, head = blockIdx.y;
    bool real = i < half;
    let_next_start();
    wait_for_inputs();
    u32 sequence = blockIdx.x / p.tokens;
    u32 position = p.lengths[sequence] + blockIdx.x % p.tokens;
    u16* from = p.qkv + (u64) blockIdx.x * p.stride + head * p.head_dim;
    u16* to = from;
    if (head >= p.heads)
    {
        u32 page = p.table[sequence * p.table_stride + position / p.page_size];
        u32 kv_head = (head - p.heads) % p.kv_heads;
        to = (head < p.heads + p.kv_heads ? p.keys : p.values)
             + (((u64) page * p.page_size + position % p.page_size) * p.kv_heads + kv_head) * p.head_dim;
    }
    if (head >= p.heads + p.kv_heads)
    {
        if (real) ((u32*) to)[i] = ((const u32*) from)[i];
        return;
    }
    // Threads hold the pairs that turn together: i and i + turned / 2. Behind what turns, neighbours half apart.
    u32 first = i, second = i + half;
    u32 pairs = p.turned / 2;
    if (p.turned < p.head_dim)
    {
        first = i < pairs ? i : p.turned + (i - pairs);
        second = i < pairs ? i + pairs : p.turned + (i - pairs) + (half - pairs);
    }
    float a = real ? to_float(from[first]) : 0.0f, b = real ? to_float(from[second]) : 0.0f;
    const u16* weight = head < p.heads ? p.q_weight : p.k_weight;
    if (weight)
    {
        u32 row = head < p.heads ? head : head - p.heads;
        float factor = rsqrtf(block_sum(a * a + b * b, scratch) / (float) p.head_dim + p.epsilon);
        if (real)
        {
            a *= factor * to_float(weight[row * p.head_dim + first]);
            b *= factor * to_float(weight[row * p.head_dim + second]);
        }
    }
    if (!real) return;
    float out_a = a, out_b = b;
    if (i < pairs)
    {
        float s = to_float(p.sine[(u64) position * p.turned + i]), c = to_float(p.cosine[(u64) position * p.turned + i]);
        out_a = a * c - b * s;
        out_b = b * c + a * s;
    }
    to[first] = to_half(out_a);
    to[second] = to_half(out_b);
}
