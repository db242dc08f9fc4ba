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
// A tile that was cut is put together by the block that comes last, from sums in global memory, always in the same
// order: the same input always gives the same bits.
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

// The sums of a tile that several blocks share: out to memory and, in the last of them, all together. Whether this is it.
DEVICE bool gathered(const Products& p, const Line& line, u32 tile, Sums& sums)
{
    const u32 first = line.worker(tile * line.chunks), last = line.worker(tile * line.chunks + line.chunks - 1);
    if (first == last) return true;
    const u32 quads = STRIPS * 2 * TILES;
    float* partial = p.partial + (u64) threadIdx.x * 4;
    const u64 slot = (u64) quads * THREADS * 4;
    float* own = partial + line.slot(blockIdx.x, first, tile) * slot;
    #pragma unroll
    for (u32 i = 0; i < quads; i++)
    {
        float (&from)[4] = sums[i / (2 * TILES)][i / TILES % 2][i % TILES];
        to_others(own + i * (THREADS * 4), from);
    }
    __syncthreads();
    u32* order = (u32*) shared_memory;
    if (threadIdx.x == 0) *order = arrive(p.arrived + tile);
    __syncthreads();
    if (*order != last - first) return false;
    if (threadIdx.x == 0) p.arrived[tile] = 0;
    // Several at a time, or each would wait for the one before.
    const u32 batch = quads <= 8 ? 4 : quads <= 16 ? 2 : 1;
    #pragma unroll 1
    for (u32 worker = first; worker <= last; worker += batch)
    {
        float more[batch][quads][4];
        #pragma unroll
        for (u32 b = 0; b < batch; b++)
        {
            const float* part = partial + line.slot(min(worker + b, last), first, tile) * slot;
            #pragma unroll
            for (u32 i = 0; i < quads; i++) from_others(more[b][i], part + i * (THREADS * 4));
        }
        #pragma unroll
        for (u32 b = 0; b < batch; b++)
            #pragma unroll
            for (u32 i = 0; i < quads; i++)
            {
                float (&to)[4] = sums[i / (2 * TILES)][i / TILES % 2][i % TILES];
                #pragma unroll
                for (int j = 0; j < 4; j++)
                    to[j] = worker + b == first ? more[b][i][j] : worker + b <= last ? to[j] + more[b][i][j] : to[j];
            }
    }
    return true;
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
            if (gathered(p, line, tile, sums)) write(p, l, line.tile(p, tile), sums);
            clear(sums);
            chunk = 0;
            tile++;
        }
    }
    copies_wait<0>();
}
