// Many rows times quantized matrices: out[r][n] = sum over k of x[r][k] weight[k][n], the weights unpacked on their way
// into the tensor cores.
//
// Blocks are persistent: each computes tiles of ROWS rows and COLUMNS columns, 128 of k (a "chunk") at a time. Packed
// weights, x and scales of the next chunks are copied asynchronously into a ring of stages in shared memory. A warp owns
// one or two strips of 32 columns and TILES times 8 rows; which lane unpacks which weight, and the order of k, are those of
// `gemv.cu`: a lane reads 16 bytes of a packed row, four columns of its 32 rows of the chunk, and unpacks its part of the
// operand.
//
// With WGMMA (compute capability 9.0) warps are specialized. Four consumer warps multiply together; the tensor cores read x
// from shared memory, in the order of `places` of many_rows.py. Four producer warps have the copy engine fill the ring
// (gemm_producer.cuh). No warp waits for a whole block, and a warp unpacks its next weights while the tensor cores work on
// the last ones.
//
// Where the GPU holds more blocks than there are tiles, k is divided, too: each tile into as many equal parts as there is
// room for (split-K), or the chunks of all tiles, in one line, into as many equal parts as there are blocks (stream-K:
// Osama, Merrill, Cecka, Garland and Owens 2023, arXiv 2301.03598). The blocks that computed parts of a tile then reduce it,
// each a share of it, from partial sums in global memory, always in the same order: the same input always gives the same
// bits.
//
// A 7B's layer in GPTQ (qkv, o, gate and up, down), H200, microseconds, beside humming-kernels 0.1.20 of another call on the
// same kind of machine. In version 1 the last block reduced a tile alone, which took a fifth longer. From version 3 on
// best configs, without the kernel that applies the gate:
//
// | version                                          | predicted         | 32  | 64  | 128 | 256 | 512 |
// |--------------------------------------------------|-------------------|-----|-----|-----|-----|-----|
// | 2: all its blocks reduce a tile, as tuned        |                   | 84  | 110 | 168 | 271 | 460 |
// | 3: a producer warp, which uses the copy engine   | 64: 80, 128: 125  | 86  | 104 | 152 | 247 | 427 |
// | 4: split-K, or whole tiles                       | 64: 96, 128: 132  | 80  | 98  | 129 | 222 | 402 |
// | 5: four producer warps, each lane a packed row   | 64: 90, 128: 124  | 74  | 88  | 120 | 207 | 382 |
// | humming                                          |                   | 83  | 90  | 121 | 198 | 340 |
//
// What the measurements showed: a warp issued 530 instructions a chunk before version 3, 340 since, and two warps of a
// scheduler could not hide each other's latency. In version 3 consumers waited for data a quarter of their time, while the
// one producer requested sixteen rows one after the other. Of o's 13.8 us at 64 rows in version 3, partial sums took 5.5
// (writing 2.5, waiting 0.6, reading 2.4), its four chunks 3.5; at 128 rows they took 9 of 20.6. Warps with sixteen tiles of
// each side of a pair are so much faster than with eight that computing both sides unfused pays for the gate's kernel.
//
// As the tuner chooses (v: `gemv.cu`), the kernel of the gate included, beside every weight byte once at 4.3 TB/s, or every
// multiplication at 758 TFLOP/s if that is longer:
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
// What limits it now: up to 128 rows the exchange of partial sums through memory (blocks of a cluster could read each
// other's shared memory, not tried) and the kernel that applies the gate (12 us at 128 rows before it had 1,024 threads);
// above, tiles of 128 rows that do not fill the last wave. Tried and no better: six stages, blocks of twelve warps.
//
// Without WGMMA, EXL2's gate and up at 32 rows took 45 us.
//
// A mixture of experts of Mixtral 8x7B with all its kernels (GPTQ, H200, microseconds, versions of different calls). From 64
// tokens on an expert's tiles have 32 or 64 rows, and use WGMMA:
//
// | tokens                         | predicted  | 32  | 64  | 128 | 512  | 2048 |
// |--------------------------------|------------|-----|-----|-----|------|------|
// | 1: without WGMMA               |            | 349 | 414 | 748 | 1720 | 6947 |
// | 2: with                        | 512: 1000  | 348 | 355 | 490 | 1328 | 5289 |
// | floor                          |            | 170 | 170 | 170 | 476  | 1904 |
//
// EXL2 at 512 tokens: 1763, then 1313; Qwen3 30B-A3B (128 experts, 8 of them a token): 408, then 368, floor 73. What limits
// it: of 512 tokens an expert of eight gets about 128, two tiles of 64 rows or three, and a fused pair unpacks each weight
// for 64 rows only. Blocks of more tokens than 512 would fill tiles better, and read the weights of many experts once.
//
// Compiled with: FORMAT 0 (GPTQ, 4 bits) or 1 (EXL2), MAX_BITS of a weight (4, 6 or 8), PAIRED (a warp's two strips are a
// gate and what it gates), TWO_X (they want x in different orders), FINE (groups that do not fill chunks), WARPS a block
// (a multiple of 4), ROW_WARPS of them for different rows, TILES of 8 rows and STRIPS of 32 columns a warp, STAGES of the
// ring, RESIDENT blocks on a multiprocessor, WGMMA (compute capability 9.0), EXPERTS (matrices of a mixture of experts, of which
// each has some of the rows: see experts.cu).

