// A quantized matrix as half precision numbers in the model's order, for products of so many rows that unpacking it once is
// cheaper than on the way into the tensor cores, and cuBLAS multiplies faster.
//
// A warp takes 32 rows of weights, which have one width, and 128 columns: a lane reads 16 bytes of each packed row, four
// columns, and writes 8 bytes of each of the 32 rows. What it does per number is little, so memory limits it: bytes
// written, which are four times those read at 4 bits.
//
// H200, GPTQ, all matrices of a 7B: predicted 4.1 ms (every byte once at 4.3 TB/s), measured 4.7; exllamav2's kernels 6.7.
// torch's products of what comes out take 32.3 ms at 2,048 rows, exllamav2's calls of cuBLAS 37.7.
//
// Compiled with: FORMAT 0 (GPTQ, 4 bits) or 1 (EXL2).

#include "device.cuh"
#include "unpack.cuh"

const u32 WARPS = 4;

struct Dequantize
{
    const u32* weight;      // as of `Matrix`
    const u32* four;
    const u16* scale;
    const u64* block;
    const u16* perm;        // row j of the weight becomes row perm[j]; or null: row j
    u16* out;               // row r at out + r stride
    u32 n, k, stride, group_shift;
};

template <int BITS>
DEVICE void unpack_block(const Dequantize& p, u32 packed, u32 row0, u32 column, const u32 (&zero)[4], const u32 (&factor)[4])
{
    typedef Unit<BITS> U;
    const u32 lift = 0x64006400u;
    Words words[BITS];
    #pragma unroll
    for (int i = 0; i < BITS; i++) words[i] = *(const Words*) (p.weight + (u64) (packed + i) * p.n + column);
    #pragma unroll
    for (int unit = 0; unit < 32 / U::K; unit++)
    {
        u32 pairs[4][U::K / 2];
        #pragma unroll
        for (int c = 0; c < 4; c++)
        {
            u32 own[U::WORDS];
            #pragma unroll
            for (int i = 0; i < U::WORDS; i++)
            {
                const Words& w = words[unit * U::WORDS + i];
                own[i] = c == 0 ? w.x : c == 1 ? w.y : c == 2 ? w.z : w.w;
            }
            U::unpack(own, pairs[c], lift);
            #pragma unroll
            for (int i = 0; i < U::K / 2; i++)
            {
                const int shift = U::shift(i);
                const u32 minus = zero[c] * (both(1) << shift) + (lift + both(0x8000 - shift * 0x400));
                pairs[c][i] = h2_mul(h2_add(pairs[c][i], minus), factor[c]);
            }
        }
        #pragma unroll
        for (int i = 0; i < U::K / 2; i++)
        {
            const u32 row = row0 + unit * U::K + i * 2;
            const u32 to = p.perm ? *(const u32*) (p.perm + row) : row | (row + 1) << 16;
            *(u64*) (p.out + (u64) (to & 0xffff) * p.stride + column) =
                low_halves(pairs[0][i], pairs[1][i]) | (u64) low_halves(pairs[2][i], pairs[3][i]) << 32;
            *(u64*) (p.out + (u64) (to >> 16) * p.stride + column) =
                high_halves(pairs[0][i], pairs[1][i]) | (u64) high_halves(pairs[2][i], pairs[3][i]) << 32;
        }
    }
}

// Grid: 128 columns, 128 rows.
extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize(const Dequantize p)
{
    const u32 column = blockIdx.x * 128 + threadIdx.x % 32 * 4, row0 = (blockIdx.y * WARPS + threadIdx.x / 32) * 32;
    let_next_start();
    wait_for_inputs();
    if (row0 >= p.k || column >= p.n) return;
    u32 bits = 4, packed = row0 / 8, group = row0 >> p.group_shift, zero[4], factor[4];
    u64 block = 0;
    if (FORMAT == 1)
    {
        block = p.block[row0 / 32];
        packed = (u32) block & 0xffffff;
        bits = (u32) block >> 24 & 15;
        group = (u32) (block >> 48);
    }
    const u64 at = (u64) group * p.n + column;
    const u32 fours = ((const u16*) p.four)[at / 4];
    #pragma unroll
    for (int c = 0; c < 4; c++)
    {
        const u32 four = (fours >> (4 * c) & 15) + 1;
        zero[c] = FORMAT == 0 ? four : 1u << (bits - 1);
        const float root = small_float(four);
        factor[c] = both(FORMAT == 0 ? p.scale[at + c] : nearest_half(root * root * to_float((u16) (block >> 32))));
    }
    if (FORMAT == 0) unpack_block<4>(p, packed, row0, column, zero, factor);
    else switch (bits)
    {
    case 2: unpack_block<2>(p, packed, row0, column, zero, factor); break;
    case 3: unpack_block<3>(p, packed, row0, column, zero, factor); break;
    case 4: unpack_block<4>(p, packed, row0, column, zero, factor); break;
    case 5: unpack_block<5>(p, packed, row0, column, zero, factor); break;
    case 6: unpack_block<6>(p, packed, row0, column, zero, factor); break;
    case 8: unpack_block<8>(p, packed, row0, column, zero, factor); break;
    }
}
