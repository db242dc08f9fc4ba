// The operands of `gemv.cu`: what it is given, and how a lane gets its share of weights, scales and x.

const u32 STRIPS = COLUMNS / 32;                                    // of a block
const u32 SLOT = 512;                                               // bytes: 16 of each lane
const u32 X_BYTES = ONE_ROW ? 0 : TILES * 8 * 256;                  // 128 numbers of each row
const bool SHARED_X = STRIPS > 1;                                   // or else each warp has its own, behind its weights
const u32 OWN_X = SHARED_X ? 0 : X_BYTES;
const u32 PARTS = FINE ? 4 : 1;                                     // of a chunk, that may be of different groups
const u32 SCALES = FORMAT == 0 ? PARTS * 64 : 0, FOURS = PARTS * 16;
// Sectors of 32 bytes of memory must become such of shared memory, or they are asked for twice.
const u32 STAGE = (MAX_BITS * SLOT + OWN_X + SCALES + FOURS + 31) / 32 * 32;
const u32 ROWS = ONE_ROW ? 1 : TILES * 8;

struct Lane
{
    // For copying.
    const char* weight;     // of the columns that it copies
    const char* groups;     // where the first group's scales or fours are, of which it copies 16 bytes; or null
    u32 group_bytes;        // from one group to the next
    u32 group_to;           // where they go, in a stage
    const u16* x;
    const u64* block;
    u32 n, k, x_stride, group_shift;
    char* ring;
    u32 x_from, x_step;     // of the 16 bytes of a chunk's x that it copies the first, and every x_step-th
    // Where x comes to lie, and from one stage to the next.
    char* x_ring;
    u32 x_stage;
    // For computing.
    const Words* row;       // with ONE_ROW: x in shared memory, its 16 bytes in the order of `row_place`
    u32 lane, g, t, rows, lift;
};

// Where 16 bytes of a slot lie, so that eight lanes at a time meet different banks, copying as well as reading.
DEVICE u32 swizzled(u32 part, u32 columns) { return (part * 8 + (columns ^ part * 2)) * 16; }

// What a lane copies is not what it computes with. Eight lanes side by side copy 128 bytes of one packed row, or the two
// halves of a sector are asked for apart: lane i the columns 4 (i % 8) of the 32 rows i / 8.
//
// Of those rows: packed row | bits << 24 | half scale << 32 | group << 48.
DEVICE u64 block_of(const Lane& l, u32 chunk)
{
    u32 block = chunk * 4 + l.lane / 8;
    if (block * 32 >= l.k)
    {
        // Behind the last row x counts as zero: any numbers will do, if only they have the scale of the others.
        if (FINE) return 0;
        block = chunk * 4;
    }
    if (FORMAT == 0) return block * 4 | 4u << 24;
    return l.block[block];
}

// The block of the rows that a lane computes with.
DEVICE u64 block_for(const Lane& l, u64 copied) { return FINE && FORMAT == 1 ? from_lane(copied, l.t * 8) : copied; }

DEVICE u32 bits_of(u64 block) { return FORMAT == 0 ? 4 : (u32) block >> 24; }

DEVICE void copy_weights(const Lane& l, u32 stage, u64 block)
{
    char* to = l.ring + stage * STAGE + swizzled(l.lane / 8, l.lane % 8);
    u32 bits = bits_of(block);
    const char* from = l.weight + (u64) ((u32) block & 0xffffff) * (l.n * 4);
    #pragma unroll
    for (u32 i = 0; i < MAX_BITS; i++, from += l.n * 4)
        if (i < bits) copy16(to + i * SLOT, from);
}

// Scales and zero points of the chunk's groups, 32 columns each, are copied by a few lanes. They are not loaded into
// registers: an instruction that waits for a load waits for later ones, too.
DEVICE void choose_groups(Lane& l, const Matrix& m, u32 column0)
{
    const char* fours = (const char*) (m.four + column0 / 8);
    l.groups = nullptr;
    l.group_bytes = l.n / 2;
    l.group_to = MAX_BITS * SLOT + OWN_X + SCALES;
    if (FORMAT == 1)
    {
        if (l.lane % 8 || l.lane / 8 >= PARTS) return;
        l.groups = fours;
        l.group_to += l.lane * 2;
        return;
    }
    if (l.lane >= PARTS * 5) return;
    if (l.lane >= PARTS * 4)
    {
        l.groups = fours;
        l.group_to += (l.lane - PARTS * 4) * 16;
        return;
    }
    l.groups = (const char*) (m.scale + column0 + l.lane % 4 * 8);
    l.group_bytes = l.n * 2;
    l.group_to += l.lane * 16 - SCALES;
}

DEVICE void copy_groups(const Lane& l, u32 chunk, u32 stage, u64 block)
{
    if (!l.groups) return;
    u32 group = (u32) (block >> 32) >> 16;
    if (FORMAT == 0)
    {
        u32 part = l.lane >= PARTS * 4 ? l.lane - PARTS * 4 : l.lane / 4;
        group = (FINE ? min(chunk * 128 + part * 32, l.k - 1) : chunk * 128) >> l.group_shift;
    }
    copy16(l.ring + stage * STAGE + l.group_to, l.groups + (u64) group * l.group_bytes);
}

// Four bits of each of a lane's four columns, and GPTQ's scales of them, from the ring.
DEVICE u32 fours_at(const Lane& l, const char* stage)
{
    const char* from = stage + MAX_BITS * SLOT + OWN_X + SCALES + (FINE ? l.t * 16 : 0);
    return *(const u32*) (from + l.g / 2 * 4) >> (l.g & 1 ? 16 : 0);
}
DEVICE u64 scales_at(const Lane& l, const char* stage)
{
    return *(const u64*) (stage + MAX_BITS * SLOT + OWN_X + (FINE ? l.t * 64 : 0) + l.g * 8);
}

// Where 16 bytes of a row of x lie in the ring: so that the eight lanes that read at once, two rows and four places 64
// bytes apart, meet eight different groups of banks.
DEVICE u32 place(u32 row, u32 unit) { return row * 256 + ((unit & 8) | ((unit & 7) ^ (unit >> 3) * 2 ^ (row & 1))) * 16; }

DEVICE void copy_x(const Lane& l, u32 chunk, u32 stage)
{
    if (ONE_ROW) return;
    char* to = l.x_ring + stage * l.x_stage;
    #pragma unroll
    for (u32 i = 0; i < TILES * 4; i++)
    {
        u32 part = l.x_from + i * l.x_step, row = part / 16, unit = part % 16, from = chunk * 128 + unit * 8;
        if (row < l.rows && from < l.k) copy16(to + place(row, unit), l.x + row * l.x_stride + from);
    }
}

// Of 128 numbers of a row of x, the eight at i of those that are this lane's. Rows that are not there may be anything:
// their sums are not used. Behind the last of k it must be zero.
DEVICE Words x_at(const Lane& l, u32 chunk, const char* xs, u32 tile, u32 i)
{
    if (ONE_ROW) return l.row[chunk * 16 + i * 4 + l.t];
    if (chunk * 128 + l.t * 32 >= l.k) return Words{0, 0, 0, 0};
    return *(const Words*) (xs + place(tile * 8 + l.g, l.t * 4 + i));
}
