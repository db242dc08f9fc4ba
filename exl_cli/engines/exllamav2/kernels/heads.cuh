// The heads of the new tokens, from the projections to shared memory and the cache: see attention.cu, which includes this.

const u32 PAIRS = (HEAD_DIM / 2 + 31) / 32;             // of a head, for each lane of a warp
const u32 HEADS_AT_ONCE = 2;                            // for each warp

struct Attention
{
    Rope rope;
    u16* out;               // rows of all heads, one for each token
    const u16* places;      // where each number of a row goes; or null: in order
    float* parts;           // of each sequence, KV head, share and row: HEAD_DIM sums
    Mark* marks;            // and what they are sums of
    u32* arrived;           // of each sequence and KV head, shares that are done: zero before and after
    float scale;            // of scores, log2(e) times that of the model; where they are capped, 2 / softcap times this
    float softcap;          // log2(e) times the model's, or 0
    u32 groups, window;     // queries see `window` keys; 0 for all
    u32 least;              // pieces that are worth a share
};

// One head of a new token, as a warp prepares it.
struct Head
{
    const u16* from;
    u32 row;                // of the block's heads in shared memory
    u16* cached;            // or null
    bool norms, turns;
    Pair pairs[PAIRS];
};

struct Block
{
    Rope rope;              // with what was known when this was compiled
    u32 kv_head, sequence, rows, length;
    u32 inverse;            // 256 / groups, rounded up
    u32 heads;              // to prepare: queries, and where the share is the last, the new keys and values
};

// The token that a row of queries belongs to: row / groups, for the up to 16 rows that there are.
DEVICE u32 token_of(const Block& b, u32 row) { return row * b.inverse >> 8; }

// The block's i-th head, but for its numbers: queries come first, then keys, then values.
DEVICE Head head_of(const Attention& p, const Block& b, u32 lane, u32 i)
{
    const Rope& r = b.rope;
    Head h = {};
    u32 token = token_of(b, i), head = b.kv_head * p.groups + i - token * p.groups;
    if (i < b.rows)
    {
        h.row = i;
        h.turns = true;
    }
    else
    {
        h.turns = i < b.rows + r.tokens;
        token = i - b.rows - (h.turns ? 0 : r.tokens);
        head = r.heads + b.kv_head + (h.turns ? 0 : r.kv_heads);
        h.row = (h.turns ? ROWS : 2 * ROWS) + token;
        u32 position = b.length + token;
        h.cached = (h.turns ? r.keys : r.values) + place_in(r, page_of(r, b.sequence, position), position, b.kv_head);
    }
    h.from = r.qkv + (u64) (b.sequence * r.tokens + token) * r.stride + head * HEAD_DIM;
    const u16* weight = i < b.rows ? r.q_weight : h.turns ? r.k_weight : 0;
    h.norms = weight != 0;
    if (weight) weight += (i < b.rows ? head : b.kv_head) * HEAD_DIM;
    const u32 rotation = rope_row(r, b.sequence, b.length + token);
    #pragma unroll
    for (u32 j = 0; j < PAIRS; j++)
        if (lane + 32 * j < HEAD_DIM / 2) h.pairs[j] = pair_of(r, lane + 32 * j, rotation, weight);
    return h;
}

DEVICE void prepare(const Block& b, Head& h, Shared& shared, u32 lane)
{
    float squares = 0.0f;
    #pragma unroll
    for (u32 j = 0; j < PAIRS; j++) squares += square(h.pairs[j]);
    float factor = h.norms ? norm_factor(b.rope, warp_sum(squares)) : 1.0f;
    #pragma unroll
    for (u32 j = 0; j < PAIRS; j++)
    {
        if (lane + 32 * j >= HEAD_DIM / 2) continue;
        Pair& pair = h.pairs[j];
        if (h.norms) scale(pair, factor);
        if (h.turns) turn(pair);
        put(pair, shared.heads[h.row]);
        if (h.cached) put(pair, h.cached);
    }
}

// What a warp prepares at a time. All but their numbers can be read early: see `attend`.
DEVICE void begin(const Attention& p, const Block& b, u32 lane, u32 from, Head (&mine)[HEADS_AT_ONCE])
{
    #pragma unroll
    for (u32 i = 0; i < HEADS_AT_ONCE; i++)
        if (from + i * WARPS < b.heads) mine[i] = head_of(p, b, lane, from + i * WARPS);
}

DEVICE void finish(const Block& b, u32 lane, u32 from, Head (&mine)[HEADS_AT_ONCE], Shared& shared)
{
    #pragma unroll
    for (u32 i = 0; i < HEADS_AT_ONCE; i++)
        #pragma unroll
        for (u32 j = 0; j < PAIRS; j++)
            if (from + i * WARPS < b.heads && lane + 32 * j < HEAD_DIM / 2) fetch(mine[i].pairs[j], mine[i].from);
    #pragma unroll
    for (u32 i = 0; i < HEADS_AT_ONCE; i++)
        if (from + i * WARPS < b.heads) prepare(b, mine[i], shared, lane);
}
