// Samples the next token from a row of logits, as `engines/sampling` defines it. Several blocks share a row's columns
// (`row_team.cuh`).
//
// Let q be how far a token's log-weight is below the highest one. Every filter keeps an interval of q: all are monotone in
// the logit, except typical sampling, which keeps those around one value. So nothing needs to be sorted. The end of an
// interval is found in two passes over the row, each of which adds up weights in 2,048 bins of equal width in shared
// memory. There, weights are integers, so their sums do not depend on the order of the threads.
//
// The draw is an exponential race: the candidate with the smallest E / p wins, where E is exponential noise, a function of
// seed, position and token (see `noise`). Each token wins with probability p, and small changes of p rarely change the
// winner.

#include "device.cuh"
#include "row_team.cuh"

const float RULED_OUT = -1e30f;         // the logit of a banned token; below a tenth of it, every token is banned
const float NEGLIGIBLE = 1e-8f;         // typical sampling and mirostat drop tokens below this probability
const float WHOLE = 2147483648.0f;      // probability 1 as an integer weight
const float FAR = 32.0f;                // bins end at q = 32: weights below e^-32 share the last one
const float MOST_PENALTY = 1e30f;

const int FAILED = -1;                  // instead of a token: no candidate, or a logit is NaN or infinite

const u32 GREEDY = 1, LAST = 2, MIROSTAT = 4, FADING = 8;

struct Row
{
    const int* history;         // the tokens so far
    int* next;                  // also receives the chosen token; or null
    const u32* mask;            // a bit per token: whether it may be chosen; or null
    const u32* breakers;        // a bit per token: whether DRY does not match across it
    const u32* is_protected;    // a bit per token: whether XTC must not exclude it
    const int* edited;          // tokens with a bias
    const float* biases;        // minus infinity bans a token
    u64 seed;
    u32 logits;                 // index of the row of logits
    u32 length;                 // of the history
    u32 edits, flags, top_k;
    u32 repetition_range, repetition_decay;
    u32 dry_allowed_length, dry_range, dry_max_ngram;
    u32 top_logprobs;           // number of top log-probabilities plus 1; 0 for no log-probabilities at all
    float temperature, smoothing, top_p, top_a, min_p, typical, min_temp, max_temp, temp_exponent;
    float repetition, presence, frequency, dry_multiplier, dry_base;
    float xtc_probability, xtc_threshold;
    float bits;                 // mirostat's mu
};

const u32 MOST_TOP = 64;

struct Chosen
{
    int token;
    float prob;                 // its probability in the distribution it was drawn from
    float total;                // log of the sum of exponentials of the model's logits
    float logit;                // the model's logit of the token
    u32 top;                    // top tokens, ties with the last included; may exceed MOST_TOP, then the rest is missing
    u32 padding[3];
    int ids[MOST_TOP];
    float logits[MOST_TOP];
};