#include "device.cuh"
#include "unpack.cuh"
#include "matrix.cuh"
#include "wgmma.cuh"
#include "bulk.cuh"
#include "gemm_ring.cuh"
#include "gemm_producer.cuh"
#include "gemm_tile.cuh"

#if !EXPERTS

// Write a block's partial sums of a tile that several compute, and count them.
DEVICE void store_partial(const Products& p, const Schedule& schedule, u32 tile, const Sums& sums)
{
    float* to = p.partial + schedule.slot(blockIdx.x, schedule.first_worker(tile), tile) * (u64) SLOT + threadIdx.x * 4;
    #pragma unroll
    for (u32 i = 0; i < QUADS; i++) to_others(to + i * (THREADS * 4), sums[i / (2 * TILES)][i / TILES % 2][i % TILES]);
    meet<THREADS>();
    if (threadIdx.x == 0) arrive(p.arrived + tile);
}

// A block's share of reducing such a tile, always in the same order. The other blocks are resident, or will be: a launch has
// no more blocks than the GPU holds at once, those of other streams of the same priority start before or after all of them
// (Amert, Otterness, Yang, Anderson and Smith 2017 saw it on a TX2), and none waits before its last partial sums are in memory.
DEVICE void reduce(const Products& p, const Schedule& schedule, const Lane& l, u32 tile)
{
    const u32 first = schedule.first_worker(tile), last = schedule.last_worker(tile), workers = last - first + 1;
    if (workers == 1) return;
    if (threadIdx.x == 0) await(p.arrived + tile, workers);
    meet<THREADS>();
    const u32 pieces = TILES * (PAIRED ? 1 : STRIPS), mine = blockIdx.x - first, batch = 4;
    const Tile at = schedule.tile(p, tile);
    #pragma unroll 1
    for (u32 piece = pieces * mine / workers; piece < pieces * (mine + 1) / workers; piece++)
    {
        const u32 s = piece / TILES, t = piece % TILES;
        float sum[SIDES][2][4] = {};
        #pragma unroll 1
        for (u32 worker = first; worker <= last; worker += batch)
        {
            // Several loads are in flight at a time.
            float partial[batch][SIDES][2][4] = {};
            #pragma unroll
            for (u32 b = 0; b < batch; b++)
            {
                if (worker + b > last) continue;
                const float* from = p.partial + schedule.slot(worker + b, first, tile) * (u64) SLOT + threadIdx.x * 4;
                #pragma unroll
                for (u32 i = 0; i < SIDES * 2; i++)
                    from_others(partial[b][i / 2][i % 2], from + ((s * 2 + i) * TILES + t) * (THREADS * 4));
            }
            #pragma unroll
            for (u32 b = 0; b < batch; b++)
                #pragma unroll
                for (u32 i = 0; i < SIDES * 8; i++) (&sum[0][0][0])[i] += (&partial[b][0][0][0])[i];
        }
        write(p, l, at, s, t, sum);
    }
    // The last block that is done resets the counter.
    if (threadIdx.x == 0 && arrive(p.arrived + tile) == 2 * workers - 1) p.arrived[tile] = 0;
}

#endif

// Of experts the kernel before may still be finding out what there is to do.
DEVICE void await_tiles()
{
    if (!EXPERTS) return;
    let_next_start();
    wait_for_inputs();
}

DEVICE Lane lane_of(void* scratch)
{
    const u32 warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
    Lane l;
    l.g = lane / 4;
    l.t = lane % 4;
    l.rows = warp / COLUMN_WARPS * (TILES * 8);
    l.strip = warp % COLUMN_WARPS * (PAIRED ? 1 : STRIPS);
    l.lift = in_register(0x64006400u, (char*) scratch + lane * 4);
    return l;
}

