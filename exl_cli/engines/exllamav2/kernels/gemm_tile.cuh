// A chunk of `gemm.cu` in the tensor cores, and what becomes of the sums.

struct Lane
{
    u32 g, t, lift;
    u32 rows, strip;        // the warp's first row of the tile, and its first strip of a side
};

// Of each strip, half and tile: columns 4 g + 2 half and the next, rows 8 tile + 2 t and the next.
typedef float Sums[STRIPS][2][TILES][4];
const u32 QUADS = STRIPS * 2 * TILES, SLOT = QUADS * THREADS * 4;   // of a thread; numbers of all threads

// Scales wait for the sum over a chunk: where there are few rows that is less to do than scaling weights.
const bool LATE = !FINE && TILES <= 4 && !WGMMA;

DEVICE void clear(Sums& sums)
{
    #pragma unroll
    for (u32 i = 0; i < STRIPS * 2 * TILES * 4; i++) (&sums[0][0][0][0])[i] = 0.0f;
}

// A lane's four columns of a strip: four bits of each (see `Matrix`), their scales, and these as factors, twice in a word.
struct Columns
{
    u32 four;
    u64 scales;
    u32 factor[4];
};

DEVICE u32 side_of(u32 s) { return PAIRED ? s : 0; }
DEVICE u32 strip_of(const Lane& l, u32 s) { return PAIRED ? l.strip : l.strip + s; }

DEVICE float scale_of(const Columns& c, u32 i)
{
    if (FORMAT == 0) return to_float((u16) (c.scales >> (16 * i)));
    float root = small_float((c.four >> (4 * i) & 15) + 1);
    return root * root * to_float((u16) c.scales);
}

DEVICE void read_columns(const Lane& l, const char* stage, u64 block, u32 s, Columns& c)
{
    const u32 side = side_of(s), column = strip_of(l, s) * 32 + l.g * 4, part = FINE ? l.t : 0;
    c.four = *(const u16*) (stage + FOURS + side * SIDE_FOURS + part * (SIDE_COLUMNS / 2) + column / 2);
    c.scales = FORMAT == 1 ? block >> 32 & 0xffff
               : *(const u64*) (stage + SCALES + side * SIDE_SCALES + part * (SIDE_COLUMNS * 2) + column * 2);
    #pragma unroll
    for (int i = 0; i < 4; i++)
        c.factor[i] = LATE ? 0 : FORMAT == 0 ? both((u32) (c.scales >> (16 * i)) & 0xffff) : both(nearest_half(scale_of(c, i)));
}

