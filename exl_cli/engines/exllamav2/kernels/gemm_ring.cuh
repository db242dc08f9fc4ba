// What `gemm.cu` copies into shared memory and where it lies there, and which block computes which chunks.

const u32 THREADS = WARPS * 32, COLUMN_WARPS = WARPS / ROW_WARPS, SIDES = PAIRED ? 2 : 1;
const u32 COLUMNS = COLUMN_WARPS * STRIPS * 32, SIDE_COLUMNS = COLUMNS / SIDES, ROWS = ROW_WARPS * TILES * 8;
const u32 PARTS = FINE ? 4 : 1;                                     // of a chunk, which may be of different groups
// Bytes and offsets in a stage: x, weights, GPTQ's scales, four bits a column, EXL2's blocks.
const u32 X_BYTES = ROWS * 256, XS = TWO_X ? 2 : 1;
const u32 WEIGHTS = X_BYTES * XS, WEIGHT_ROW = SIDE_COLUMNS * 4;
// Packed weights of each 32 rows of the chunk, padded: the eight lanes that read at once, two places of four parts, meet
// different banks.
const u32 PART_WEIGHTS = MAX_BITS * WEIGHT_ROW + 32, SIDE_WEIGHTS = 4 * PART_WEIGHTS;
const u32 SCALES = WEIGHTS + SIDES * SIDE_WEIGHTS, SIDE_SCALES = FORMAT == 0 ? PARTS * SIDE_COLUMNS * 2 : 0;
const u32 FOURS = SCALES + SIDES * SIDE_SCALES, SIDE_FOURS = PARTS * SIDE_COLUMNS / 2;
const u32 BLOCKS = FOURS + SIDES * SIDE_FOURS;
const u32 STAGE = (BLOCKS + (FORMAT == 1 ? SIDES * 32 : 0) + 1023) / 1024 * 1024;
const u32 SCRATCH = 1024;                                           // before the ring, whose stages are aligned to it

#if EXPERTS

struct Tile { u32 which, column0, row0, end; };

// All chunks of all tiles in one line, as below. Tiles stay whole, or each is split among as many blocks, whose sums go to
// separate outputs.
struct Schedule
{
    u32 chunks, row_tiles, splits, tiles, quota, longer;

    DEVICE Schedule(const Products& p)
    {
        chunks = (p.matrix[0].k + 127) / 128;
        row_tiles = *p.row_tiles;
        splits = p.splits;
        tiles = row_tiles * ((p.matrix[0].n + SIDE_COLUMNS - 1) / SIDE_COLUMNS);
        quota = tiles / gridDim.x;
        longer = tiles - quota * gridDim.x;
    }
    DEVICE u32 begin(u32 worker) const
    {
        if (splits == 1) return (worker * quota + min(worker, longer)) * chunks;
        return worker < tiles * splits ? worker / splits * chunks + worker % splits * chunks / splits : tiles * chunks;
    }
    DEVICE Tile tile(const Products& p, u32 index) const
    {
        const u32 column = index / row_tiles;
        const RowTile rows = p.tiles[index - column * row_tiles];
        return Tile{rows.expert * SIDES, column * SIDE_COLUMNS, rows.first, rows.end};
    }
};

DEVICE u32 end_of_rows(const Products&, const Tile& tile) { return tile.end; }

#else

struct Tile { u32 which, column0, row0; };

// All chunks of all tiles in one line, and their division among blocks ("workers"). Rows are innermost: neighbours read the
// same weights.
struct Schedule
{
    u32 chunks, row_tiles, splits;
    u32 quota, longer;          // the first `longer` workers have a unit more than `quota`: a chunk, or with one split a tile

    DEVICE Schedule(const Products& p)
    {
        chunks = (p.matrix[0].k + 127) / 128;
        row_tiles = (p.rows + ROWS - 1) / ROWS;
        splits = p.splits;
        u32 tiles = 0;
        for (u32 m = 0; m < (PAIRED ? 1 : p.count); m++) tiles += (p.matrix[m].n + SIDE_COLUMNS - 1) / SIDE_COLUMNS;
        tiles *= row_tiles;
        const u32 units = splits ? tiles : tiles * chunks;
        quota = units / gridDim.x;
        longer = units - quota * gridDim.x;
    }
    // A worker's first chunk, and a chunk's worker.
    DEVICE u32 begin(u32 worker) const
    {
        if (splits > 1) return worker / splits * chunks + worker % splits * chunks / splits;
        const u32 unit = worker * quota + min(worker, longer);
        return splits ? unit * chunks : unit;
    }
    DEVICE u32 worker(u32 unit) const
    {
        const u32 of_longer = longer * (quota + 1);
        return unit < of_longer ? unit / (quota + 1) : longer + (unit - of_longer) / quota;
    }
    DEVICE u32 first_worker(u32 tile) const { return splits ? tile * splits : worker(tile * chunks); }
    DEVICE u32 last_worker(u32 tile) const { return splits ? tile * splits + splits - 1 : worker(tile * chunks + chunks - 1); }
    // Where a worker's partial sums of a tile go, whose first worker is `first`: only its first and last tile are split.
    DEVICE u32 slot(u32 worker, u32 first, u32 tile) const
    {
        return 2 * worker + (!splits && worker == first && begin(first) < tile * chunks ? 1 : 0);
    }
    DEVICE Tile tile(const Products& p, u32 index) const
    {
        u32 column = index / row_tiles, which = 0;
        const u32 row0 = (index - column * row_tiles) * ROWS;
        if (!PAIRED)
            for (; which + 1 < p.count; which++)
            {
                u32 columns = (p.matrix[which].n + SIDE_COLUMNS - 1) / SIDE_COLUMNS;
                if (column < columns) break;
                column -= columns;
            }
        return Tile{which, column * SIDE_COLUMNS, row0};
    }
};

