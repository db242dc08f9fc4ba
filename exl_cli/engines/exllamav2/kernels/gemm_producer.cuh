// With WGMMA four producer warps have the copy engine fill the ring for the consumer warps, which multiply. Barriers say which
// stages are full, and which are empty again: no consumer waits for another.

#if WGMMA

// The argument of builds with WGMMA.
struct MappedProducts
{
    TensorMap x[3];         // of each matrix's input, of experts of each order: boxes of 64 numbers of ROWS rows, swizzled
                            // over 128 bytes
    Products products;
};

// Registers are divided among groups of four warps: producers need few.
const u32 ALL_WARPS = WARPS + 4, PRODUCER_REGISTERS = 40, MOST_REGISTERS = 240;
const u32 EQUAL_REGISTERS = 65536 / (RESIDENT * ALL_WARPS * 32) / 8 * 8;
const u32 LAUNCH_REGISTERS = EQUAL_REGISTERS < 248 ? EQUAL_REGISTERS : 248;
const u32 FREE_REGISTERS = (LAUNCH_REGISTERS * ALL_WARPS - PRODUCER_REGISTERS * 4) / WARPS / 8 * 8;
const u32 CONSUMER_REGISTERS = FREE_REGISTERS < MOST_REGISTERS ? FREE_REGISTERS : MOST_REGISTERS;

// Of the ring's stages, in front of it.
struct Barriers { u64 full[STAGES], empty[STAGES]; };

// A warp that has a part of each chunk copied: 32 rows, each lane one packed row of them, and their scales; the first two
// producers, or with inputs of two orders all four, also halves of x.
struct Producer
{
    const MappedProducts& a;
    const Schedule& schedule;
    u32 part, lane, tile_index, chunk, width, row_bytes, group_shift[SIDES];
    Tile tile;
    const char *weight[SIDES], *four[SIDES], *scale[SIDES];
    const u64* block[SIDES];
    u64 entry[SIDES];       // of the part, EXL2: packed row | bits << 24 | half scale << 32 | group << 48

    DEVICE Producer(const MappedProducts& a, const Schedule& schedule, u32 unit) : a(a), schedule(schedule)
    {
        part = same_in_warp(threadIdx.x / 32) - WARPS;
        lane = threadIdx.x % 32;
        tile_index = unit / schedule.chunks;
        chunk = unit - tile_index * schedule.chunks;
        enter_tile();
        look_up();
    }

    DEVICE void enter_tile()
    {
        tile = schedule.tile(a.products, tile_index);
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
        {
            const Matrix& m = a.products.matrix[tile.which + side];
            weight[side] = (const char*) (m.weight + tile.column0);
            four[side] = (const char*) (m.four + tile.column0 / 8);
            scale[side] = (const char*) (m.scale + tile.column0);
            block[side] = m.block;
            group_shift[side] = m.group_shift;
        }
        // Both sides are as wide.
        const u32 n = a.products.matrix[tile.which].n;
        width = min(n - tile.column0, SIDE_COLUMNS);
        row_bytes = n * 4;
    }

    DEVICE void look_up()
    {
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
            if (FORMAT == 1) entry[side] = block[side][chunk * 4 + part];
    }

    DEVICE void advance(bool more)
    {
        if (!more) return;
        if (++chunk == schedule.chunks)
        {
            chunk = 0;
            tile_index++;
            enter_tile();
        }
        look_up();
    }

    DEVICE bool has_scales() const { return part < PARTS; }
    DEVICE bool has_x() const { return part < 2 * XS; }
    DEVICE u32 bits(u32 side) const { return FORMAT == 0 ? 4 : (u32) entry[side] >> 24 & 15; }

    // The part's packed weights and scales. The barrier is to expect the bytes of `copy_x`, too.
    DEVICE void copy_weights(char* stage, u64* full) const
    {
        if (lane == 0)
        {
            u32 bytes = has_x() ? X_BYTES / 2 : 0;
            #pragma unroll
            for (u32 side = 0; side < SIDES; side++)
            {
                bytes += bits(side) * width * 4 + (has_scales() ? width / 2 + (FORMAT == 0 ? width * 2 : 0) : 0);
                if (FORMAT == 1) *(u64*) (stage + BLOCKS + side * 32 + part * 8) = entry[side];
            }
            barrier_expect(full, bytes);
        }
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
        {
            const u32 packed = FORMAT == 0 ? chunk * 16 + part * 4 : (u32) entry[side] & 0xffffff;
            if (lane < bits(side))
                bulk_copy(stage + weights_at(side, part, lane), weight[side] + (u64) (packed + lane) * row_bytes, width * 4,
                          full);
            if (lane != 0 || !has_scales()) continue;
            const u32 group = FORMAT == 1 ? (u32) (entry[side] >> 48) : (chunk * 128 + part * 32) >> group_shift[side];
            bulk_copy(stage + FOURS + side * SIDE_FOURS + part * (SIDE_COLUMNS / 2),
                      four[side] + (u64) group * (row_bytes / 8), width / 2, full);
            if (FORMAT == 0)
                bulk_copy(stage + SCALES + side * SIDE_SCALES + part * (SIDE_COLUMNS * 2),
                          scale[side] + (u64) group * (row_bytes / 2), width * 2, full);
        }
    }

    // Half of x, 64 numbers of each row.
    DEVICE void copy_x(char* stage, u64* full) const
    {
        if (lane == 0 && has_x())
            tile_copy(stage + part * (X_BYTES / 2), &a.x[(EXPERTS ? 0 : tile.which) + part / 2], chunk * 128 + part % 2 * 64,
                      tile.row0, full);
    }
};

DEVICE void produce(const MappedProducts& a, const Schedule& schedule, u32 begin, u32 end, Barriers& barriers, char* ring)
{
    const u32 ahead = min((u32) STAGES, end - begin);
    Producer producer(a, schedule, begin);
    #pragma unroll 1
    for (u32 s = 0; s < ahead; s++)
    {
        producer.copy_weights(ring + s * STAGE, barriers.full + s);
        producer.advance(begin + s + 1 < end);
    }
    wait_for_inputs();
    Producer x_producer(a, schedule, begin);
    #pragma unroll 1
    for (u32 s = 0; s < ahead; s++)
    {
        x_producer.copy_x(ring + s * STAGE, barriers.full + s);
        x_producer.advance(begin + s + 1 < end);
    }
    u32 stage = 0, parity = 0;
    #pragma unroll 1
    for (u32 unit = begin + ahead; unit < end; unit++)
    {
        barrier_wait(barriers.empty + stage, parity);
        producer.copy_x(ring + stage * STAGE, barriers.full + stage);
        producer.copy_weights(ring + stage * STAGE, barriers.full + stage);
        producer.advance(unit + 1 < end);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        parity ^= stage == 0;
    }
}

// What a warp does once a chunk while the tensor cores are busy: release the stage of the chunk before.
struct OverlappedWork
{
    u64* empty;
    bool due;

    DEVICE void operator()()
    {
        if (due && threadIdx.x % 32 == 0) barrier_arrive(empty);
        due = false;
    }
};

#endif