// The lane's 32 rows of the chunk, all of BITS bits, for the COUNT strips from FIRST on. With WGMMA the last of these
// products are still in flight at the end.
template <int BITS, int FIRST, int COUNT>
DEVICE void multiply(const Lane& l, const char* stage, const Columns (&columns)[STRIPS], Sums& sums, OverlappedWork& overlapped)
{
    typedef Unit<BITS> U;
    u32 minus[COUNT][4][7];
    #pragma unroll
    for (int s = 0; s < COUNT; s++)
        #pragma unroll
        for (int c = 0; c < 4; c++)
        {
            u32 zero = FORMAT == 0 ? (columns[FIRST + s].four >> (c * 4) & 15) + 1 : 1u << (BITS - 1);
            minus[s][c][0] = offset<0>(zero, l.lift);
            minus[s][c][2] = offset<2>(zero, l.lift);
            minus[s][c][3] = offset<3>(zero, l.lift);
            minus[s][c][4] = offset<4>(zero, l.lift);
            minus[s][c][5] = offset<5>(zero, l.lift);
            minus[s][c][6] = offset<6>(zero, l.lift);
        }
    u32 words[COUNT][4][U::WORDS];
    #pragma unroll
    for (int q = 0; q < 4; q++)
    {
        if (q * 8 % U::K == 0)
        {
            #pragma unroll
            for (int s = 0; s < COUNT; s++)
                #pragma unroll
                for (int i = 0; i < U::WORDS; i++)
                {
                    const u32 row = q * 8 / U::K * U::WORDS + i, unit = strip_of(l, FIRST + s) * 8 + l.g;
                    Words w = *(const Words*) (stage + weights_at(side_of(FIRST + s), l.t, row) + unit * 16);
                    words[s][0][i] = w.x; words[s][1][i] = w.y; words[s][2][i] = w.z; words[s][3][i] = w.w;
                }
        }
        // Four pairs of each column: two steps of the tensor cores.
        u32 a[COUNT][4][4];
        #pragma unroll
        for (int s = 0; s < COUNT; s++)
            #pragma unroll
            for (int c = 0; c < 4; c++)
            {
                u32 all[U::K / 2];
                U::unpack(words[s][c], all, l.lift);
                #pragma unroll
                for (int i = 0; i < 4; i++)
                {
                    const int j = q * 8 % U::K / 2 + i;
                    a[s][c][i] = h2_add(all[j], minus[s][c][U::shift(j)]);
                    if (!LATE) a[s][c][i] = h2_mul(a[s][c][i], columns[FIRST + s].factor[c]);
                }
            }
        const char* xs = stage + (TWO_X ? FIRST * X_BYTES : 0);
#if WGMMA
        wgmma_fence();
        #pragma unroll
        for (int step = 0; step < 2; step++)
        {
            const u64 x = x_descriptor(xs + q / 2 * (ROWS * 128) + l.rows * 128 + q % 2 * 64 + step * 32);
            #pragma unroll
            for (int s = 0; s < COUNT; s++)
                #pragma unroll
                for (int half = 0; half < 2; half++)
                {
                    const u32 *low = a[s][half * 2] + step * 2, *high = a[s][half * 2 + 1] + step * 2;
                    wgmma(sums[FIRST + s][half], low[0], high[0], low[1], high[1], x);
                }
        }
        wgmma_commit();
        // The products of the chunk before are complete then, too.
        wgmma_wait<1>();
        if (q == 0) overlapped();
#else
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
        {
            Words x = *(const Words*) (xs + place(l.rows + tile * 8 + l.g, l.t * 4 + q));
            #pragma unroll
            for (int step = 0; step < 2; step++)
                #pragma unroll
                for (int s = 0; s < COUNT; s++)
                    #pragma unroll
                    for (int half = 0; half < 2; half++)
                    {
                        const u32 *low = a[s][half * 2] + step * 2, *high = a[s][half * 2 + 1] + step * 2;
                        mma(sums[FIRST + s][half][tile], low[0], high[0], low[1], high[1], step ? x.z : x.x,
                            step ? x.w : x.y);
                    }
        }
        if (q == 0) overlapped();
#endif
    }
}

template <int FIRST, int COUNT>
DEVICE void multiply_any(u32 bits, const Lane& l, const char* stage, const Columns (&columns)[STRIPS], Sums& sums,
                         OverlappedWork& overlapped)
{
#if FORMAT == 0
    multiply<4, FIRST, COUNT>(l, stage, columns, sums, overlapped);
#else
    switch (bits)
    {
    case 2: multiply<2, FIRST, COUNT>(l, stage, columns, sums, overlapped); break;
    case 3: multiply<3, FIRST, COUNT>(l, stage, columns, sums, overlapped); break;
    case 4: multiply<4, FIRST, COUNT>(l, stage, columns, sums, overlapped); break;
    #if MAX_BITS > 4
    case 5: multiply<5, FIRST, COUNT>(l, stage, columns, sums, overlapped); break;
    case 6: multiply<6, FIRST, COUNT>(l, stage, columns, sums, overlapped); break;
    #endif
    #if MAX_BITS > 6
    case 8: multiply<8, FIRST, COUNT>(l, stage, columns, sums, overlapped); break;
    #endif
    }
#endif
}

// The strips from FIRST on, which are of one side.
template <int FIRST, int COUNT>
DEVICE void compute_strips(const Lane& l, const char* stage, Sums& sums, OverlappedWork& overlapped)
{
    const u64* blocks = (const u64*) (stage + BLOCKS + side_of(FIRST) * 32);
    const u64 block = FORMAT == 0 ? 4u << 24 : blocks[FINE ? l.t : 0];
    const u32 bits = (u32) block >> 24;
    Columns columns[STRIPS];
    #pragma unroll
    for (int s = FIRST; s < FIRST + COUNT; s++) read_columns(l, stage, block, s, columns[s]);
    if (FINE && FORMAT == 1)
    {
        // A product needs all lanes. Where the width changes inside a chunk, each width takes a turn, and lanes of other
        // widths take part with a factor of zero: whatever their bits unpack to is finite.
        u32 widths = 0;
        #pragma unroll
        for (int part = 0; part < 4; part++) widths |= 1u << ((u32) blocks[part] >> 24);
        #pragma unroll 1
        for (u32 width = 8; width >= 2; width--)
        {
            if (!(widths >> width & 1)) continue;
            Columns own[STRIPS];
            #pragma unroll
            for (int s = FIRST; s < FIRST + COUNT; s++)
            {
                own[s] = columns[s];
                #pragma unroll
                for (int c = 0; c < 4; c++) own[s].factor[c] = bits == width ? columns[s].factor[c] : 0;
            }
            multiply_any<FIRST, COUNT>(width, l, stage, own, sums, overlapped);
        }
        return;
    }
    if (!LATE)
    {
        multiply_any<FIRST, COUNT>(bits, l, stage, columns, sums, overlapped);
        return;
    }
    Sums part;
    clear(part);
    multiply_any<FIRST, COUNT>(bits, l, stage, columns, part, overlapped);
    #pragma unroll
    for (int s = FIRST; s < FIRST + COUNT; s++)
        #pragma unroll
        for (int c = 0; c < 4; c++)
        {
            float scale = scale_of(columns[s], c);
            #pragma unroll
            for (int tile = 0; tile < TILES; tile++)
            {
                sums[s][c / 2][tile][c % 2 * 2] += scale * part[s][c / 2][tile][c % 2 * 2];
                sums[s][c / 2][tile][c % 2 * 2 + 1] += scale * part[s][c / 2][tile][c % 2 * 2 + 1];
            }
        }
}

