// A chunk of `gemv.cu` in the tensor cores: weights unpacked, multiplied with x, scaled, added to a warp's sums.

typedef float Sums[2][TILES][4];

DEVICE void clear(Sums& sums)
{
    #pragma unroll
    for (int half = 0; half < 2; half++)
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            #pragma unroll
            for (int i = 0; i < 4; i++) sums[half][tile][i] = 0.0f;
}

// One lane's 32 rows of a chunk, all of BITS bits. `factor`: with FINE, scales of the four columns, twice in a word.
template <int BITS>
DEVICE void multiply(const Lane& l, u32 chunk, const char* stage, const char* xs_at, const u32 (&factor)[4], u32 zeros,
                     Sums& sums)
{
    typedef Unit<BITS> U;
    // What is too much of a number, for each column and shift in use; EXL2's are the same for all columns.
    u32 minus[4][7];
    #pragma unroll
    for (int c = 0; c < 4; c++)
    {
        u32 zero = FORMAT == 0 ? (zeros >> (c * 4) & 15) + 1 : 1u << (BITS - 1);
        minus[c][0] = offset<0>(zero, l.lift);
        minus[c][2] = offset<2>(zero, l.lift);
        minus[c][3] = offset<3>(zero, l.lift);
        minus[c][4] = offset<4>(zero, l.lift);
        minus[c][5] = offset<5>(zero, l.lift);
        minus[c][6] = offset<6>(zero, l.lift);
    }
    #pragma unroll
    for (int u = 0; u < 32 / U::K; u++)
    {
        u32 words[4][U::WORDS];
        #pragma unroll
        for (int i = 0; i < U::WORDS; i++)
        {
            Words w = *(const Words*) (stage + (u * U::WORDS + i) * SLOT + swizzled(l.t, l.g));
            words[0][i] = w.x; words[1][i] = w.y; words[2][i] = w.z; words[3][i] = w.w;
        }
        u32 xs[TILES][U::K / 2];
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            #pragma unroll
            for (int i = 0; i < U::K / 8; i++)
            {
                Words w = x_at(l, chunk, xs_at, tile, u * (U::K / 8) + i);
                xs[tile][4 * i] = w.x; xs[tile][4 * i + 1] = w.y; xs[tile][4 * i + 2] = w.z; xs[tile][4 * i + 3] = w.w;
            }
        #pragma unroll
        for (int half = 0; half < 2; half++)
        {
            u32 a[2][U::K / 2];
            #pragma unroll
            for (int c = 0; c < 2; c++)
            {
                U::unpack(words[half * 2 + c], a[c], l.lift);
                #pragma unroll
                for (int i = 0; i < U::K / 2; i++)
                {
                    a[c][i] = h2_add(a[c][i], minus[half * 2 + c][U::shift(i)]);
                    if (FINE) a[c][i] = h2_mul(a[c][i], factor[half * 2 + c]);
                }
            }
            #pragma unroll
            for (int s = 0; s < U::K / 4; s++)
                #pragma unroll
                for (int tile = 0; tile < TILES; tile++)
                {
                    const u32* b = &xs[tile][2 * s];
                    mma(sums[half][tile], a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1], b[0], b[1]);
                }
        }
    }
}

DEVICE void multiply_any(u32 bits, const Lane& l, u32 chunk, const char* stage, const char* xs_at,
                         const u32 (&factor)[4], u32 zeros, Sums& sums)
{
#if FORMAT == 0
    multiply<4>(l, chunk, stage, xs_at, factor, zeros, sums);
#else
    switch (bits)
    {
    case 2: multiply<2>(l, chunk, stage, xs_at, factor, 0, sums); break;
    case 3: multiply<3>(l, chunk, stage, xs_at, factor, 0, sums); break;
    case 4: multiply<4>(l, chunk, stage, xs_at, factor, 0, sums); break;
    #if MAX_BITS > 4
    case 5: multiply<5>(l, chunk, stage, xs_at, factor, 0, sums); break;
    case 6: multiply<6>(l, chunk, stage, xs_at, factor, 0, sums); break;
    #endif
    #if MAX_BITS > 6
    case 8: multiply<8>(l, chunk, stage, xs_at, factor, 0, sums); break;
    #endif
    }
#endif
}

DEVICE void compute(const Lane& l, u32 chunk, u32 stage_index, u64 copied, Sums& sums)
{
    const char *stage = l.ring + stage_index * STAGE, *xs_at = l.x_ring + stage_index * l.x_stage;
    const u64 block = block_for(l, copied);
    const u32 bits = bits_of(block);
    const u32 four = fours_at(l, stage);
    const u64 scales = FORMAT == 0 ? scales_at(l, stage) : (u32) (block >> 32) & 0xffff;
#if FINE
    u32 factor[4];
    #pragma unroll
    for (int c = 0; c < 4; c++)
    {
        u32 root = (four >> (4 * c) & 15) + 1;
        factor[c] = FORMAT == 0 ? both(scales >> (16 * c) & 0xffff)
                                : h2_mul(both(nearest_half((float) (root * root))), both(scales));
    }
    // A warp's product needs all its lanes. Where the width changes inside a chunk each width takes a turn, and lanes
    // of another one take part with a factor of zero on the finite numbers that their bits make.
    u32 widths = FORMAT == 0 ? 1u << 4 : warp_or(1u << bits) & ~1u;
    #pragma unroll 1
    for (u32 width = 8; width >= 2; width--)
    {
        if (!(widths >> width & 1)) continue;
        u32 own[4];
        #pragma unroll
        for (int c = 0; c < 4; c++) own[c] = bits == width ? factor[c] : 0;
        multiply_any(width, l, chunk, stage, xs_at, own, four, sums);
    }
#else
    // One width and one group, so one scale of a column, for the whole chunk: the scale can wait for the sum.
    const u32 none[4] = {};
    Sums part;
    clear(part);
    multiply_any(bits, l, chunk, stage, xs_at, none, four, part);
    #pragma unroll
    for (int c = 0; c < 4; c++)
    {
        float root = small_float((four >> (4 * c) & 15) + 1);
        float scale = FORMAT == 0 ? to_float(scales >> (16 * c) & 0xffff) : root * root * to_float(scales);
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
        {
            sums[c / 2][tile][c % 2 * 2] += scale * part[c / 2][tile][c % 2 * 2];
            sums[c / 2][tile][c % 2 * 2 + 1] += scale * part[c / 2][tile][c % 2 * 2 + 1];
        }
    }
#endif
}
