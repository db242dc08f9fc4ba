// What a warp does with a piece of 16 keys and their values: see attention.cu, which includes this.

const u32 PIECE = 16;
const u32 ROWS = 8 * TILES;
const u32 KEY_UNITS = HEAD_DIM / 32;
const u32 VALUE_WORDS = HEAD_DIM % 64 ? 2 : 4;          // of a lane's dims that are neighbours
const u32 VALUE_UNITS = HEAD_DIM / (16 * VALUE_WORDS);
// Of rows of halves and of sums in shared memory: neighbours begin in other banks.
const u32 HEAD_PITCH = HEAD_DIM % 64 ? HEAD_DIM : HEAD_DIM + 32;
const u32 SUM_PITCH = HEAD_DIM + 8;
// Bytes between a piece's keys, and between its values: lanes that read at once meet in no bank.
const u32 KEY_PITCH = 2 * HEAD_DIM + (HEAD_DIM % 64 ? 0 : 64), VALUE_PITCH = 2 * HEAD_DIM + 16;

struct alignas(16) Four { float v[4]; };
struct alignas(4 * VALUE_WORDS) ValueUnit { u32 words[VALUE_WORDS]; };

// The highest score seen, and the sum of all scores' exponentials over that of the highest.
struct alignas(8) Mark { float peak, mass; };

// A warp's own: a piece, and in its place, at the end, the sums.
union alignas(16) Own
{
    struct { char keys[PIECE][KEY_PITCH], values[PIECE][VALUE_PITCH]; };
    float sums[ROWS][SUM_PITCH];
};

struct alignas(16) Shared
{
    u16 heads[3 * ROWS][HEAD_PITCH];                    // queries, and new keys and values where the share is the last
    Own own[WARPS];
    Mark marks[WARPS][ROWS];
    u32 order;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "what the launch asks for");

struct Lane { u32 lane, g, t; };
typedef float Sums[TILES][VALUE_UNITS][VALUE_WORDS][4];

// Which of the piece a lane's i-th are, and where in a head its units begin.
DEVICE u32 key_of(const Lane& l, u32 i) { return l.g + 8 * i; }
DEVICE u32 value_of(const Lane& l, u32 i) { return 2 * l.t + (i & 1) + 8 * (i >> 1); }
DEVICE u32 key_dim(const Lane& l, u32 unit) { return 32 * unit + 8 * l.t; }
DEVICE u32 value_dim(const Lane& l, u32 unit) { return 2 * VALUE_WORDS * (8 * unit + l.g); }

// Where the i-th of a lane's keys, and of its values, lies.
DEVICE Words& key_at(const Lane& l, Own& own, u32 i, u32 unit) { return *(Words*) (own.keys[key_of(l, i)] + 2 * key_dim(l, unit)); }
DEVICE ValueUnit& value_at(const Lane& l, Own& own, u32 i, u32 unit)
{
    return *(ValueUnit*) (own.values[value_of(l, i)] + 2 * value_dim(l, unit));
}

// Copy a piece's keys or values. Neighbouring lanes copy neighbouring units: the cache is asked for whole lines.
template <u32 PITCH>
DEVICE void copy_rows(const Lane& l, char (&to)[PIECE][PITCH], const u16* from, u32 stride)
{
    const u32 units = HEAD_DIM / 8;
    #pragma unroll
    for (u32 i = 0; i < PIECE * units / 32; i++)
    {
        const u32 row = (32 * i + l.lane) / units, unit = (32 * i + l.lane) % units;
        copy16(to[row] + 16 * unit, from + row * stride + 8 * unit);
    }
}

// Put the new tokens' keys where a piece holds what was in the cache before. Those behind the end are hidden, whatever
// they are.
DEVICE void renew_keys(const Lane& l, Shared& shared, Own& own, u32 piece, u32 length, u32 tokens)
{
    #pragma unroll
    for (u32 i = 0; i < 2; i++)
    {
        u32 at = piece * PIECE + key_of(l, i);
        if (at < length || at - length >= tokens) continue;
        const u16* from = shared.heads[ROWS + at - length];
        #pragma unroll
        for (u32 u = 0; u < KEY_UNITS; u++) key_at(l, own, i, u) = *(const Words*) (from + key_dim(l, u));
    }
}

// The same for values. Behind the end come zeros: what lies there may be no number at all.
DEVICE void renew_values(const Lane& l, Shared& shared, Own& own, u32 piece, u32 length, u32 tokens)
{
    #pragma unroll
    for (u32 i = 0; i < 4; i++)
    {
        u32 at = piece * PIECE + value_of(l, i);
        if (at < length) continue;
        #pragma unroll
        for (u32 u = 0; u < VALUE_UNITS; u++)
        {
            ValueUnit unit = {};
            if (at - length < tokens) unit = *(const ValueUnit*) (shared.heads[2 * ROWS + at - length] + value_dim(l, u));
            value_at(l, own, i, u) = unit;
        }
    }
}

