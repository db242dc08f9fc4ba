// A single row of x on its way into shared memory: put in order, and normed.

const u32 SCRATCH = 128;                        // bytes that `block_sum` takes

// Put x into shared memory, zeros behind it, in the order of the weight's rows; a thread takes every `threads`-th 16
// bytes. Of a pair either all threads make one row for both, or each half of them its own.
DEVICE void stage_row(const Lane& l, const Matrix& m, bool one_x, u32 first, u32 threads, u32 units)
{
    Words* to = (Words*) l.row;
    float squares = 0.0f;
    for (u32 i = first; i < units; i += threads)
    {
        Words w = {0, 0, 0, 0};
        if (i * 8 < l.k && !m.perm) w = ((const Words*) l.x)[i];
        if (i * 8 < l.k && m.perm)
        {
            const Words from = ((const Words*) m.perm)[i];
            w = Words{gather(l.x, from.x), gather(l.x, from.y), gather(l.x, from.z), gather(l.x, from.w)};
        }
        to[i] = w;
        if (m.norm) squares += square(w.x) + square(w.y) + square(w.z) + square(w.w);
    }
    if (!m.norm) return;
    float sum = block_sum(squares, (float*) shared_memory);
    float factor = rsqrtf(sum / (float) (PAIRED && !one_x ? 2 * l.k : l.k) + m.epsilon);
    for (u32 i = first; i * 8 < l.k; i += threads)
    {
        Words w = to[i], v;
        if (m.perm)
        {
            const Words from = ((const Words*) m.perm)[i];
            v = Words{gather(m.norm, from.x), gather(m.norm, from.y), gather(m.norm, from.z), gather(m.norm, from.w)};
        }
        else v = ((const Words*) m.norm)[i];
        to[i] = Words{scaled(w.x, v.x, factor), scaled(w.y, v.y, factor), scaled(w.z, v.z, factor),
                      scaled(w.w, v.w, factor)};
    }
}
