// Many rows times quantized matrices: out[r][n] = sum over k of x[r][k] weight[k][n], the weights unpacked on their way
// into the tensor cores.
//
// A block computes tiles of ROWS rows and COLUMNS columns, a piece of 128 of k ("chunk") at a time. Packed weights, x and
// scales of the next chunks are copied asynchronously into a ring in shared memory. A warp owns one or two strips of 32
// columns and TILES times 8 rows; who unpacks which weight, and the order of k, is as in `gemv.cu`: a lane reads 16 bytes
// of a packed row, which are four columns of its 32 rows of the chunk, and what comes out is its share of the operand.
//
// With WGMMA (compute capability 9.0) four warps multiply together. They read x from shared memory themselves, in the
// order of `places` of many_rows.py, and four more warps have the copy engine fill the ring (gemm_producer.cuh), so that
// nobody waits for a whole block: a warp's next weights are unpacked while the tensor cores are at the last ones.
//
// Where there are fewer tiles than blocks that the GPU holds, k is divided, too: each tile into as many equal parts as
// there is room for (`parts`), or all chunks of all tiles, in one line, into as many equal parts as there are blocks
// (stream-K: Osama, Merrill, Cecka, Garland and Owens 2023, arXiv 2301.03598). A tile that was cut is put together at the
// end by the blocks that have parts of it, each some of it, from sums in global memory, always in the same order: the same
// input always gives the same bits.
//
// A 7B's layer in GPTQ (qkv, o, gate and up, down), H200, microseconds, beside humming-kernels 0.1.20 of another call on the
// same kind of machine. Version 1 had the last block put a cut tile together, which took a fifth longer. From version 3 on
// best configs, without putting gate and up together:
//
// | version                                          | predicted         | 32  | 64  | 128 | 256 | 512 |
// |--------------------------------------------------|-------------------|-----|-----|-----|-----|-----|
// | 2: all blocks put it together, as tuned          |                   | 84  | 110 | 168 | 271 | 460 |
// | 3: another warp copies, by the copy engine       | 64: 80, 128: 125  | 86  | 104 | 152 | 247 | 427 |
// | 4: tiles cut into equal parts, or not at all     | 64: 96, 128: 132  | 80  | 98  | 129 | 222 | 402 |
// | 5: four warps copy, each lane a packed row       | 64: 90, 128: 124  | 74  | 88  | 120 | 207 | 382 |
// | humming                                          |                   | 83  | 90  | 121 | 198 | 340 |
//
// What told: before version 3 a warp had 530 instructions a chunk to issue, 340 since, and two warps of a scheduler could
// not hide each other's latency. In version 3 warps waited for data a quarter of their time, while one warp asked for
// sixteen rows one after the other. Of o's 13.8 us at 64 rows in version 3, 5.5 went by with sums of cut tiles (written
// 2.5, awaited 0.6, read 2.4), 3.5 with its four chunks; at 128 rows 9 of 20.6. A pair's warps with sixteen tiles of each
// side ("apart") are so much better than eight that another kernel may put them together.
//
// As the tuner chooses (v: `gemv.cu`), with that kernel, beside every weight byte once at 4.3 TB/s, or every multiplication
// at 758 TFLOP/s if that is longer:
//
// | rows | qkv  | o    | gate, up | down  | sum   | floor | humming | EXL2 4.0, sum |
// |------|------|------|----------|-------|-------|-------|---------|---------------|
// | 8    | 7v   | 5v   | 27v      | 12v   | 51    | 26    | 59      | 55            |
// | 16   | 11v  | 6v   | 31       | 15v   | 63    | 26    | 66      | 75            |
// | 32   | 12   | 10   | 36       | 19    | 77    | 26    | 83      | 81            |
// | 64   | 16   | 12   | 45       | 23    | 96    | 37    | 90      | 104           |
// | 128  | 21   | 16   | 64       | 32    | 133   | 74    | 121     | 137           |
// | 256  | 34   | 22   | 114      | 51    | 221   | 147   | 198     | 226           |
// | 512  | 50   | 35   | 218      | 93    | 395   | 295   | 340     | 405           |
//
// What limits it now: up to 128 rows the exchange of cut tiles through memory (blocks of a cluster could read each other's
// shared memory, not tried) and the kernel that puts gate and up together (12 us at 128 rows before it had 1,024 threads);
// above, tiles of 128 rows that do not fill the last wave. Tried and no better: six stages, blocks of twelve warps.
//
// Without WGMMA, EXL2's gate and up at 32 rows took 45 us.
//
// Compiled with: FORMAT 0 (GPTQ, 4 bits) or 1 (EXL2), MAX_BITS of a weight (4, 6 or 8), PAIRED (a warp's two strips are a
// gate and what it gates), TWO_X (they want x in different orders), FINE (groups that do not fill chunks), WARPS a block
// (a multiple of 4), ROW_WARPS of them for different rows, TILES of 8 rows and STRIPS of 32 columns a warp, STAGES of the
// ring, RESIDENT blocks on a multiprocessor, WGMMA (compute capability 9.0).

#include "device.cuh"
#include "unpack.cuh"
#include "matrix.cuh"
#include "wgmma.cuh"
#include "bulk.cuh"
#include "gemm_ring.cuh"
#include "gemm_producer.cuh"
#include "gemm_tile.cuh"

