// Many rows times quantized matrices: out[r][n] = sum over k of x[r][k] weight[k][n], the weights unpacked on their way
// into the tensor cores.
//
// A block computes tiles of ROWS rows and COLUMNS columns, a piece of 128 of k ("chunk") at a time. Packed weights, x and
// scales of the next chunks are copied asynchronously into a ring in shared memory. A warp owns one or two strips of 32
// columns and TILES times 8 rows; who unpacks which weight, and the order of k, is as in `gemv.cu`: a lane reads 16 bytes
// of a packed row, which are four columns of its 32 rows of the chunk, and what comes out is its share of the operand.
//
// All chunks of all tiles stand in one line, which is cut into as many equal parts as there are blocks (stream-K: Osama,
// Merrill, Cecka, Garland and Owens 2023, arXiv 2301.03598). So every multiprocessor has as much to do, whatever the shape.
// A tile that was cut is put together at the end by the blocks that have parts of it, each some of it, from sums in global
// memory, always in the same order: the same input always gives the same bits.
//
// H200, a 7B's layer (qkv, o, gate and up, down), GPTQ, best config of each; times those of reconstruction and cuBLAS
// (up to 50 rows exllamav2's own kernel), taken in the same call:
//
// | version                                     | predicted at 64    | 16   | 32   | 64   | 128  | 256  | 512  |
// |---------------------------------------------|--------------------|------|------|------|------|------|------|
// | 1: the last block puts a cut tile together  |                    | 0.32 | 0.22 | 0.37 | 0.56 | 0.89 | 1.13 |
// | 2: all its blocks do; less copying, spills  | 0.27 (8 us a tile) | 0.28 | 0.20 | 0.33 | 0.48 | 0.74 | 0.94 |
//
// EXL2 of 4.0 bits, version 2: 0.20, 0.13, 0.33, 0.51, 0.82, 1.05. Without the proxy fence: the same. What limits it: per
// launch some 9 us at 32 and 64 rows and 19 at 512 (o against down) that do not grow with k, which shared sums may be (not
// measured by themselves); what grows reaches 0.8 of cuBLAS's rate at 512, but for the pair 0.55 (eight tiles a strip, not
// sixteen).
//
// Gate and up as two outputs that `step.cu` puts together (`GemmConfig.apart`), which gives a warp sixteen tiles of each:
// predicted 200 us at 512 rows for what took 285, measured 246 with the kernel that puts them together.
//
// A GPTQ 7B's layer on an H200 as the tuner chooses kernels (v: `gemv.cu`, d: unpacked for cuBLAS), microseconds, beside
// every weight byte once at 4.3 TB/s, or every multiplication at 758 TFLOP/s if that is longer, and humming-kernels 0.1.20
// (of another call, same kind of machine):
//
// | rows | qkv  | o    | gate, up | down  | sum   | floor | humming | EXL2 4.0, sum |
// |------|------|------|----------|-------|-------|-------|---------|---------------|
// | 8    | 7v   | 5v   | 26v      | 12v   | 51    | 26    | 58      | 54            |
// | 16   | 11v  | 6v   | 31       | 15v   | 62    | 26    | 64      | 69            |
// | 32   | 13   | 11v  | 38       | 22    | 84    | 26    | 82      | 91            |
// | 64   | 19   | 13   | 51       | 26    | 110   | 37    | 89      | 121           |
// | 128  | 26   | 19   | 84       | 39    | 168   | 74    | 122     | 186           |
// | 256  | 39   | 26d  | 140      | 66    | 271   | 147   | 205     | 288           |
// | 512  | 65d  | 36d  | 244      | 115   | 460   | 295   | 369     | 487           |
//
// Up to 32 rows humming is no faster. From 64 rows on, a tile's unpacking, copies and sums are not hidden behind the tensor
// cores. Two blocks of four warps on a multiprocessor instead of one of eight: predicted to hide them, the same within 3 %.
// Without WGMMA, EXL2's gate and up at 32 rows took 45 us; a block of eight warps with WGMMA, predicted 40, takes 44, two of
// four warps 55. Copies by the copy engine (TMA), a warp that does nothing else, and tiles of 256 rows have not been tried.
//
// A decode step of 64 sequences with 384 tokens each takes 5.1 ms: 3.5 are these products (humming 2.8), and attention, with
// the waits that the next launch hides, has at most 1.4 (the cache once: 0.75); of 128, 8.6 ms: 5.4 (3.9) and 2.6 (1.5).
//
// Compiled with: FORMAT 0 (GPTQ, 4 bits) or 1 (EXL2), MAX_BITS of a weight (4, 6 or 8), PAIRED (a warp's two strips are a
// gate and what it gates), TWO_X (they want x in different orders), FINE (groups that do not fill chunks), WARPS a block
// (a multiple of 4), ROW_WARPS of them for different rows, TILES of 8 rows and STRIPS of 32 columns a warp, STAGES of the
// ring, RESIDENT blocks on a multiprocessor, WGMMA (compute capability 9.0: products of four warps together, which read x
// from shared memory themselves and want it in the order of `places` of many_rows.py).

