// From packed weights to pairs of half precision numbers, in the order in which exllamav2 leaves them after loading:
// it reorders the bits of each 32-row block in place, so that two neighbouring weights lie 16 bits apart (its
// `quant/qdq_*.cuh`, version 0.3.2). A number q below 1024 in the low bits of the half 0x6400 reads as 1024 + q; higher
// up it reads as 1024 + q 2^shift, and a multiplication brings it down. All of this is exact.

DEVICE constexpr u32 both(u32 half) { return half | half << 16; }

// Halves, by their bits: -(1024 / 2^shift) - zero, and 2^-shift.
template <int SHIFT> struct Lift;
template <> struct Lift<2> { static const u32 down = 0x3400; };
template <> struct Lift<3> { static const u32 down = 0x3000; };
template <> struct Lift<4> { static const u32 down = 0x2c00; };
template <> struct Lift<5> { static const u32 down = 0x2800; };
template <> struct Lift<6> { static const u32 down = 0x2400; };

// `lift` is 0x64006400, from `in_register`: an instruction holds one constant, and of two in an expression the compiler
// loads one anew each time.
DEVICE u32 low(u32 q, u32 mask, u32 lift, u32 minus) { return h2_add((q & mask) | lift, minus); }
template <int SHIFT> DEVICE u32 high(u32 q, u32 mask, u32 lift, u32 minus)
{
    return h2_fma((q & mask) | lift, both(Lift<SHIFT>::down), minus);
}

// Unit<BITS>: WORDS consecutive words of a column hold K consecutive rows; `unpack` gives K / 2 pairs.
template <int BITS> struct Unit;

template <> struct Unit<4>
{
    static const int WORDS = 1, K = 8;
    // `minus` and `minus16`: the halves -1024 - zero and -64 - zero.
    static DEVICE void unpack(const u32* w, u32* out, u32 lift, u32 minus, u32 minus16)
    {
        u32 q = w[0];
        out[0] = low(q, 0x000f000f, lift, minus);
        out[1] = high<4>(q, 0x00f000f0, lift, minus16);
        q >>= 8;
        out[2] = low(q, 0x000f000f, lift, minus);
        out[3] = high<4>(q, 0x00f000f0, lift, minus16);
    }
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        unpack(w, out, lift, both(0xe408), both(0xd480));
    }
};

template <> struct Unit<2>
{
    static const int WORDS = 1, K = 16;
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        u32 q = w[0];
        #pragma unroll
        for (int i = 0; i < 2; i++, q >>= 8)
        {
            out[4 * i + 0] = low(q, 0x00030003, lift, both(0xe402));
            out[4 * i + 1] = high<2>(q, 0x000c000c, lift, both(0xdc08));
            out[4 * i + 2] = high<4>(q, 0x00300030, lift, both(0xd420));
            out[4 * i + 3] = high<6>(q, 0x00c000c0, lift, both(0xcc80));
        }
    }
};

template <> struct Unit<3>
{
    static const int WORDS = 3, K = 32;
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        u32 last = 0;
        #pragma unroll
        for (int i = 0; i < 3; i++)
        {
            u32 q = w[i];
            u32* o = out + 5 * i;
            o[0] = low(q, 0x00070007, lift, both(0xe404));
            o[1] = high<3>(q, 0x00380038, lift, both(0xd820));
            q >>= 6;
            o[2] = low(q, 0x00070007, lift, both(0xe404));
            o[3] = high<3>(q, 0x00380038, lift, both(0xd820));
            o[4] = high<6>(q, 0x01c001c0, lift, both(0xcd00));
            last |= (q >> (9 - i)) & both(1u << i);
        }
        out[15] = h2_add(last | lift, both(0xe404));
    }
};

template <> struct Unit<5>
{
    static const int WORDS = 5, K = 32;
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        u32 last = 0;
        #pragma unroll
        for (int i = 0; i < 5; i++)
        {
            u32 q = w[i];
            u32* o = out + 3 * i;
            o[0] = low(q, 0x001f001f, lift, both(0xe410));
            o[1] = high<5>(q, 0x03e003e0, lift, both(0xd200));
            q >>= 10;
            o[2] = low(q, 0x001f001f, lift, both(0xe410));
            last |= (q >> (5 - i)) & both(1u << i);
        }
        out[15] = h2_add(last | lift, both(0xe410));
    }
};

template <> struct Unit<6>
{
    static const int WORDS = 3, K = 16;
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        const u32 minus = both(0xe420);
        #pragma unroll
        for (int i = 0; i < 3; i++)
        {
            out[2 * i] = low(w[i], 0x003f003f, lift, minus);
            out[2 * i + 1] = low(w[i] >> 6, 0x003f003f, lift, minus);
        }
        out[6] = h2_add((w[0] >> 12 & 0x000f000fu) | (w[2] >> 8 & 0x00300030u) | lift, minus);
        out[7] = h2_add((w[1] >> 12 & 0x000f000fu) | (w[2] >> 10 & 0x00300030u) | lift, minus);
    }
};

template <> struct Unit<8>
{
    static const int WORDS = 2, K = 8;
    static DEVICE void unpack(const u32* w, u32* out, u32 lift)
    {
        const u32 minus = both(0xe480);
        #pragma unroll
        for (int i = 0; i < 2; i++)
        {
            out[2 * i] = h2_add((w[i] & 0xffu) | (w[i] & 0xff00u) << 8 | lift, minus);
            out[2 * i + 1] = h2_add((w[i] >> 16 & 0xffu) | (w[i] >> 8 & 0xff0000u) | lift, minus);
        }
    }
};
