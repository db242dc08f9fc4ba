// The operands of `gemv.cu`: what it is given, and how a lane gets its share of weights, scales and x.

struct Matrix
{
    const u32* weight;      // packed rows of n columns
    const u16* x;           // half, row r at x + r x_stride, in the order of the weight's rows; with ONE_ROW see perm
    const u16* perm;        // with ONE_ROW: the weight's row j belongs to x[perm[j]]; or null: to x[j]
    const u16* norm;        // with ONE_ROW: x is normed (RMS) with these weights first; or null
    const u32* four;        // four bits a column, rows of n / 8: zero points less 1 (GPTQ) or scales (EXL2), per group
    const u16* scale;       // half, rows of n, per group (GPTQ)
    const u64* block;       // per 32 rows (EXL2): packed row | bits << 24 | half scale << 32 | group << 48
    const u16* bias;        // half, n; or null
    const u16* scatter;     // where in the output each column goes; or null: in order
    u16* out;               // half, row r at out + r out_stride
    const u16* add;         // half, laid out as out, is added; or null
    float epsilon;          // of the norm
    u32 n, k, x_stride, out_stride, group_shift, first_block;
};

struct Products
{
    Matrix matrix[3];
    u32 count;              // of matrices, one beside the other; with PAIRED always two, of the same n
    u32 rows;
    u32 activation;         // of a gate: 0 SiLU, 1 GELU (tanh)
};

const u32 SLOT = 512;                                               // bytes: 16 of each lane
const u32 X_BYTES = ONE_ROW ? 0 : TILES * 8 * 256;                  // 128 numbers of each row
const u32 STAGE = MAX_BITS * SLOT + X_BYTES;
const u32 ROWS = ONE_ROW ? 1 : TILES * 8;

struct Lane
{
    const u32* weight;      // of the matrix, as in `Matrix`
    const u16* x;
    const u32* four;
    const u16* scale;
    const u64* block;
    u32 n, k, x_stride, group_shift;
    char* ring;
    const u16* row;         // with ONE_ROW: x in shared memory
    u32 lane, g, t, column, rows, lift;
};

// Of a chunk's 32 rows that are this lane's: packed row | bits << 24 | half scale << 32 | group << 48.
DEVICE u64 block_of(const Lane& l, u32 chunk)
{
    u32 block = chunk * 4 + l.t;
    if (block * 32 >= l.k)
    {
        // Behind the last row x counts as zero: any numbers will do, if only they have the scale of the others.
        if (FINE) return 0;
        block = chunk * 4;
    }
    if (FORMAT == 0) return block * 4 | 4u << 24;
    return l.block[block];
}

// What else those rows need: scales of the four columns, and zero points, as they lie in memory. Nothing is done with them
// before a chunk's turn comes: an instruction that needs them would wait for memory once a chunk.
struct Meta { u32 four; u64 scale; };

DEVICE Meta meta_of(const Lane& l, u32 chunk, u64 block)
{
    u32 group = block >> 48;
    if (FORMAT == 0) group = min(chunk * 128 + (FINE ? l.t * 32 : 0), l.k - 1) >> l.group_shift;
    Meta meta;
    meta.four = l.four[group * (l.n / 8) + l.column / 8];
    meta.scale = FORMAT == 0 ? *(const u64*) (l.scale + group * l.n + l.column) : block >> 32 & 0xffff;
    return meta;
}

DEVICE void copy_weights(const Lane& l, u32 stage, u64 block)
{
    char* to = l.ring + stage * STAGE + l.lane * 16;
    u32 bits = FORMAT == 0 ? 4 : block >> 24 & 0xff;
    const u32* from = l.weight + (u64) (block & 0xffffff) * l.n + l.column;
    #pragma unroll
    for (u32 i = 0; i < MAX_BITS; i++)
        if (i < bits) copy16(to + i * SLOT, from + i * l.n);
}

// Where 16 bytes of a row of x lie in the ring: so that the eight lanes that read at once, two rows and four places 64
// bytes apart, meet eight different groups of banks.
DEVICE u32 place(u32 row, u32 unit) { return row * 256 + ((unit & 8) | ((unit & 7) ^ (unit >> 3) * 2 ^ (row & 1))) * 16; }

DEVICE void copy_x(const Lane& l, u32 chunk, u32 stage)
{
    if (ONE_ROW) return;
    char* to = l.ring + stage * STAGE + MAX_BITS * SLOT;
    u32 unit = l.lane % 16, from = chunk * 128 + unit * 8;
    if (from >= l.k) return;
    #pragma unroll
    for (u32 i = 0; i < TILES * 4; i++)
    {
        u32 row = 2 * i + l.lane / 16;
        if (row < l.rows) copy16(to + place(row, unit), l.x + row * l.x_stride + from);
    }
}
