// A single row of x on its way into shared memory: normed, and put in the order of the weight's rows.

const u32 SCRATCH = 128;                        // bytes that `block_sum` takes
const u32 AT_ONCE = 2;                          // loads of a thread that wait for memory together

// Where the 16 bytes at `unit` of a row lie: the lanes t = 0 to 3 read units 4 t + i at once, from different banks.
DEVICE u32 row_place(u32 unit) { return (unit & ~15u) | (unit & 3) << 2 | (unit >> 2 & 3); }

// Have norm and order, which do not depend on the kernel before, brought nearer while that one is still running.
DEVICE void prefetch_row(const Matrix& m, u32 thread)
{
    if (thread * 64 >= m.k) return;
    if (m.norm) prefetch(m.norm + thread * 64);
    if (m.perm) prefetch(m.perm + thread * 64);
}

// Make one row for the matrix: `to`, through `raw` where it or another made from the same x is reordered. All threads
// read x; the row is made by `threads` of them, of which this one is number `first`; zeros come behind its end.
DEVICE void stage_row(const Matrix& m, Words* to, Words* raw, u32 first, u32 threads, u32 units)
{
    float squares = 0.0f;
    for (u32 from = threadIdx.x; from < units; from += AT_ONCE * WARPS * 32)
    {
        Words w[AT_ONCE];
        #pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++)
        {
            u32 i = from + j * WARPS * 32;
            w[j] = i * 8 < m.k ? ((const Words*) m.x)[i] : Words{0, 0, 0, 0};
        }
        #pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++)
        {
            u32 i = from + j * WARPS * 32;
            if (m.norm) w[j] = saturate(w[j]);
            if (i < units) (raw ? raw[i] : to[row_place(i)]) = w[j];
            if (m.norm) squares += square(w[j].x) + square(w[j].y) + square(w[j].z) + square(w[j].w);
        }
    }
    if (!m.norm && !raw) return;
    float factor = rsqrtf(block_sum(squares, (float*) shared_memory) / (float) m.k + m.epsilon);
    for (u32 from = first; from < units; from += AT_ONCE * threads)
    {
        Words v[AT_ONCE], places[AT_ONCE];
        #pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++)
        {
            u32 i = from + j * threads;
            if (m.norm && i * 8 < m.k) v[j] = ((const Words*) m.norm)[i];
            if (m.perm && i * 8 < m.k) places[j] = ((const Words*) m.perm)[i];
        }
        #pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++)
        {
            u32 i = from + j * threads;
            if (i >= units) break;
            Words w = {0, 0, 0, 0}, p = places[j];
            if (i * 8 < m.k && m.perm)
                w = Words{gather((const u16*) raw, p.x), gather((const u16*) raw, p.y), gather((const u16*) raw, p.z),
                          gather((const u16*) raw, p.w)};
            else w = raw ? raw[i] : to[row_place(i)];
            if (i * 8 < m.k && m.norm)
                w = Words{scaled(w.x, v[j].x, factor), scaled(w.y, v[j].y, factor), scaled(w.z, v[j].z, factor),
                          scaled(w.w, v[j].w, factor)};
            to[row_place(i)] = w;
        }
    }
}
