// What `gemm.cu` copies into shared memory, where it lies there, and which chunk is whose.

const u32 THREADS = WARPS * 32, COLUMN_WARPS = WARPS / ROW_WARPS, SIDES = PAIRED ? 2 : 1;
const u32 COLUMNS = COLUMN_WARPS * STRIPS * 32, SIDE_COLUMNS = COLUMNS / SIDES, ROWS = ROW_WARPS * TILES * 8;
const u32 PARTS = FINE ? 4 : 1;                                     // of a chunk, that may be of different groups
// Bytes, and where they begin, in a stage: x, weights, GPTQ's scales, four bits a column, EXL2's blocks.
const u32 X_BYTES = ROWS * 256, XS = TWO_X ? 2 : 1;
const u32 WEIGHTS = X_BYTES * XS, WEIGHT_ROW = SIDE_COLUMNS * 4, SIDE_WEIGHTS = 4 * MAX_BITS * WEIGHT_ROW;
const u32 SCALES = WEIGHTS + SIDES * SIDE_WEIGHTS, SIDE_SCALES = FORMAT == 0 ? PARTS * SIDE_COLUMNS * 2 : 0;
const u32 FOURS = SCALES + SIDES * SIDE_SCALES, SIDE_FOURS = PARTS * SIDE_COLUMNS / 2;
const u32 BLOCKS = FOURS + SIDES * SIDE_FOURS;
const u32 STAGE = (BLOCKS + (FORMAT == 1 ? SIDES * 32 : 0) + 1023) / 1024 * 1024;
const u32 SCRATCH = 1024;                                           // before the ring, which begins at a multiple of it

struct Tile { u32 which, column0, row0; };

// All chunks of all tiles, one behind the other; rows are the innermost, so that neighbours read the same weights.
struct Line
{
    u32 chunks, row_tiles, units;

    DEVICE Line(const Products& p)
    {
        chunks = (p.matrix[0].k + 127) / 128;
        row_tiles = (p.rows + ROWS - 1) / ROWS;
        u32 columns = 0;
        for (u32 m = 0; m < (PAIRED ? 1 : p.count); m++) columns += (p.matrix[m].n + SIDE_COLUMNS - 1) / SIDE_COLUMNS;
        units = columns * row_tiles * chunks;
    }
    // A worker's first unit, and a unit's worker.
    DEVICE u32 begin(u32 worker) const { return (u32) ((u64) units * worker / gridDim.x); }
    DEVICE u32 worker(u32 unit) const { return (u32) (((u64) (unit + 1) * gridDim.x - 1) / units); }
    // Where a worker's sums of a tile go that begins with `first`: only a worker's first and last tile are cut.
    DEVICE u32 slot(u32 worker, u32 first, u32 tile) const
    {
        return 2 * worker + (worker == first && begin(first) < tile * chunks ? 1 : 0);
    }
    DEVICE Tile tile(const Products& p, u32 index) const
    {
        u32 column = index / row_tiles, which = 0;
        if (!PAIRED)
            for (; which + 1 < p.count; which++)
            {
                u32 columns = (p.matrix[which].n + SIDE_COLUMNS - 1) / SIDE_COLUMNS;
                if (column < columns) break;
                column -= columns;
            }
        return Tile{which, column * SIDE_COLUMNS, index % row_tiles * ROWS};
    }
};

// Where 16 bytes of a packed row lie behind its first ones, so that the eight lanes that read at once, two places of four
// parts, meet different banks.
DEVICE u32 swizzled(u32 part, u32 unit) { return (unit ^ part * 2) * 16; }

// Where 16 bytes of a row of x lie: for lanes, so that the eight that read at once, two rows and four places 64 bytes
// apart, meet different banks; for the tensor cores in the order of their descriptor, swizzled over 128 bytes.
DEVICE u32 place(u32 row, u32 unit)
{
    if (WGMMA) return unit / 8 * (ROWS * 128) + row * 128 + ((unit ^ row) & 7) * 16;
    return row * 256 + ((unit & 8) | ((unit & 7) ^ (unit >> 3) * 2 ^ (row & 1))) * 16;
}

// A thread's view of the chunk that is copied next. A quarter of the threads copies each 32 rows of it.
struct Source
{
    u32 tile_index, chunk, chunks, k, n, rows, part, thread;
    Tile tile;
    const u16* x[XS];
    const char *weight[SIDES], *four[SIDES], *scale[SIDES];
    const u64* block[SIDES];
    u32 group_shift, x_stride[XS];
    u64 entry[SIDES];       // of its 32 rows: packed row | bits << 24 | half scale << 32 | group << 48