#include "device.cuh"
#include "unpack.cuh"
#include "matrix.cuh"
#include "wgmma.cuh"
#include "gemm_ring.cuh"
#include "gemm_tile.cuh"

// A block's sums of a tile that several share: out to memory, and counted.
DEVICE void share(const Products& p, const Line& line, u32 tile, Sums& sums)
{
    float* to = p.partial + line.slot(blockIdx.x, line.first_worker(tile), tile) * (u64) SLOT + threadIdx.x * 4;
    #pragma unroll
    for (u32 i = 0; i < QUADS; i++) to_others(to + i * (THREADS * 4), sums[i / (2 * TILES)][i / TILES % 2][i % TILES]);
    __syncthreads();
    if (threadIdx.x == 0) arrive(p.arrived + tile);
}

// A block's share of putting such a tile together, always in the same order. The other blocks are there, as a launch has
// no more blocks than the GPU holds at once, and none waits before its last sums are in memory.
DEVICE void gather(const Products& p, const Line& line, const Lane& l, u32 tile)
{
    const u32 first = line.first_worker(tile), last = line.last_worker(tile), parts = last - first + 1;
    if (parts == 1) return;
    if (threadIdx.x == 0) await(p.arrived + tile, parts);
    __syncthreads();
    const u32 pieces = TILES * (PAIRED ? 1 : STRIPS), mine = blockIdx.x - first, batch = 4;
    const Tile at = line.tile(p, tile);
    #pragma unroll 1
    for (u32 piece = pieces * mine / parts; piece < pieces * (mine + 1) / parts; piece++)
    {
        const u32 s = piece / TILES, t = piece % TILES;
        float sum[SIDES][2][4] = {};
        #pragma unroll 1
        for (u32 worker = first; worker <= last; worker += batch)
        {
            // Several at a time, or each would wait for the one before.
            float more[batch][SIDES][2][4] = {};
            #pragma unroll
            for (u32 b = 0; b < batch; b++)
            {
                if (worker + b > last) continue;
                const float* from = p.partial + line.slot(worker + b, first, tile) * (u64) SLOT + threadIdx.x * 4;
                #pragma unroll
                for (u32 i = 0; i < SIDES * 2; i++)
                    from_others(more[b][i / 2][i % 2], from + ((s * 2 + i) * TILES + t) * (THREADS * 4));
            }
            #pragma unroll
            for (u32 b = 0; b < batch; b++)
                #pragma unroll
                for (u32 i = 0; i < SIDES * 8; i++) (&sum[0][0][0])[i] += (&more[b][0][0][0])[i];
        }
        write(p, l, at, s, t, sum);
    }
    // The last block to leave resets the counter.
    if (threadIdx.x == 0 && arrive(p.arrived + tile) == 2 * parts - 1) p.arrived[tile] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) gemm(const Products p)
{
    const Line line(p);
    Lane l;
    l.warp = same_in_warp(threadIdx.x / 32);
    l.lane = threadIdx.x % 32;
    l.g = l.lane / 4;
    l.t = l.lane % 4;
    l.rows = l.warp / COLUMN_WARPS * (TILES * 8);
    l.strip = l.warp % COLUMN_WARPS * (PAIRED ? 1 : STRIPS);
    char* ring = (char*) shared_memory + SCRATCH;
    l.lift = in_register(0x64006400u, ring + threadIdx.x * 4);
    __syncthreads();

    const u32 begin = line.begin(blockIdx.x), end = line.begin(blockIdx.x + 1);
    Source ahead(p, line, begin);
    u32 copied = begin;
    #pragma unroll 1
    for (u32 s = 0; s < STAGES - 1 && copied < end; s++, copied++)
    {
        ahead.copy_weights(ring + s * STAGE);
        ahead.next(p, line, copied + 1 < end);
    }
    let_next_start();
    wait_for_inputs();
    Source again(p, line, begin);
    #pragma unroll 1
    for (u32 s = 0; s < STAGES - 1; s++)
    {
        if (begin + s < end)
        {
            again.copy_x(ring + s * STAGE);
            again.next(p, line, begin + s + 1 < end);
        }
        copies_commit();
    }

    Sums sums;
    clear(sums);
    u32 tile = begin / line.chunks, chunk = begin - tile * line.chunks, stage = 0;
    #pragma unroll 1
    for (u32 unit = begin; unit < end; unit++)
    {
        copies_wait<STAGES - 2>();
        if (WGMMA) seen_by_tensor_cores();
        __syncthreads();
        Refill refill{p, line, ahead, ring + (stage ? stage - 1 : STAGES - 1) * STAGE, copied, end, true};
        compute(l, ring + stage * STAGE, sums, refill);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (++chunk == line.chunks || unit + 1 == end)
        {
            if (line.first_worker(tile) != line.last_worker(tile)) share(p, line, tile, sums);
            else write_all(p, l, line.tile(p, tile), sums);
            clear(sums);
            chunk = 0;
            tile++;
        }
    }
    copies_wait<0>();
    // Only its first and last tile may be cut.
    const u32 first = begin / line.chunks, last = (end - 1) / line.chunks;
    gather(p, line, l, first);
    if (last != first) gather(p, line, l, last);
}
