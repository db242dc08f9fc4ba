// From packed weights to pairs of half precision numbers, in the order in which exllamav2 leaves them after loading:
// it reorders the bits of each 32-row block in place, so that two neighbouring weights lie 16 bits apart (its
// `quant/qdq_*.cuh`, version 0.3.2). A number q in the bits of a half from SHIFT on, under the exponent of which SHIFT is
// the unit, reads as 2^(10 - SHIFT) + q, and `offset` added makes it q - zero. All of this is exact.

DEVICE constexpr u32 both(u32 half) { return half | half << 16; }

// The exponents of those halves: 0x6400 for a shift of 0, a power of two less for each one more. `lift` is 0x64006400,
// from `in_register`: an instruction holds one constant, and of two in an expression the compiler loads one each time.
template <int SHIFT> DEVICE u32 pair(u32 q, u32 mask, u32 lift)
{
    return (q & mask << SHIFT) | (lift - both(SHIFT * 0x400));
}

// Twice the half that is -(2^(10 - SHIFT) + zero).
template <int SHIFT> DEVICE u32 offset(u32 zero, u32 lift)
{
    return zero * (both(1) << SHIFT) + (lift + both(0x8000 - SHIFT * 0x400));
}

// Unit<BITS>: WORDS consecutive words of a column hold K consecutive rows; `unpack` gives K / 2 pairs, that at i with
// the shift `shift(i)`.
template <int BITS> struct Unit;

template <> struct Unit<4>
{
    static const int WORDS = 1, K = 8;
    static DEVICE constexpr int shift(int i) { return i % 2 * 4; }
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        out[0] = pair<0>(w[0], both(15), lift);
        out[1] = pair<4>(w[0], both(15), lift);
        out[2] = pair<0>(w[0] >> 8, both(15), lift);
        out[3] = pair<4>(w[0] >> 8, both(15), lift);
    }
};

template <> struct Unit<2>
{
    static const int WORDS = 1, K = 16;
    static DEVICE constexpr int shift(int i) { return i % 4 * 2; }
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        u32 q = w[0];
        #pragma unroll
        for (int i = 0; i < 2; i++, q >>= 8)
        {
            out[4 * i + 0] = pair<0>(q, both(3), lift);
            out[4 * i + 1] = pair<2>(q, both(3), lift);
            out[4 * i + 2] = pair<4>(q, both(3), lift);
            out[4 * i + 3] = pair<6>(q, both(3), lift);
        }
    }
};

template <> struct Unit<3>
{
    static const int WORDS = 3, K = 32;
    static DEVICE constexpr int shift(int i) { return i == 15 ? 0 : i % 5 == 4 ? 6 : i % 5 % 2 * 3; }
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        u32 last = 0;
        #pragma unroll
        for (int i = 0; i < 3; i++)
        {
            u32 q = w[i];
            u32* o = out + 5 * i;
            o[0] = pair<0>(q, both(7), lift);
            o[1] = pair<3>(q, both(7), lift);
            q >>= 6;
            o[2] = pair<0>(q, both(7), lift);
            o[3] = pair<3>(q, both(7), lift);
            o[4] = pair<6>(q, both(7), lift);
            last |= (q >> (9 - i)) & both(1u << i);
        }
        out[15] = last | lift;
    }
};

template <> struct Unit<5>
{
    static const int WORDS = 5, K = 32;
    static DEVICE constexpr int shift(int i) { return i < 15 && i % 3 == 1 ? 5 : 0; }
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        u32 last = 0;
        #pragma unroll
        for (int i = 0; i < 5; i++)
        {
            u32 q = w[i];
            u32* o = out + 3 * i;
            o[0] = pair<0>(q, both(31), lift);
            o[1] = pair<5>(q, both(31), lift);
            q >>= 10;
            o[2] = pair<0>(q, both(31), lift);
            last |= (q >> (5 - i)) & both(1u << i);
        }
        out[15] = last | lift;
    }
};

template <> struct Unit<6>
{
    static const int WORDS = 3, K = 16;
    static DEVICE constexpr int shift(int) { return 0; }
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        #pragma unroll
        for (int i = 0; i < 3; i++)
        {
            out[2 * i] = pair<0>(w[i], both(63), lift);
            out[2 * i + 1] = pair<0>(w[i] >> 6, both(63), lift);
        }
        out[6] = (w[0] >> 12 & both(15)) | (w[2] >> 8 & both(48)) | lift;
        out[7] = (w[1] >> 12 & both(15)) | (w[2] >> 10 & both(48)) | lift;
    }
};

template <> struct Unit<8>
{
    static const int WORDS = 2, K = 8;
    static DEVICE constexpr int shift(int) { return 0; }
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        #pragma unroll
        for (int i = 0; i < 2; i++)
        {
            out[2 * i] = (w[i] & 0xffu) | (w[i] & 0xff00u) << 8 | lift;
            out[2 * i + 1] = (w[i] >> 16 & 0xffu) | (w[i] >> 8 & 0xff0000u) | lift;
        }
    }
};
