// A few rows times quantized matrices: out[r][n] = sum over k of x[r][k] weight[k][n], for up to 8 TILES rows.
//
// A warp owns a strip of 32 columns and every so manieth piece of 128 rows of the matrix ("chunk"). Lane (g, t), g = lane / 4 and
// t = lane % 4, reads 16 bytes at a time: columns 4 g to 4 g + 3 of the rows 32 t to 32 t + 31 of the chunk. These numbers
// are, as they come, its share of the operands of the tensor cores' 16x8 product: the sum over k may take k in any order,
// so long as both sides take the same. Weights are the operand of 16, the rows of x that of 8; fewer than 8 rows leave
// some of it zero, which costs nothing here. Weights are copied asynchronously into a ring in shared memory that each
// warp keeps for itself. A single row of x is put into shared memory whole at the start; of several rows a warp's ring has
// its part, or warps of different strips share one: many rows are more to read than the weights.
// At the end the warps' sums are added up in float32 in a fixed order: the same input always gives the same bits.
//
// What limits it, on an H100 with one row: memory, while a kernel is well under way; of its 25 us some 3 pass before and
// after that. Versions 1 to 6 were limited by the second-level cache: memory is asked for in sectors of 32 bytes, and
// the lanes that copied the halves of one were not neighbours, so that each was asked for twice (Nsight Compute counted 32
// sectors where 16 do); the same copies without arithmetic had hidden it, as they had the whole time for it. Now neighbours
// copy what is neighbouring. Predicted and measured in microseconds, 4-bit, 4096 x 2 x 14336 as a pair, 61 MB, floor 20.1:
//
// | version                                                                | predicted | measured     |
// |------------------------------------------------------------------------|-----------|--------------|
// | 1: x and scales through asynchronous copies of 4 to 16 bytes           | 26        | 51.9         |
// | 2: x whole in shared memory, scales in registers                       | 27        | 37.7         |
// | 3: a turn of the ring unrolled, scales asked for as early as weights   | 30        | 35.0         |
// | 4: one of two constants of an expression in a register (372 to 294)    | 30        | 35.0 to 36.5 |
// | 5: rows shared by a cluster of two or four blocks; given up            | 28        | 37.9 to 43.0 |
// | 6: as 4, zero points shifted where they are used, not where they come  | 25        | 34.3         |
// | 7: zeros subtracted in the tensor cores (230 instead of 290); given up | 30        | 35.4         |
// | 8: as 6, neighbours copy neighbours; scales by few asynchronous copies | 26        | 24.8         |
// | 9: stages of whole sectors, too                                        | 23        | 23.4         |
//
// EXL2 falls behind its floor as weights get narrower, by what takes as long whatever their width (unpacking, not
// profiled): the same pair takes 22.6 us of 12.3 at 2.5 bits, 24.9 of 17.1 at 3.5, 26.7 of 19.5 at 4.0. Whole models decode
// at 36, 47 and 50 % of the memory's bandwidth, 54 % at 6.0; GPTQ at 63 %.
//
// Compiled with: FORMAT 0 (GPTQ, 4 bits) or 1 (EXL2), WARPS a block, TILES of 8 rows, ONE_ROW, STAGES of the ring,
// MAX_BITS of a weight (4, 6 or 8), PAIRED (half the warps compute a gate, half what it gates), FINE (groups that do not fill
// chunks), COLUMNS of a block (32 with ONE_ROW), RESIDENT warps at least on a multiprocessor.

#include "device.cuh"
#include "unpack.cuh"
#include "matrix.cuh"

#include "operands.cuh"
#include "multiply.cuh"
#include "row.cuh"