// Write the sums of a whole tile to the output, those of a part of one to the workspace.
DEVICE void finish_tile(const Products& p, const Schedule& schedule, const Lane& l, u32 tile, const Sums& sums)
{
#if !EXPERTS
    if (schedule.first_worker(tile) != schedule.last_worker(tile)) return store_partial(p, schedule, tile, sums);
#endif
    write_all(p, l, schedule.tile(p, tile), sums);
}

// Reduce the first and the last tile of the chunks from `begin` to `end`: only they may be split.
DEVICE void reduce_split_tiles(const Products& p, const Schedule& schedule, const Lane& l, u32 begin, u32 end)
{
#if !EXPERTS
    const u32 first = begin / schedule.chunks, last = (end - 1) / schedule.chunks;
    reduce(p, schedule, l, first);
    if (last != first) reduce(p, schedule, l, last);
#endif
}

#if WGMMA

// The work of consumer warps.
DEVICE void consume(const Products& p, const Schedule& schedule, u32 begin, u32 end, Barriers& barriers, const char* ring)
{
    const Lane l = lane_of(&barriers + 1);
    // The kernel before may still be using what sums are written to.
    wait_for_inputs();
    u32 stage = 0, parity = 0;
    OverlappedWork overlapped{barriers.empty, false};
    #pragma unroll 1
    for (u32 unit = begin; unit < end;)
    {
        const u32 tile = unit / schedule.chunks, until = min((tile + 1) * schedule.chunks, end);
        Sums sums;
        clear(sums);
        #pragma unroll 1
        for (; unit < until; unit++)
        {
            barrier_wait(barriers.full + stage, parity);
            compute(l, ring + stage * STAGE, sums, overlapped);
            overlapped = OverlappedWork{barriers.empty + stage, true};
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            parity ^= stage == 0;
        }
        wgmma_wait<0>();
        #pragma unroll
        for (u32 i = 0; i < STRIPS * 2 * TILES * 4; i++) fence_register((&sums[0][0][0][0])[i]);
        finish_tile(p, schedule, l, tile, sums);
    }
    reduce_split_tiles(p, schedule, l, begin, end);
}

extern "C" __global__ void __launch_bounds__(ALL_WARPS * 32, RESIDENT) gemm(const __grid_constant__ MappedProducts a)
{
    const Products& p = a.products;
    await_tiles();
    const Schedule schedule(p);
    Barriers& barriers = *(Barriers*) shared_memory;
    char* ring = (char*) shared_memory + SCRATCH;
    const u32 begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
    if (EXPERTS && begin == end) return;
    if (threadIdx.x == 0)
    {
        #pragma unroll
        for (u32 s = 0; s < STAGES; s++)
        {
            barrier_init(barriers.full + s, 4);
            barrier_init(barriers.empty + s, WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    let_next_start();
    if (threadIdx.x >= THREADS)
    {
        fewer_registers<PRODUCER_REGISTERS>();
        produce(a, schedule, begin, end, barriers, ring);
    }
    else
    {
        more_registers<CONSUMER_REGISTERS>();
        consume(p, schedule, begin, end, barriers, ring);
    }
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) gemm(const Products p)
{
    await_tiles();
    const Schedule schedule(p);
    char* ring = (char*) shared_memory + SCRATCH;
    const Lane l = lane_of(shared_memory);

    const u32 begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
    if (EXPERTS && begin == end) return;
    Source source(p, schedule, begin);
    u32 copied = begin;
    #pragma unroll 1
    for (u32 s = 0; s < STAGES - 1 && copied < end; s++, copied++)
    {
        source.copy_weights(ring + s * STAGE);
        source.advance(p, schedule, copied + 1 < end);
    }
    let_next_start();
    wait_for_inputs();
    Source x_source(p, schedule, begin);
    #pragma unroll 1
    for (u32 s = 0; s < STAGES - 1; s++)
    {
        if (begin + s < end)
        {
            x_source.copy_x(ring + s * STAGE);
            x_source.advance(p, schedule, begin + s + 1 < end);
        }
        copies_commit();
    }

    Sums sums;
    clear(sums);
    u32 tile = begin / schedule.chunks, chunk = begin - tile * schedule.chunks, stage = 0;
    #pragma unroll 1
    for (u32 unit = begin; unit < end; unit++)
    {
        copies_wait<STAGES - 2>();
        __syncthreads();
        OverlappedWork overlapped{p, schedule, source, ring + (stage ? stage - 1 : STAGES - 1) * STAGE, copied, end, true};
        compute(l, ring + stage * STAGE, sums, overlapped);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (++chunk == schedule.chunks || unit + 1 == end)
        {
            finish_tile(p, schedule, l, tile, sums);
            clear(sums);
            chunk = 0;
            tile++;
        }
    }
    copies_wait<0>();
    reduce_split_tiles(p, schedule, l, begin, end);
}

#endif
