// Head norm and rotary embedding (Su et al. 2021, arXiv 2104.09864; halves paired as in GPT-NeoX), and where the keys and
// values lie that come of it.

struct Rope
{
    u16* qkv;               // row r at qkv + r stride: heads of q, then kv_heads of k, then of v
    const u16* sine;        // rows of `turned` numbers, the second half of each like the first
    const u16* cosine;
    const int* lengths;     // positions in the cache before these, of each sequence
    const int* table;       // pages of each sequence, table_stride apart
    u16* keys;              // pages of page_size positions of kv_heads heads
    u16* values;
    const int* rope_offsets;    // rows of sine and cosine by which each sequence's lie further; or null
    const u16* q_weight;    // of a norm of each head, rows of head_dim; or null
    const u16* k_weight;
    float epsilon;
    u32 heads, kv_heads, head_dim, turned, tokens, stride, table_stride, page_size;
    u32 rows;               // of `rotate_many`
};

// Two numbers of a head that one thread takes.
struct Pair
{
    u32 first, second;              // their places
    float a, b;
    float a_weight, b_weight;       // of the norm
    float sine, cosine;
};

// The row of sine and cosine for a position of a sequence.
DEVICE u32 rope_row(const Rope& p, u32 sequence, u32 position)
{
    return p.rope_offsets ? position + (u32) p.rope_offsets[sequence] : position;
}

// The i-th of a head's head_dim / 2 pairs, but for its numbers: those that turn together, by a row of sine and cosine,
// and behind what turns any two.
DEVICE Pair pair_of(const Rope& p, u32 i, u32 row, const u16* weight)
{
    u32 pairs = p.turned / 2;
    bool turns = i < pairs;
    Pair pair;
    pair.first = turns ? i : i + pairs;
    pair.second = turns ? i + pairs : i + p.head_dim / 2;
    u64 angle = (u64) row * p.turned + i;
    pair.sine = turns ? to_float(p.sine[angle]) : 0.0f;
    pair.cosine = turns ? to_float(p.cosine[angle]) : 1.0f;
    pair.a_weight = weight ? to_float(weight[pair.first]) : 1.0f;
    pair.b_weight = weight ? to_float(weight[pair.second]) : 1.0f;
    pair.a = pair.b = 0.0f;
    return pair;
}

DEVICE void fetch(Pair& pair, const u16* head)
{
    u32 halves = saturate(head[pair.first] | (u32) head[pair.second] << 16);
    pair.a = to_float((u16) halves);
    pair.b = to_float((u16) (halves >> 16));
}

DEVICE float square(const Pair& pair) { return pair.a * pair.a + pair.b * pair.b; }

DEVICE float norm_factor(const Rope& p, float squares) { return rsqrtf(squares / (float) p.head_dim + p.epsilon); }

DEVICE void scale(Pair& pair, float factor)
{
    pair.a *= factor * pair.a_weight;
    pair.b *= factor * pair.b_weight;
}

DEVICE void turn(Pair& pair)
{
    float a = pair.a;
    pair.a = a * pair.cosine - pair.b * pair.sine;
    pair.b = pair.b * pair.cosine + a * pair.sine;
}

DEVICE void put(const Pair& pair, u16* head)
{
    head[pair.first] = to_half(pair.a);
    head[pair.second] = to_half(pair.b);
}

DEVICE u32 page_of(const Rope& p, u32 sequence, u32 position)
{
    return p.table[(u64) sequence * p.table_stride + position / p.page_size];
}

// Where the numbers of a KV head at a position begin, in `keys` and `values`.
DEVICE u64 place_in(const Rope& p, u32 page, u32 position, u32 kv_head)
{
    return (((u64) page * p.page_size + position % p.page_size) * p.kv_heads + kv_head) * p.head_dim;
}
