// A few rows times quantized matrices: out[r][n] = sum over k of x[r][k] weight[k][n], for up to 8 TILES rows.
//
// A warp owns 32 columns and every WARPS-th piece of 128 rows of the matrix ("chunk"). Lane (g, t), g = lane / 4 and
// t = lane % 4, reads 16 bytes at a time: columns 4 g to 4 g + 3 of the rows 32 t to 32 t + 31 of the chunk, so that a
// warp's every request is whole 128-byte lines, and the lane's numbers are, as they come, its share of the operands of
// the tensor cores' 16x8 product: the sum over k may take k in any order, so long as both sides take the same. Weights
// are the operand of 16, the rows of x that of 8; fewer than 8 rows leave some of it zero, which costs nothing here.
// Weights are copied asynchronously into a ring in shared memory that each lane keeps for itself: what a lane reads it has
// copied. A single row of x is put into shared memory whole at the start; of several rows each warp's ring has its part.
// At the end the warps' sums are added up in float32 in a fixed order: the same input always gives the same bits.
//
// What limits it, on an H100 with one row: not memory alone. The same copies without any arithmetic move 2.75 TB/s of the
// 3.03 that a copy reaches; versions 1 to 5 moved 1.7 with large matrices and 1.3 with small ones. Each of their warps
// waited for the zero points of the chunk after next, once a chunk: version 6 does not. A chunk of 2 KB takes some 290
// instructions of a warp, and large matrices do not divide evenly among the multiprocessors (85 %). Predicted and
// measured in microseconds, 4-bit, 4096 x 2 x 14336 as a pair, 61 MB, floor 20.1:
//
// | version                                                                | predicted | measured     |
// |------------------------------------------------------------------------|-----------|--------------|
// | 1: x and scales through asynchronous copies of 4 to 16 bytes           | 26        | 51.9         |
// | 2: x whole in shared memory, scales in registers                       | 27        | 37.7         |
// | 3: a turn of the ring unrolled, scales asked for as early as weights   | 30        | 35.0         |
// | 4: one of two constants of an expression in a register (372 to 294)    | 30        | 35.0 to 36.5 |
// | 5: rows shared by a cluster of two or four blocks; given up            | 28        | 37.9 to 43.0 |
// | 6: as 4, zero points shifted where they are used, not where they come  | 25        | not yet      |
//
// Compiled with: FORMAT 0 (GPTQ, 4 bits) or 1 (EXL2), WARPS a block, TILES of 8 rows, ONE_ROW, STAGES of the ring,
// MAX_BITS of a weight, PAIRED (half the warps compute a gate, half what it gates), FINE (groups that do not fill
// chunks), RESIDENT warps at least on a multiprocessor.

#include "device.cuh"
#include "unpack.cuh"

#include "operands.cuh"
#include "row.cuh"

typedef float Sums[2][TILES][4];

DEVICE void clear(Sums& sums)
{
    #pragma unroll
    for (int half = 0; half < 2; half++)
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            #pragma unroll
            for (int i = 0; i < 4; i++) sums[half][tile][i] = 0.0f;
}

// One lane's 32 rows of a chunk, all of BITS bits. `factor`: with FINE, scales of the four columns, twice in a word.
template <int BITS>
DEVICE void multiply(const Lane& l, const char* stage, const u32 (&xs)[TILES][16], const u32 (&factor)[4], u32 zeros,
                     Sums& sums)
{
    typedef Unit<BITS> U;
    #pragma unroll
    for (int u = 0; u < 32 / U::K; u++)
    {
        u32 words[4][U::WORDS];
        #pragma unroll
        for (int i = 0; i < U::WORDS; i++)
        {
            Words w = *(const Words*) (stage + (u * U::WORDS + i) * SLOT + l.lane * 16);
            words[0][i] = w.x; words[1][i] = w.y; words[2][i] = w.z; words[3][i] = w.w;
        }
        #pragma unroll
        for (int half = 0; half < 2; half++)
        {
            u32 a[2][U::K / 2];
            #pragma unroll
            for (int c = 0; c < 2; c++)
            {
                int column = half * 2 + c;
                #if FORMAT == 0
                u32 zero = (zeros >> (column * 4) & 15) + 1;
                // Halves -1024 - zero and -64 - zero, put together from their bits: zero is 1 to 16.
                Unit<4>::unpack(words[column], a[c], l.lift, both(0xe400 | zero), both(0xd400 + (zero << 4)));
                #else
                U::unpack(words[column], a[c], l.lift);
                #endif
                #if FINE
                #pragma unroll
                for (int i = 0; i < U::K / 2; i++) a[c][i] = h2_mul(a[c][i], factor[column]);
                #endif
            }
            #pragma unroll
            for (int s = 0; s < U::K / 4; s++)
                #pragma unroll
                for (int tile = 0; tile < TILES; tile++)
                {
                    const u32* b = &xs[tile][(u * (U::K / 4) + s) * 2];
                    mma(sums[half][tile], a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1], b[0], b[1]);
                }
        }
    }
}