// A sum over the warps of a strip, from the first on.
DEVICE float total(const float* sums, u32 shares)
{
    float sum = 0.0f;
    for (u32 s = 0; s < shares; s++) sum += sums[s * STRIPS * ROWS * 32];
    return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS) gemv(const Products p)
{
    const u32 sides = PAIRED ? 2 : 1, shares = WARPS / sides / STRIPS, warp = same_in_warp(threadIdx.x / 32);
    const u32 strip = warp % STRIPS, share = warp / STRIPS % shares, strip0 = blockIdx.x * STRIPS;
    u32 which = PAIRED ? warp / (WARPS / 2) : 0;
    while (!PAIRED && which + 1 < p.count && strip0 >= p.matrix[which + 1].first_block) which++;
    const Matrix& m = p.matrix[which];
    const u32 block0 = (strip0 - (PAIRED ? 0 : m.first_block)) * 32, column0 = block0 + strip * 32;

    Lane l;
    l.n = p.matrix[PAIRED ? 0 : which].n;
    l.k = p.matrix[PAIRED ? 0 : which].k;
    l.lane = threadIdx.x % 32;
    l.g = l.lane / 4;
    l.t = l.lane % 4;
    l.rows = p.rows;
    l.weight = (const char*) (m.weight + column0 + 4 * (l.lane % 8));
    l.x = m.x;
    l.block = m.block;
    l.x_stride = m.x_stride;
    l.group_shift = m.group_shift;
    choose_groups(l, m, column0);
    // With ONE_ROW, x lies before the rings: in the order of the weight, of a pair perhaps two; and as it is.
    const u16 *perm = m.perm, *other = PAIRED ? p.matrix[1 - which].perm : perm;
    const u32 row_bytes = ONE_ROW ? (m.k + 127) / 128 * 256 : 0, rows = perm == other ? 1 : 2;
    char* row = (char*) shared_memory + SCRATCH;
    Words* raw = perm || other ? (Words*) (row + rows * row_bytes) : nullptr;
    char* rings = row + (rows + (raw ? 1 : 0)) * row_bytes;
    l.row = (const Words*) (row + (rows - 1) * which * row_bytes);
    // With several rows, x comes in a ring of its own for warps that take the same chunks and the same x.
    const bool one_x = !PAIRED || p.matrix[0].x == p.matrix[1].x;
    const u32 side = one_x ? 0 : which, members = STRIPS * (one_x ? sides : 1);
    l.ring = rings + (SHARED_X ? shares * (one_x ? 1 : 2) * STAGES * X_BYTES : 0) + warp * STAGES * STAGE;
    l.x_ring = SHARED_X ? rings + (side * shares + share) * STAGES * X_BYTES : l.ring + MAX_BITS * SLOT;
    l.x_stage = SHARED_X ? X_BYTES : STAGE;
    l.x_from = SHARED_X ? ((PAIRED && one_x ? which : 0) * STRIPS + strip) * 32 + l.lane : l.lane;
    l.x_step = SHARED_X ? members * 32 : 32;
    l.lift = in_register(0x64006400u, l.ring + (STAGES - 1) * STAGE + l.lane * 16);

    const u32 chunks = (l.k + 127) / 128;
    u64 blocks[STAGES];
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
        if (share + s * shares < chunks)
        {
            copy_weights(l, s, blocks[s]);
            copy_groups(l, share + s * shares, s, blocks[s]);
        }

    if (ONE_ROW) prefetch_row(m, threadIdx.x);
    let_next_start();
    wait_for_inputs();
    if (ONE_ROW) stage_row(m, (Words*) l.row, raw, rows == 1 ? threadIdx.x : share * 32 + l.lane,
                           rows == 1 ? WARPS * 32 : shares * 32, chunks * 16);
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
    // Warps that share x go on together, also those that have no chunk left.
    u32 chunk = share;
    const u32 end = chunks + (SHARED_X ? share : 0);
    #pragma unroll 1
    while (chunk < end)
    {
        #pragma unroll
        for (u32 s = 0; s < STAGES; s++, chunk += shares)
        {
            if (chunk >= end) break;
            copies_wait<STAGES - 2>();
            if (SHARED_X) __syncthreads();
            else __syncwarp();
            if (ahead < chunks)
            {
                // Into the place of the chunk before, whose numbers have been used by now.
                const u32 free = (s + STAGES - 1) % STAGES;
                blocks[free] = block;
                copy_weights(l, free, block);
                copy_groups(l, ahead, free, block);
                copy_x(l, ahead, free);
            }
            copies_commit();
            ahead += shares;
            block = ahead < chunks ? block_of(l, ahead) : 0;
            if (!SHARED_X || chunk < chunks) compute(l, chunk, s, blocks[s], sums);
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
    for (u32 i = threadIdx.x; i < p.rows * STRIPS * 32; i += WARPS * 32)
    {
        u32 row = i / (STRIPS * 32), place = i % (STRIPS * 32), column = block0 + place;
        const float* from = all + (place / 32 * ROWS + row) * 32 + place % 32;
        const Matrix& target = PAIRED ? p.matrix[0] : m;
        float value = total(from, shares);
        if (target.bias) value += to_float(target.bias[column]);
        if (PAIRED)
        {
            float gated = total(from + WARPS / 2 * ROWS * 32, shares);
            if (p.matrix[1].bias) gated += to_float(p.matrix[1].bias[column]);
            value = activate(value, p.activation) * gated;
        }
        u32 to = row * target.out_stride + (target.scatter ? target.scatter[column] : column);
        if (target.add) value += to_float(target.add[to]);
        target.out[to] = to_half(value);
    }
}