// A block's sums of a tile that several share: out to memory, and counted.
DEVICE void share(const Products& p, const Line& line, u32 tile, const Sums& sums)
{
    float* to = p.partial + line.slot(blockIdx.x, line.first_worker(tile), tile) * (u64) SLOT + threadIdx.x * 4;
    #pragma unroll
    for (u32 i = 0; i < QUADS; i++) to_others(to + i * (THREADS * 4), sums[i / (2 * TILES)][i / TILES % 2][i % TILES]);
    meet<THREADS>();
    if (threadIdx.x == 0) arrive(p.arrived + tile);
}

// A block's share of putting such a tile together, always in the same order. The other blocks are there, as a launch has
// no more blocks than the GPU holds at once, and none waits before its last sums are in memory.
DEVICE void gather(const Products& p, const Line& line, const Lane& l, u32 tile)
{
    const u32 first = line.first_worker(tile), last = line.last_worker(tile), parts = last - first + 1;
    if (parts == 1) return;
    if (threadIdx.x == 0) await(p.arrived + tile, parts);
    meet<THREADS>();
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

DEVICE Lane lane_of(void* scratch)
{
    Lane l;
    l.warp = same_in_warp(threadIdx.x / 32);
    l.lane = threadIdx.x % 32;
    l.g = l.lane / 4;
    l.t = l.lane % 4;
    l.rows = l.warp / COLUMN_WARPS * (TILES * 8);
    l.strip = l.warp % COLUMN_WARPS * (PAIRED ? 1 : STRIPS);
    l.lift = in_register(0x64006400u, (char*) scratch + l.lane * 4);
    return l;
}

// The sums of a tile, or of a part of it, are there.
DEVICE void leave(const Products& p, const Line& line, const Lane& l, u32 tile, const Sums& sums)
{
    if (line.first_worker(tile) != line.last_worker(tile)) share(p, line, tile, sums);
    else write_all(p, l, line.tile(p, tile), sums);
}

// Put together the first and the last tile of those from `begin` to `end`: only they may be cut.
DEVICE void gather_ends(const Products& p, const Line& line, const Lane& l, u32 begin, u32 end)
{
    const u32 first = begin / line.chunks, last = (end - 1) / line.chunks;
    gather(p, line, l, first);
    if (last != first) gather(p, line, l, last);
}

#if WGMMA

// What the warps do that multiply.
DEVICE void consume(const Products& p, const Line& line, u32 begin, u32 end, Barriers& barriers, const char* ring)
{
    const Lane l = lane_of(&barriers + 1);
    // Sums go where the kernel before may still be reading.
    wait_for_inputs();
    u32 stage = 0, parity = 0;
    Meanwhile meanwhile{barriers.empty, false};
    #pragma unroll 1
    for (u32 unit = begin; unit < end;)
    {
        const u32 tile = unit / line.chunks, until = min((tile + 1) * line.chunks, end);
        Sums sums;
        clear(sums);
        #pragma unroll 1
        for (; unit < until; unit++)
        {
            barrier_wait(barriers.full + stage, parity);
            compute(l, ring + stage * STAGE, sums, meanwhile);
            meanwhile = Meanwhile{barriers.empty + stage, true};
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            parity ^= stage == 0;
        }
        products_wait<0>();
        #pragma unroll
        for (u32 i = 0; i < STRIPS * 2 * TILES * 4; i++) arrived_here((&sums[0][0][0][0])[i]);
        leave(p, line, l, tile, sums);
    }
    gather_ends(p, line, l, begin, end);
}

extern "C" __global__ void __launch_bounds__(ALL_WARPS * 32, RESIDENT) gemm(const __grid_constant__ Together a)
{
    const Products& p = a.products;
    const Line line(p);
    Barriers& barriers = *(Barriers*) shared_memory;
    char* ring = (char*) shared_memory + SCRATCH;
    const u32 begin = line.begin(blockIdx.x), end = line.begin(blockIdx.x + 1);
    if (threadIdx.x == 0)
    {
        #pragma unroll
        for (u32 s = 0; s < STAGES; s++)
        {
            barrier_init(barriers.full + s, 4);
            barrier_init(barriers.empty + s, WARPS);
        }
        barriers_ready();
    }
    __syncthreads();
    let_next_start();
    if (threadIdx.x >= THREADS)
    {
        fewer_registers<PRODUCER_REGISTERS>();
        produce(a, line, begin, end, barriers, ring);
    }
    else
    {
        more_registers<REGISTERS>();
        consume(p, line, begin, end, barriers, ring);
    }
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) gemm(const Products p)
{
    const Line line(p);
    char* ring = (char*) shared_memory + SCRATCH;
    const Lane l = lane_of(shared_memory);

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
        __syncthreads();
        Meanwhile meanwhile{p, line, ahead, ring + (stage ? stage - 1 : STAGES - 1) * STAGE, copied, end, true};
        compute(l, ring + stage * STAGE, sums, meanwhile);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (++chunk == line.chunks || unit + 1 == end)
        {
            leave(p, line, l, tile, sums);
            clear(sums);
            chunk = 0;
            tile++;
        }
    }
    copies_wait<0>();
    gather_ends(p, line, l, begin, end);
}

#endif