DEVICE u32 end_of_rows(const Products& p, const Tile&) { return p.rows; }

#endif

DEVICE u32 weights_at(u32 side, u32 part, u32 row)
{
    return WEIGHTS + side * SIDE_WEIGHTS + part * PART_WEIGHTS + row * WEIGHT_ROW;
}

#if !WGMMA

// Where 16 bytes of a row of x lie: the eight lanes that read at once, two rows and four places 64 bytes apart, meet
// different banks.
DEVICE u32 place(u32 row, u32 unit)
{
    return row * 256 + ((unit & 8) | ((unit & 7) ^ (unit >> 3) * 2 ^ (row & 1))) * 16;
}

// What a thread copies of a chunk, and where to. A quarter of the threads copies each 32 rows ("part") of the weights.
const u32 COPIERS = THREADS / 4, UNITS = SIDE_COLUMNS / 4;          // of a part, and 16 bytes of a row
const u32 WEIGHT_COPIES = (MAX_BITS * UNITS + COPIERS - 1) / COPIERS;
const u32 X_ROWS = THREADS / 16, X_COPIES = ROWS / X_ROWS;          // rows copied at once
// 16 bytes of scales and of fours, for one side and one part; who copies them.
const u32 SCALE_UNITS = FORMAT == 0 ? SIDE_COLUMNS / 8 : 0, GROUP_UNITS = SCALE_UNITS + SIDE_COLUMNS / 32;
const u32 GROUP_COPIERS = FINE ? COPIERS : THREADS, ROLES = (SIDES * GROUP_UNITS + GROUP_COPIERS - 1) / GROUP_COPIERS;

struct Source
{
    u32 tile_index, chunk, chunks, k, row_bytes, x_valid, x_step, weight_valid, group_shift[SIDES];
    const char *x[XS], *weight[SIDES], *group[ROLES];
    const u64* block[SIDES];
    u64 entry[SIDES];       // of its 32 rows: packed row | bits << 24 | half scale << 32 | group << 48

    static DEVICE u32 part() { return threadIdx.x / COPIERS; }
    static DEVICE u32 copier() { return threadIdx.x % COPIERS; }

    DEVICE Source(const Products& p, const Schedule& schedule, u32 unit)
    {
        chunks = schedule.chunks;
        k = p.matrix[0].k;
        tile_index = unit / chunks;
        chunk = unit - tile_index * chunks;
        enter_tile(p, schedule);
        look_up();
    }

    DEVICE void enter_tile(const Products& p, const Schedule& schedule)
    {
        const Tile tile = schedule.tile(p, tile_index);
        const u32 n = p.matrix[tile.which].n;
        const u32 unit = copier() % UNITS, first_row = copier() / UNITS;
        row_bytes = n * 4;
        // Of the turns in which the columns differ, so many are inside.
        const u32 left = n - tile.column0;
        weight_valid = left > unit * 4 ? (left - unit * 4 + COPIERS * 4 - 1) / (COPIERS * 4) : 0;
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
        {
            const Matrix& m = p.matrix[tile.which + side];
            weight[side] = (const char*) (m.weight + tile.column0 + unit * 4) + (u64) first_row * row_bytes;
            block[side] = m.block;
            group_shift[side] = m.group_shift;
            if (side < XS)
                x[side] = (const char*) (m.x + (u64) (tile.row0 + threadIdx.x / 16) * m.x_stride + threadIdx.x % 16 * 8)
                          + chunk * 256;
        }
        // Both have the same stride.
        x_step = p.matrix[tile.which].x_stride * (X_ROWS * 2);
        const u32 row = tile.row0 + threadIdx.x / 16;
        const u32 rows = end_of_rows(p, tile);
        x_valid = rows > row ? (rows - row + X_ROWS - 1) / X_ROWS : 0;
        #pragma unroll
        for (u32 i = 0; i < ROLES; i++)
        {
            const u32 role = role_of(i), side = role / GROUP_UNITS, at = role % GROUP_UNITS;
            group[i] = nullptr;
            if (role >= SIDES * GROUP_UNITS) continue;
            const Matrix& m = p.matrix[tile.which + side];
            const bool scales = at < SCALE_UNITS;
            const u32 column = scales ? at * 8 : (at - SCALE_UNITS) * 32;
            if (column < left)
                group[i] = scales ? (const char*) (m.scale + tile.column0 + column)
                                  : (const char*) (m.four + (tile.column0 + column) / 8);
        }
    }