struct Sample
{
    const float* logits;
    const Row* rows;            // in host memory, like what they point to as edits
    Chosen* chosen;             // in host memory
    Meeting* meetings;          // by row
    float* scratch;             // two times `vocab` words per row: see `adjust`
    u32 columns;                // logits per row, padding included
    u32 vocab;                  // logits that belong to a token
};

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
struct Four { u32 word[4]; };
DEVICE Four philox(u32 block, u32 position, u64 seed)
{
    u32 c0 = block, c1 = position, c2 = 0, c3 = 0, k0 = (u32) seed, k1 = (u32) (seed >> 32);
    #pragma unroll
    for (int round = 0; round < 10; round++)
    {
        u64 a = (u64) 0xd2511f53u * c0, b = (u64) 0xcd9e8d57u * c2;
        c0 = (u32) (b >> 32) ^ c1 ^ k0;
        c1 = (u32) b;
        c2 = (u32) (a >> 32) ^ c3 ^ k1;
        c3 = (u32) a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return Four{{c0, c1, c2, c3}};
}
DEVICE float exponential(u32 word)
{
    return -log1pf(-fminf(((float) word + 0.5f) * 0x1p-32f, 0x1.fffffep-1f));
}

// The next larger float, for f >= 0: turns "q <= f" into "q < above(f)".
DEVICE float above(float f) { return f > 0.0f ? bits_float(float_bits(f) + 1) : 0x1p-126f; }

DEVICE bool bit(const u32* bits, u32 i) { return bits[i / 32] >> i % 32 & 1; }

// A thread's candidates, once no thread has more than FEW: later passes read them instead of the row.
const u32 FEW = 4;
struct Few
{
    u32 count;
    u32 ids[FEW];
    float scores[FEW];
};

DEVICE bool has_penalties(const Row& r) { return r.repetition != 1.0f || r.presence != 0.0f || r.frequency != 0.0f; }

// How strongly a token at this distance from the end of the history is penalized: fully within the range, then falling
// linearly to 0 over `repetition_decay` tokens.
DEVICE float strength(const Row& r, u32 distance)
{
    u32 beyond = distance > r.repetition_range ? distance - r.repetition_range : 0;
    return 1.0f - (beyond ? (float) beyond / (float) r.repetition_decay : 0.0f);
}
DEVICE float penalized(const Row& r, float logit, float strength)
{
    float factor = 1.0f + (r.repetition - 1.0f) * strength;
    return (logit > 0.0f ? logit / factor : logit * factor) - r.presence * strength;
}

// How many tokens up to `end` equal those at the end of the history, for DRY; breakers, and `first`, end the match.
DEVICE u32 repeated(const Row& r, u32 vocab, u32 first, u32 end)
{
    u32 length = 0, last = r.length - 1;
    while (length < r.dry_max_ngram && length <= last)
    {
        u32 token = (u32) r.history[last - length];
        if (token >= vocab || bit(r.breakers, token)) break;
        if (end < first + length || (u32) r.history[end - length] != token) break;
        length++;
    }
    return length;
}

// Writes the logits to scratch memory, with penalties, mask, biases and DRY applied. See `filters.penalize` and `dry`.
DEVICE void adjust(const Sample& p, const Row& r, const float* logits, float* scores, Team& t)
{
    const u32 thread = thread_of_row(), threads = gridDim.x * blockDim.x;
    // By token: 1 + the position of its last occurrence, 0 for none, in the words that receive its score later; and the sum
    // of the strengths of its occurrences, in fixed point, for the frequency penalty.
    u32* nearest = (u32*) scores;
    u32* often = nearest + p.vocab;
    bool penalties = has_penalties(r);
    u32 reach = r.repetition_range + r.repetition_decay;
    if (reach < r.repetition_range) reach = 0xffffffffu;
    u32 begin = r.length > reach ? r.length - reach : 0;
    if (penalties)
    {
        for (u32 i = thread; i < p.vocab; i += threads)
        {
            nearest[i] = 0;
            if (r.flags & FADING) often[i] = 0;
        }
        meet(t);
        for (u32 at = begin + thread; at < r.length; at += threads)
        {
            u32 token = (u32) r.history[at];
            if (token >= p.vocab) continue;
            max_global(&nearest[token], at + 1);
            if (r.flags & FADING) add_global(&often[token], (u32) (strength(r, r.length - 1 - at) * 65536.0f + 0.5f));
        }
        meet(t);
    }
    each(p.vocab, logits, [&](u32 i, float score)
    {
        u32 last = penalties ? nearest[i] : 0;
        if (last)
        {
            score = penalized(r, score, strength(r, r.length - last));
            if (r.flags & FADING) score -= r.frequency * ((float) often[i] / 65536.0f);
        }
        scores[i] = r.mask && !bit(r.mask, i) ? RULED_OUT : score;
    });
    if (r.edits) meet(t);
    for (u32 i = thread; i < r.edits; i += threads)
        if ((u32) r.edited[i] < p.vocab) scores[r.edited[i]] = fmaxf(scores[r.edited[i]] + r.biases[i], RULED_OUT);
    // DRY: find the longest repetition of the history's end, and penalize each token that followed one of that length.
    if (r.dry_multiplier > 0.0f && r.length > 1)
    {
        u32 first = r.dry_range && r.length - 1 > r.dry_range ? r.length - 1 - r.dry_range : 0;
        u64 longest = 0;
        for (u32 end = first + thread; end < r.length - 1; end += threads)
        {
            u32 length = repeated(r, p.vocab, first, end);
            longest = length > longest ? length : longest;
        }
        longest = maximum(longest, t);
        if (longest && longest >= r.dry_allowed_length)
        {
            float factor = r.dry_multiplier * powf(r.dry_base, (float) (longest - r.dry_allowed_length));
            for (u32 end = first + thread; end < r.length - 1; end += threads)
            {
                u32 token = (u32) r.history[end + 1];
                if (repeated(r, p.vocab, first, end) != longest) continue;
                if (token < p.vocab && !bit(r.breakers, token)) add_global(&scores[token], -fminf(factor, MOST_PENALTY));
            }
        }
    }
    if (r.edits || r.dry_multiplier > 0.0f) meet(t);
}

// Reports log-probabilities of the model's own logits, before any setting is applied. The normalizer includes padding
// columns, the top tokens do not. `first`: the highest logit of a token.
DEVICE void report(const Sample& p, const Row& r, const float* logits, float first, Chosen& out, Team& t)
{
    u64 best = ordered(first);
    each(p.columns - p.vocab, logits + p.vocab, [&](u32, float logit)
    {
        u64 v = ordered(logit);
        best = v > best ? v : best;
    });
    float highest = unordered((u32) maximum(best, t)), sum = 0.0f;
    each(p.columns, logits, [&](u32, float logit) { sum += expf(logit - highest); });
    sum = total(sum, t);
    float limit = 0.0f;
    u32 wanted = r.top_logprobs - 1;
    if (wanted)
    {
        auto distance = [&](float logit) { return first - logit; };
        auto row = [&](const auto& f) { each(p.vocab, logits, f); };
        limit = bound(row, distance, [](float) { return 1u; }, wanted, FAR, t);
        each(p.vocab, logits, [&](u32 i, float logit)
        {
            if (first - logit >= limit) return;
            u32 place = arrive(&t.m.listed);
            if (place >= MOST_TOP) return;
            out.ids[place] = i;
            out.logits[place] = logit;
        });
        meet(t);
    }
    if (thread_of_row() == 0)
    {
        out.total = highest + logf(sum);
        out.top = wanted ? *(volatile u32*) &t.m.listed : 0;
    }
}

DEVICE void finish(const Row& r, const float* logits, Chosen& out, int token, float prob, Team& t)
{
    leave(t);
    if (thread_of_row()) return;
    out.token = token;
    out.prob = prob;
    if (token < 0) return;
    out.logit = logits[token];
    if (r.next) *r.next = token;
}

struct Shared
{
    Row row;
    Scratch scratch;
};

extern "C" __global__ void __launch_bounds__(1024) sample(const Sample p)
{
    Shared& s = *(Shared*) shared_memory;
    const volatile u32* settings = (const volatile u32*) &p.rows[blockIdx.y];
    for (u32 i = threadIdx.x; i < sizeof(Row) / 4; i += blockDim.x) ((u32*) &s.row)[i] = settings[i];
    __syncthreads();
    wait_for_inputs();
    Team t = {s.scratch, p.meetings[blockIdx.y], 0, 0};
    for (u32 i = thread_of_row(); i < BINS; i += gridDim.x * blockDim.x) t.m.bins[0][i] = 0;
    const Row& r = s.row;
    const u32 n = p.vocab;
    const float* logits = p.logits + (u64) r.logits * p.columns;
    Chosen& out = p.chosen[blockIdx.y];

    // The highest score with its token, and the lowest of a token that is not ruled out.
    u64 best = 0;
    float lowest = INFINITY;
    auto rank = [&](u32 i, float score)
    {
        u64 v = (u64) ordered(score) << 32 | (0xffffffffu - i);     // ties go to the first token
        best = v > best ? v : best;
        if (score > 0.1f * RULED_OUT) lowest = fminf(lowest, score);
    };
    const u64 BAD = 0xffffffffffffffffull;
    each(n, logits, [&](u32 i, float logit)
    {
        if (fabsf(logit) < INFINITY) rank(i, logit);
        else best = BAD;
    });
    best = maximum(best, t);
    if (best == BAD) return finish(r, logits, out, FAILED, 0.0f, t);
    if (r.top_logprobs) report(p, r, logits, unordered((u32) (best >> 32)), out, t);
    else if (thread_of_row() == 0) out.top = 0;

    const float* scores = logits;
    if (has_penalties(r) || r.mask || r.edits || r.dry_multiplier > 0.0f)
    {
        float* adjusted = p.scratch + (u64) blockIdx.y * 2 * p.vocab;
        adjust(p, r, logits, adjusted, t);
        scores = adjusted;
        best = 0;
        lowest = INFINITY;
        each(n, scores, rank);
        best = maximum(best, t);
    }
    const float highest = unordered((u32) (best >> 32));
    if (highest < 0.1f * RULED_OUT) return finish(r, logits, out, FAILED, 0.0f, t);
    if (r.flags & GREEDY) return finish(r, logits, out, (int) (0xffffffffu - (u32) best), 1.0f, t);

    // Candidates have nearest <= q < limit, and the probability exp(-(q - nearest) * steepness) / sum. Each filter below
    // narrows the interval, and `renew` recomputes the sum. Quadratic sampling ("smoothing") makes q quadratic in the
    // distance of the logits. `shortest` is top-k's bound on that distance.
    const float temperature = r.flags & LAST ? 1.0f : r.temperature;
    const float linear = r.smoothing > 0.0f ? 0.0f : 1.0f / temperature, squared = r.smoothing / temperature;
    float nearest = 0.0f, limit = INFINITY, steepness = 1.0f, sum = 1.0f, shortest = -INFINITY;
    u32 kept = n;
    Few own = {};
    bool few = false;
    auto pass = [&](const auto& f)
    {
        if (!few) return each(n, scores, f);
        for (u32 j = 0; j < own.count; j++) f(own.ids[j], own.scores[j]);
    };
    auto distance = [&](float score) { return highest - score; };
    auto q = [&](float score)
    {
        float d = highest - score;
        if (!(d < shortest) && shortest > 0.0f) return -1.0f;
        float v = squared > 0.0f ? d * d * squared : d * linear;
        return v >= nearest && v < limit ? v : -1.0f;
    };
    auto weight = [&](float v) { return expf(-(v - nearest) * steepness); };
    auto renew = [&]()
    {
        float weights = 0.0f;
        u32 number = 0;
        pass([&](u32 i, float score)
        {
            float v = q(score);
            if (v < 0.0f) return;
            weights += weight(v);
            if (number < FEW)
            {
                own.ids[number] = i;
                own.scores[number] = score;
            }
            number++;
        });
        own.count = number;
        Tally all = tally(weights, number + ((u64) (number > FEW) << 32), t);
        sum = all.weight;
        few = few || !(all.number >> 32);
        kept = (u32) all.number;
    };
    auto whole_of = [&](float score) { return (u32) (weight(q(score)) / sum * WHOLE + 0.5f); };

    if (0 < r.top_k && r.top_k < n)
    {
        // A little more than the farthest candidate, so that the last bin, where `bound` gives up, stays empty.
        float range = 1.001f * (highest + unordered((u32) maximum(ordered(-lowest), t)));
        shortest = range > 0.0f ? bound(pass, distance, [](float) { return 1u; }, r.top_k, range, t) : INFINITY;
    }
    renew();
    if (0.0f < r.top_p && r.top_p < 1.0f)
    {
        limit = bound(pass, q, whole_of, (u32) (r.top_p * WHOLE), FAR, t);
        renew();
    }
    // Top-a: p >= a * p_max^2. With p = e^-q / sum and p_max = 1 / sum that is q <= -log(a / sum). Likewise min-p below.
    if (r.top_a > 0.0f)
    {
        limit = fminf(limit, above(-logf(fminf(r.top_a / sum, 1.0f))));
        renew();
    }
    if (r.min_p > 0.0f)
    {
        limit = fminf(limit, above(-logf(r.min_p)));
        renew();
    }
    // Typical sampling: surprise is q + log(sum) and the entropy is its mean, so surprise minus entropy is q - mean(q).
    // Keep the candidates of the smallest |q - mean|.
    if (0.0f < r.typical && r.typical < 1.0f)
    {
        limit = fminf(limit, -logf(NEGLIGIBLE * sum));
        float mine = 0.0f;
        pass([&](u32, float score)
        {
            float v = q(score);
            if (v >= 0.0f) mine += weight(v) / sum * v;
        });
        float mean = total(mine, t);
        auto deviation = [&](float score)
        {
            float v = q(score);
            return v < 0.0f ? -1.0f : fabsf(v - mean);
        };
        float widest = bound(pass, deviation, whole_of, (u32) (r.typical * WHOLE), FAR, t);
        float low = fmaxf(mean - widest, 0.0f);
        limit = fminf(limit, mean + widest);
        u64 first = 0;      // the smallest q that is left, as a maximum of complements; it becomes `nearest`
        pass([&](u32, float score)
        {
            float v = q(score);
            if (v < 0.0f || fabsf(v - mean) >= widest) return;
            u64 back = 0xffffffffu - ordered(v);
            first = back > first ? back : first;
        });
        first = maximum(first, t);
        if (!first) return finish(r, logits, out, FAILED, 0.0f, t);
        nearest = fmaxf(low, unordered(0xffffffffu - (u32) first));
        renew();
    }
    // Mirostat: surprise q - nearest + log(sum) of at most `bits`, in nats; the most likely token always stays.
    if (r.flags & MIROSTAT)
    {
        float most = fminf(r.bits * 0.69314718f, -logf(NEGLIGIBLE)) - logf(sum);
        limit = fminf(limit, fmaxf(above(nearest + most), above(nearest)));
        renew();
    }
    // Dynamic temperature: min + (max - min) * (entropy / its maximum for as many candidates) ^ exponent.
    if (r.max_temp > r.min_temp)
    {
        renew();
        if (kept > 1)
        {
            float mine = 0.0f;
            pass([&](u32, float score)
            {
                float v = q(score), w = v < 0.0f ? 0.0f : weight(v) / sum;
                if (w > 0.0f) mine -= w * logf(w);
            });
            float share = fmaxf(total(mine, t), 0.0f) / logf((float) kept);
            float at = r.min_temp + (r.max_temp - r.min_temp) * powf(share, r.temp_exponent);
            steepness = 1.0f / fmaxf(at, 1e-9f);
            renew();
        }
    }
    else if (r.flags & LAST)
    {
        steepness = 1.0f / fmaxf(r.temperature, 1e-9f);
        renew();
    }
    // XTC: with some probability, exclude all top choices but the least likely. Instead of flipping a coin, mix the
    // distributions of both outcomes: an excluded token keeps the factor 1 - probability, the others gain what it loses.
    // `spared` is the top choice that stays; 0xfffffffe and above where XTC is off or has fewer than two top choices.
    float excluded = 1.0f, others = 1.0f;
    u32 spared = 0xffffffffu;
    auto is_top = [&](u32 i, float v)
    {
        float w = weight(v) / sum;
        return w >= r.xtc_threshold && w > 0.0f && !bit(r.is_protected, i);
    };
    if (r.xtc_probability > 0.0f)
    {
        u64 least = 0;
        u32 number = 0;
        float mine = 0.0f;
        pass([&](u32 i, float score)
        {
            float v = q(score);
            if (v < 0.0f || !is_top(i, v)) return;
            u64 back = (u64) ordered(v) << 32 | i;
            least = back > least ? back : least;
            mine += weight(v) / sum;
            number++;
        });
        least = maximum(least, t);
        Tally top = tally(mine, number, t);
        if (top.number > 1)
        {
            spared = (u32) least;
            float v = q(scores[spared]);
            float rest = 1.0f - top.weight + weight(v) / sum;
            excluded = 1.0f - r.xtc_probability;
            others = excluded + r.xtc_probability / rest;
        }
        else spared = 0xfffffffeu;
    }
    auto prob = [&](u32 i, float v)
    {
        float w = weight(v) / sum;
        if (spared >= 0xfffffffeu) return w;
        return w * (i != spared && is_top(i, v) ? excluded : others);
    };
    // The race. One Philox block is the noise of four consecutive tokens. The largest p / E wins, ties go to the first token.
    u64 winner = 0;
    auto enter = [&](u32 i, float v, u32 noise)
    {
        float share = prob(i, v);
        if (!(share > 0.0f)) return;
        u64 back = (u64) ordered(share / exponential(noise)) << 32 | (0xffffffffu - i);
        winner = back > winner ? back : winner;
    };
    if (few)
    {
        pass([&](u32 i, float score)
        {
            float v = q(score);
            if (v >= 0.0f) enter(i, v, philox(i / 4, r.length, r.seed).word[i % 4]);
        });
    }
    const Span mine = few ? Span{0, 0} : share(n);
    for (u32 block = mine.begin / 4 + threadIdx.x; block * 4 < mine.end; block += blockDim.x)
    {
        float v[4];
        bool any = false;
        #pragma unroll
        for (u32 j = 0; j < 4; j++)
        {
            v[j] = block * 4 + j < mine.end ? q(scores[block * 4 + j]) : -1.0f;
            any |= v[j] >= 0.0f;
        }
        if (!any) continue;
        Four noise = philox(block, r.length, r.seed);
        #pragma unroll
        for (u32 j = 0; j < 4; j++)
            if (v[j] >= 0.0f) enter(block * 4 + j, v[j], noise.word[j]);
    }
    winner = maximum(winner, t);
    if (!winner) return finish(r, logits, out, FAILED, 0.0f, t);
    u32 token = 0xffffffffu - (u32) winner;
    finish(r, logits, out, (int) token, prob(token, q(scores[token])), t);
}