DEVICE void multiply_any(u32 bits, const Lane& l, const char* stage, const u32 (&xs)[TILES][16], const u32 (&factor)[4],
                         u32 zeros, Sums& sums)
{
#if FORMAT == 0
    multiply<4>(l, stage, xs, factor, zeros, sums);
#else
    switch (bits)
    {
    case 2: multiply<2>(l, stage, xs, factor, 0, sums); break;
    #if MAX_BITS > 2
    case 3: multiply<3>(l, stage, xs, factor, 0, sums); break;
    #endif
    #if MAX_BITS > 3
    case 4: multiply<4>(l, stage, xs, factor, 0, sums); break;
    #endif
    #if MAX_BITS > 4
    case 5: multiply<5>(l, stage, xs, factor, 0, sums); break;
    #endif
    #if MAX_BITS > 5
    case 6: multiply<6>(l, stage, xs, factor, 0, sums); break;
    #endif
    #if MAX_BITS > 6
    case 8: multiply<8>(l, stage, xs, factor, 0, sums); break;
    #endif
    }
#endif
}

DEVICE void compute(const Lane& l, u32 chunk, u32 stage_index, u64 block, const Meta& meta, Sums& sums)
{
    const char* stage = l.ring + stage_index * STAGE;
    bool inside = ONE_ROW || chunk * 128 + l.t * 32 < l.k;
    u32 xs[TILES][16];
    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++)
        #pragma unroll
        for (u32 i = 0; i < 4; i++)
        {
            // Rows that are not there may be anything: their sums are not used. Behind the last of k it must be zero.
            Words w = {0, 0, 0, 0};
            if (inside)
                w = ONE_ROW ? *(const Words*) (l.row + chunk * 128 + l.t * 32 + i * 8)
                            : *(const Words*) (stage + MAX_BITS * SLOT + place(tile * 8 + l.g, l.t * 4 + i));
            xs[tile][4 * i] = w.x; xs[tile][4 * i + 1] = w.y; xs[tile][4 * i + 2] = w.z; xs[tile][4 * i + 3] = w.w;
        }
    const u32 four = meta.four >> (l.column & 4 ? 16 : 0);
    u32 factor[4];
    #pragma unroll
    for (int c = 0; c < 4; c++)
    {
        u32 root = (four >> (4 * c) & 15) + 1;
        factor[c] = FORMAT == 0 ? both(meta.scale >> (16 * c) & 0xffff)
                                : h2_mul(both(to_half((float) (root * root))), both(meta.scale));
    }
    u32 bits = FORMAT == 0 ? 4 : block >> 24 & 0xff;
#if FINE
    // A warp's product needs all its lanes. Where the width changes inside a chunk each width takes a turn, and lanes
    // of another one take part with a factor of zero on the finite numbers that their bits make.
    u32 widths = FORMAT == 0 ? 1u << 4 : warp_or(1u << bits) & ~1u;
    #pragma unroll 1
    for (u32 width = 8; width >= 2; width--)
    {
        if (!(widths >> width & 1)) continue;
        u32 own[4];
        #pragma unroll
        for (int c = 0; c < 4; c++) own[c] = bits == width ? factor[c] : 0;
        multiply_any(width, l, stage, xs, own, four, sums);
    }
#else
    // One width and one group, so one scale of a column, for the whole chunk: the scale can wait for the sum.
    Sums part;
    clear(part);
    multiply_any(bits, l, stage, xs, factor, four, part);
    #pragma unroll
    for (int half = 0; half < 2; half++)
    {
        float s0 = to_float(factor[half * 2] & 0xffff), s1 = to_float(factor[half * 2 + 1] & 0xffff);
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
        {
            sums[half][tile][0] += s0 * part[half][tile][0];
            sums[half][tile][1] += s0 * part[half][tile][1];
            sums[half][tile][2] += s1 * part[half][tile][2];
            sums[half][tile][3] += s1 * part[half][tile][3];
        }
    }
#endif
}

DEVICE float activate(float gate, u32 activation)
{
    if (activation == 0) return gate / (1.0f + expf(-gate));
    return 0.5f * gate * (1.0f + tanhf(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate)));
}