// Dot products: s[n][2 tile + e] of key 8 n + 2 t + e and query 8 tile + g. Even and odd steps are summed apart, so that
// fewer wait for each other.
DEVICE void multiply(const Lane& l, const Shared& shared, Own& own, float (&s)[2][4])
{
    float odd[2][4];
    #pragma unroll
    for (u32 i = 0; i < 8; i++) s[i / 4][i % 4] = odd[i / 4][i % 4] = 0.0f;
    #pragma unroll
    for (u32 u = 0; u < KEY_UNITS; u++)
    {
        const Words low = *(const Words*) (shared.heads[l.g] + key_dim(l, u));
        const Words high = TILES > 1 ? *(const Words*) (shared.heads[8 + l.g] + key_dim(l, u)) : Words{0, 0, 0, 0};
        #pragma unroll
        for (u32 n = 0; n < 2; n++)
        {
            const Words k = key_at(l, own, n, u);
            mma(s[n], low.x, high.x, low.y, high.y, k.x, k.y);
            mma(odd[n], low.z, high.z, low.w, high.w, k.z, k.w);
        }
    }
    #pragma unroll
    for (u32 i = 0; i < 8; i++) s[i / 4][i % 4] += odd[i / 4][i % 4];
}

// One step of the online softmax, for query g of a tile: its scores become weights, `mass` the sum of this lane's. What
// the sums so far are to be multiplied with is returned. Nothing seen yet is a peak of minus infinity, and stays zero.
DEVICE float soften(float& a, float& b, float& c, float& d, Mark& mark, float nothing)
{
    float higher = quad_max(fmaxf(fmaxf(fmaxf(a, b), fmaxf(c, d)), mark.peak));
    float base = higher == nothing ? 0.0f : higher;
    float decay = power_of_two(mark.peak - base);
    a = power_of_two(a - base);
    b = power_of_two(b - base);
    c = power_of_two(c - base);
    d = power_of_two(d - base);
    mark = Mark{higher, mark.mass * decay + (a + b + c + d)};
    return decay;
}

// sums[tile][u][j]: of dims value_dim(u) + 2 j (the first two) and the next one, of queries 2 t and 2 t + 1.
DEVICE void accumulate(const Lane& l, Own& own, const u32 (&weights)[TILES][2], const float (&decay)[TILES],
                       Sums& sums)
{
    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++)
    {
        float first = shuffle(decay[tile], 8 * l.t), second = shuffle(decay[tile], 8 * l.t + 4);
        #pragma unroll
        for (u32 u = 0; u < VALUE_UNITS; u++)
            #pragma unroll
            for (u32 j = 0; j < VALUE_WORDS; j++)
            {
                float (&sum)[4] = sums[tile][u][j];
                sum[0] *= first; sum[1] *= second; sum[2] *= first; sum[3] *= second;
            }
    }
    #pragma unroll
    for (u32 u = 0; u < VALUE_UNITS; u++)
    {
        ValueUnit v[4];
        #pragma unroll
        for (u32 i = 0; i < 4; i++) v[i] = value_at(l, own, i, u);
        #pragma unroll
        for (u32 j = 0; j < VALUE_WORDS; j++)
        {
            const u32 a0 = low_halves(v[0].words[j], v[1].words[j]), a1 = high_halves(v[0].words[j], v[1].words[j]);
            const u32 a2 = low_halves(v[2].words[j], v[3].words[j]), a3 = high_halves(v[2].words[j], v[3].words[j]);
            #pragma unroll
            for (u32 tile = 0; tile < TILES; tile++)
                mma(sums[tile][u][j], a0, a1, a2, a3, weights[tile][0], weights[tile][1]);
        }
    }
}

// Store a warp's sums where the block adds them up.
DEVICE void store_sums(const Lane& l, u32 rows, const Mark (&marks)[TILES], const Sums& sums, Own& own, Mark (&left)[ROWS])
{
    #pragma unroll
    for (u32 tile = 0; tile < TILES; tile++)
    {
        float mass = quad_sum(marks[tile].mass);
        if (l.t == 0) left[8 * tile + l.g] = Mark{marks[tile].peak, mass};
        #pragma unroll
        for (u32 e = 0; e < 2; e++)
        {
            u32 row = 8 * tile + 2 * l.t + e;
            if (row >= rows) continue;
            #pragma unroll
            for (u32 u = 0; u < VALUE_UNITS; u++)
                #pragma unroll
                for (u32 j = 0; j < VALUE_WORDS; j += 2)
                {
                    const float (&low)[4] = sums[tile][u][j], (&high)[4] = sums[tile][u][j + 1];
                    *(Four*) (own.sums[row] + value_dim(l, u) + 2 * j) = Four{low[e], low[2 + e], high[e], high[2 + e]};
                }
        }
    }
}