    DEVICE Source(const Products& p, const Line& line, u32 unit)
    {
        tile_index = unit / line.chunks;
        chunk = unit % line.chunks;
        chunks = line.chunks;
        part = same_in_warp(threadIdx.x / (THREADS / 4));
        thread = threadIdx.x % (THREADS / 4);
        enter(p, line);
        look_up();
    }

    DEVICE void enter(const Products& p, const Line& line)
    {
        tile = line.tile(p, tile_index);
        const u32 unit = thread % (SIDE_COLUMNS / 4);
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
        {
            const Matrix& m = p.matrix[tile.which + side];
            weight[side] = (const char*) (m.weight + tile.column0 + unit * 4);
            four[side] = (const char*) (m.four + tile.column0 / 8);
            scale[side] = (const char*) (m.scale + tile.column0);
            block[side] = m.block;
            if (side < XS)
            {
                x[side] = m.x + (u64) tile.row0 * m.x_stride;
                x_stride[side] = m.x_stride;
            }
        }
        const Matrix& m = p.matrix[tile.which];
        k = m.k;
        n = m.n;
        group_shift = m.group_shift;
        rows = p.rows - tile.row0;
    }

    // Behind the last row x counts as zero: any numbers will do, if only they have the scale of the others.
    DEVICE u32 row_block() const { return chunk * 4 + (chunk * 128 + part * 32 < k ? part : 0); }

    DEVICE void look_up()
    {
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
            entry[side] = FORMAT == 1 ? block[side][row_block()] : row_block() * 4 | 4u << 24;
    }

    DEVICE void next(const Products& p, const Line& line, bool there_is)
    {
        if (!there_is) return;
        if (++chunk == chunks)
        {
            chunk = 0;
            tile_index++;
            enter(p, line);
        }
        look_up();
    }

    DEVICE void copy_weights(char* stage)
    {
        const u32 units = SIDE_COLUMNS / 4, threads = THREADS / 4;
        const bool real = chunk * 128 + part * 32 < k;
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
        {
            const u32 bits = FORMAT == 0 ? 4 : (u32) entry[side] >> 24;
            const u32 row_bytes = n * 4;
            const char* from = weight[side] + (u64) ((u32) entry[side] & 0xffffff) * row_bytes;
            char* to = stage + WEIGHTS + side * SIDE_WEIGHTS + part * (MAX_BITS * WEIGHT_ROW);
            #pragma unroll
            for (u32 i = 0; i < (MAX_BITS * units + threads - 1) / threads; i++)
            {
                // The columns stay the same from one turn to the next, or take turns themselves.
                const u32 all = i * threads + thread, row = all / units, unit = all % units;
                const u32 moved = units > threads ? i * threads % units : 0;
                if (row < bits && real && tile.column0 + unit * 4 < n)
                    copy16(to + row * WEIGHT_ROW + swizzled(part, unit), from + (u64) row * row_bytes + moved * 16);
            }
            if (FORMAT == 1 && thread == 0) *(u64*) (stage + BLOCKS + side * 32 + part * 8) = entry[side];
            if (PARTS == 4 || part == 0)
            {
                const u32 group = FORMAT == 1 ? (u32) (entry[side] >> 48) : row_block() * 32 >> group_shift;
                const u32 at = FINE ? part : 0, scales = FORMAT == 0 ? SIDE_COLUMNS / 8 : 0;
                for (u32 i = thread; i < scales + SIDE_COLUMNS / 32; i += threads)
                {
                    if (i < scales)
                    {
                        if (tile.column0 + i * 8 < n)
                            copy16(stage + SCALES + side * SIDE_SCALES + at * (SIDE_COLUMNS * 2) + i * 16,
                                   scale[side] + (u64) group * (n * 2) + i * 16);
                    }
                    else if (tile.column0 + (i - scales) * 32 < n)
                        copy16(stage + FOURS + side * SIDE_FOURS + at * (SIDE_COLUMNS / 2) + (i - scales) * 16,
                               four[side] + (u64) group * (n / 2) + (i - scales) * 16);
                }
            }
        }
    }

    DEVICE void copy_x(const Products& p, char* stage)
    {
        const u32 row = threadIdx.x / 16, unit = threadIdx.x % 16, from = chunk * 128 + unit * 8;
        #pragma unroll
        for (u32 side = 0; side < XS; side++)
            #pragma unroll
            for (u32 i = 0; i < ROWS * 16 / THREADS; i++)
            {
                const u32 r = row + i * (THREADS / 16);
                char* to = stage + side * X_BYTES + place(r, unit);
                // With WGMMA x has zeros there, as the order of k goes across the end.
                if (!WGMMA && from >= k) *(Words*) to = Words{0, 0, 0, 0};
                else if (r < rows) copy16(to, x[side] + (u64) r * x_stride[side] + from);
            }
    }
};