// A sum over warps, from the first on.
DEVICE float total(const float* sums, u32 from, u32 to)
{
    float sum = 0.0f;
    for (u32 w = from; w < to; w++) sum += sums[w * ROWS * 32];
    return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS) gemv(const Products p)
{
    u32 warp = threadIdx.x / 32, share = warp, shares = WARPS, which = 0;
    if (PAIRED) { shares = WARPS / 2; which = warp / shares; share = warp % shares; }
    else while (which + 1 < p.count && blockIdx.x >= p.matrix[which + 1].first_block) which++;
    const Matrix& m = p.matrix[which];
    u32 column0 = (blockIdx.x - (PAIRED ? 0 : m.first_block)) * 32;

    Lane l;
    l.weight = m.weight;
    l.x = m.x;
    l.four = m.four;
    l.scale = m.scale;
    l.block = m.block;
    l.n = m.n;
    l.k = m.k;
    l.x_stride = m.x_stride;
    l.group_shift = m.group_shift;
    // With ONE_ROW, x lies before the rings; of a pair each half may have its own.
    bool one_x = PAIRED && p.matrix[0].x == p.matrix[1].x && p.matrix[0].perm == p.matrix[1].perm;
    u32 x_bytes = ONE_ROW ? (m.k + 127) / 128 * 256 : 0;
    char* rings = (char*) shared_memory + SCRATCH + x_bytes * (PAIRED && !one_x ? 2 : 1);
    l.row = (const u16*) ((char*) shared_memory + SCRATCH + (PAIRED && !one_x ? x_bytes * which : 0));
    l.ring = rings + warp * STAGES * STAGE;
    l.lane = threadIdx.x % 32;
    l.g = l.lane / 4;
    l.t = l.lane % 4;
    l.column = column0 + 4 * l.g;
    l.rows = p.rows;
    l.lift = in_register(0x64006400u, l.ring + (STAGES - 1) * STAGE + l.lane * 16);

    const u32 chunks = (l.k + 127) / 128;
    u64 blocks[STAGES];
    Meta metas[STAGES];
    #pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++)
    {
        u32 chunk = share + s * shares;
        blocks[s] = chunk < chunks ? block_of(l, chunk) : 0;
    }
    u32 ahead = share + (STAGES - 1) * shares;
    u64 block = ahead < chunks ? block_of(l, ahead) : 0;
    #pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++)
    {
        copy_weights(l, s, blocks[s]);
        if (share + s * shares < chunks) metas[s] = meta_of(l, share + s * shares, blocks[s]);
    }

    let_next_start();
    wait_for_inputs();
    if (ONE_ROW) stage_row(l, m, one_x, one_x ? threadIdx.x : share * 32 + l.lane,
                           one_x ? WARPS * 32 : shares * 32, chunks * 16);
    #pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++)
    {
        u32 chunk = share + s * shares;
        if (chunk < chunks) copy_x(l, chunk, s);
        copies_commit();
    }
    if (ONE_ROW) __syncthreads();
    Sums sums;
    clear(sums);

    // A turn of the ring at a time, so that what belongs to each stage stays in registers of its own.
    u32 chunk = share;
    #pragma unroll 1
    while (chunk < chunks)
    {
        #pragma unroll
        for (u32 s = 0; s < STAGES; s++, chunk += shares)
        {
            if (chunk >= chunks) break;
            copies_wait<STAGES - 2>();
            if (!ONE_ROW) __syncwarp();
            if (ahead < chunks)
            {
                // Into the place of the chunk before, whose numbers have been used by now.
                const u32 free = (s + STAGES - 1) % STAGES;
                blocks[free] = block;
                copy_weights(l, free, block);
                copy_x(l, ahead, free);
                metas[free] = meta_of(l, ahead, block);
            }
            copies_commit();
            ahead += shares;
            block = ahead < chunks ? block_of(l, ahead) : 0;
            compute(l, chunk, s, blocks[s], metas[s], sums);
        }
    }
    copies_wait<0>();
    __syncthreads();

    // Lane (g, t) holds, of each half and tile: columns 4 g + 2 half and the next, rows 8 tile + 2 t and the next.
    float* all = (float*) ((char*) shared_memory + SCRATCH);
    #pragma unroll
    for (int half = 0; half < 2; half++)
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            #pragma unroll
            for (int i = 0; i < 4; i++)
            {
                u32 row = tile * 8 + 2 * l.t + (i & 1);
                if (row < ROWS) all[(warp * ROWS + row) * 32 + 4 * l.g + 2 * half + (i >> 1)] = sums[half][tile][i];
            }
    __syncthreads();
    for (u32 i = threadIdx.x; i < p.rows * 32; i += WARPS * 32)
    {
        u32 row = i / 32, column = column0 + i % 32;
        const Matrix& target = PAIRED ? p.matrix[0] : m;
        float value = total(all + i, 0, shares);
        if (target.bias) value += to_float(target.bias[column]);
        if (PAIRED)
        {
            float gated = total(all + i, shares, WARPS);
            if (p.matrix[1].bias) gated += to_float(p.matrix[1].bias[column]);
            value = activate(value, p.activation) * gated;
        }
        u32 to = row * target.out_stride + (target.scatter ? target.scatter[column] : column);
        if (target.add) value += to_float(target.add[to]);
        target.out[to] = to_half(value);
    }
}
