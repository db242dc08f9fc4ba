// Quantized matrices side by side and what they multiply: the argument of `gemv.cu` and `gemm.cu`.

struct Matrix
{
    const u32* weight;      // packed rows of n columns
    const u16* x;           // half, row r at x + r x_stride, in the order of the weight's rows; with ONE_ROW see perm
    const u16* perm;        // with ONE_ROW: the weight's row j belongs to x[perm[j]]; or null: to x[j]
    const u16* norm;        // with ONE_ROW: x is normed (RMS) first, row j of the weight then sees it times norm[j]; or null
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

// Rows from `first` to before `end`, of all rows that experts have, sorted by expert: as many as a tile, or an expert's last.
struct RowTile { u32 expert, first, end; };

#if EXPERTS

// `gemm.cu` for a mixture of experts. Which rows are whose is known on the GPU only.
struct Products
{
    const Matrix* matrix;   // of one expert after the other, with PAIRED two of each; all of the same n and k
    const RowTile* tiles;
    const u32* row_tiles;   // how many there are
    u32 activation;         // of a gate: 0 SiLU, 1 GELU (tanh)
    u32 splits;             // of each tile, along k; if there are several, each needs its own block; 1 with PAIRED
    u32 split_rows;         // rows of the output from one split's sums to the next one's
};

#else

struct Products
{
    Matrix matrix[3];
    u32 count;              // of matrices, side by side; with PAIRED always two, of the same n and, with ONE_ROW, x
    u32 rows;
    u32 activation;         // of a gate: 0 SiLU, 1 GELU (tanh)
    u32 splits;             // of `gemm.cu`: parts of each tile, along k (split-K); 0: stream-K
    float* partial;         // of `gemm.cu`: partial sums of tiles that several blocks compute, two tiles a block
    u32* arrived;           // of `gemm.cu`: for each tile zero, before and after
};

#endif

// The tensor cores read an input in another order with WGMMA (see `many_rows.places`). Of numbers in that order the eight from
// `i` on, a multiple of 8; and where in that order the weight's row `row` has its number.
DEVICE Words eight_for_wgmma(const u16* p, u32 i)
{
    p += i / 128 * 128 + i % 128 / 16 * 4 + i / 8 % 2 * 2;
    return Words{*(const u32*) p, *(const u32*) (p + 32), *(const u32*) (p + 64), *(const u32*) (p + 96)};
}
DEVICE u32 place_for_wgmma(u32 row)
{
    return row / 128 * 128 + row % 32 / 4 * 16 + row / 2 % 2 * 8 + row % 128 / 32 * 2 + row % 2;
}

DEVICE float activate(float gate, u32 activation)
{
    if (activation == 0) return gate * reciprocal(1.0f + power_of_two(-1.4426950408889634f * gate));
    return 0.5f * gate * (1.0f + tanhf(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate)));
}