DEVICE void compute(const Lane& l, const char* stage, Sums& sums, OverlappedWork& overlapped)
{
#if PAIRED && (FORMAT == 1 || TWO_X || WGMMA)
    // Widths, or x, may differ.
    compute_strips<0, 1>(l, stage, sums, overlapped);
    compute_strips<1, 1>(l, stage, sums, overlapped);
#else
    compute_strips<0, STRIPS>(l, stage, sums, overlapped);
#endif
}

#if EXPERTS
const bool SCATTERS = WGMMA && PAIRED;     // the next product wants its input in the order for WGMMA, too

DEVICE bool first_split(const Products& p) { return blockIdx.x % p.splits == 0; }
DEVICE u32 out_row(const Products& p, u32 row) { return row + blockIdx.x % p.splits * p.split_rows; }
#else
const bool SCATTERS = false;

DEVICE bool first_split(const Products&) { return true; }
DEVICE u32 out_row(const Products&, u32 row) { return row; }
#endif

// Eight rows of a strip, of a pair of both sides.
DEVICE void write(const Products& p, const Lane& l, Tile at, u32 s, u32 tile, const float (&sum)[SIDES][2][4])
{
    const Matrix& m = p.matrix[at.which];
    const u32 column = at.column0 + strip_of(l, s) * 32 + l.g * 4;
    if (column >= m.n) return;
    #pragma unroll
    for (u32 j = 0; j < 2; j++)
    {
        const u32 row = at.row0 + l.rows + tile * 8 + l.t * 2 + j;
        if (row >= end_of_rows(p, at)) continue;
        float v[4];
        #pragma unroll
        for (int c = 0; c < 4; c++)
        {
            v[c] = sum[0][c / 2][c % 2 * 2 + j] + (m.bias && first_split(p) ? to_float(m.bias[column + c]) : 0.0f);
            if (PAIRED)
            {
                const u16* bias = p.matrix[at.which + 1].bias;
                v[c] = activate(v[c], p.activation)
                       * (sum[SIDES - 1][c / 2][c % 2 * 2 + j] + (bias ? to_float(bias[column + c]) : 0.0f));
            }
        }
        const u64 to = (u64) out_row(p, row) * m.out_stride;
        if (SCATTERS || m.scatter)
            #pragma unroll
            for (int c = 0; c < 4; c++)
            {
                const u32 at = m.scatter ? m.scatter[column + c] : column + c;
                m.out[to + (SCATTERS ? place_for_wgmma(at) : at)] = to_half(v[c]);
            }
        else
        {
            if (m.add)
            {
                const u64 more = *(const u64*) (m.add + to + column);
                #pragma unroll
                for (int c = 0; c < 4; c++) v[c] += to_float((u16) (more >> (16 * c)));
            }
            *(u64*) (m.out + to + column) = to_halves(v[0], v[1]) | (u64) to_halves(v[2], v[3]) << 32;
        }
    }
}

DEVICE void write_all(const Products& p, const Lane& l, Tile at, const Sums& sums)
{
    #pragma unroll
    for (u32 s = 0; s < (PAIRED ? 1 : STRIPS); s++)
        #pragma unroll
        for (u32 tile = 0; tile < TILES; tile++)
        {
            float sum[SIDES][2][4];
            #pragma unroll
            for (u32 i = 0; i < SIDES * 8; i++) (&sum[0][0][0])[i] = sums[s + i / 8][i / 4 % 2][tile][i % 4];
            write(p, l, at, s, tile, sum);
        }
}