    static DEVICE u32 role_of(u32 i) { return i * GROUP_COPIERS + (FINE ? copier() : threadIdx.x); }

    // Behind the last row x counts as zero: any numbers will do, if only they have the scale of the others.
    DEVICE bool inside() const { return chunk * 128 + part() * 32 < k; }

    DEVICE void look_up()
    {
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
            if (FORMAT == 1) entry[side] = block[side][chunk * 4 + (inside() ? part() : 0)];
    }

    DEVICE void advance(const Products& p, const Schedule& schedule, bool more)
    {
        if (!more) return;
        chunk++;
        #pragma unroll
        for (u32 side = 0; side < XS; side++) x[side] += 256;
        if (chunk == chunks)
        {
            chunk = 0;
            tile_index++;
            enter_tile(p, schedule);
        }
        look_up();
    }

    DEVICE void copy_weights(char* stage) const
    {
        const bool real = inside();
        #pragma unroll
        for (u32 side = 0; side < SIDES; side++)
        {
            const u32 bits = FORMAT == 0 ? 4 : (u32) entry[side] >> 24 & 15, first_row = copier() / UNITS;
            const u32 packed = FORMAT == 0 ? chunk * 16 + part() * 4 : (u32) entry[side] & 0xffffff;
            const char* from = weight[side] + (u64) packed * row_bytes;
            char* to = stage + weights_at(side, part(), first_row) + copier() % UNITS * 16;
            #pragma unroll
            for (u32 i = 0; i < WEIGHT_COPIES; i++)
            {
                // Either a turn takes several rows, or a row several turns.
                const u32 row = i * COPIERS / UNITS, moved = UNITS > COPIERS ? i * COPIERS % UNITS : 0;
                if ((FORMAT == 0 || row + first_row < bits) && real && moved / COPIERS < weight_valid)
                    copy16(to + row * WEIGHT_ROW + moved * 16, from + (u64) row * row_bytes + moved * 16);
            }
            if (FORMAT == 1 && copier() == 0) *(u64*) (stage + BLOCKS + side * 32 + part() * 8) = entry[side];
        }
        #pragma unroll
        for (u32 i = 0; i < ROLES; i++)
        {
            const u32 role = role_of(i), side = role / GROUP_UNITS, at = role % GROUP_UNITS, fine = FINE ? part() : 0;
            if (!group[i]) continue;
            const bool scales = at < SCALE_UNITS;
            const u32 row = chunk * 128 + (FINE && inside() ? part() * 32 : 0);
            // A variable index would put these arrays into local memory.
            const bool second = SIDES == 2 && side;
            const u32 which = FORMAT == 1 ? (u32) ((second ? entry[SIDES - 1] : entry[0]) >> 48)
                                          : row >> (second ? group_shift[SIDES - 1] : group_shift[0]);
            const u32 to = scales ? SCALES + side * SIDE_SCALES + fine * (SIDE_COLUMNS * 2) + at * 16
                                  : FOURS + side * SIDE_FOURS + fine * (SIDE_COLUMNS / 2) + (at - SCALE_UNITS) * 16;
            copy16(stage + to, group[i] + (u64) which * (scales ? row_bytes / 2 : row_bytes / 8));
        }
    }

    DEVICE void copy_x(char* stage) const
    {
        const bool beyond = chunk * 128 + threadIdx.x % 16 * 8 >= k;
        #pragma unroll
        for (u32 side = 0; side < XS; side++)
        {
            char* to = stage + side * X_BYTES + place(threadIdx.x / 16, threadIdx.x % 16);
            const char* from = x[side];
            #pragma unroll
            for (u32 i = 0; i < X_COPIES; i++, from += x_step)
                if (i < x_valid && !beyond) copy16(to + i * (X_ROWS * 256), from);
            if (beyond)
                for (u32 i = 0; i < X_COPIES; i++) *(Words*) (to + i * (X_ROWS * 256)) = Words{0, 0, 0, 0};
        }
    }
};

// What a thread does once a chunk while the tensor cores are busy: request the copies of a later chunk, into the stage of the
// chunk before.
struct OverlappedWork
{
    const Products& p;
    const Schedule& schedule;
    Source& source;
    char* to;
    u32& copied;
    u32 end;
    bool due;

    DEVICE void operator()()
    {
        if (!due) return;
        due = false;
        if (copied < end)
        {
            source.copy_weights(to);
            source.copy_x(to);
            copied++;
            source.advance(p, schedule, copied < end);
        }
        copies_commit();
    }
};

#endif
