// Runs a kernel's source on the CPU, one block at a time until it waits for others: every thread is a fiber, switched at
// barriers and at the operations of a whole warp. Asynchronous copies and products really are late: they take place when they
// are waited for.
// No containers of the standard library: compiling those takes longer than compiling a kernel.
#pragma once
#define EMULATED
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
// What is here runs far more often than it is compiled.
#pragma GCC push_options
#pragma GCC optimize("O2")
template <class T> static T min(T a, T b) { return b < a ? b : a; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }

#define DEVICE inline
#define INLINED static inline __attribute__((always_inline))  // g++ without -O calls each other function
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) Words;
const size_t SHARED_BYTES = 256 * 1024, STACK_BYTES = 64 * 1024;
#define shared_memory ((Words*) running_block->shared)

const unsigned MOST_COPIES = 512;          // of a thread, asked for and not yet waited for
struct Copy { void* to; const void* from; unsigned bytes, group; };
const unsigned MOST_PRODUCTS = 32;         // the same of products of four warps
struct Product { float (*sums)[4]; unsigned tiles, a[4], group; unsigned long long x; };
struct Fiber
{
    ucontext_t context;
    jmp_buf place;                          // where it gave way: _setjmp saves no signals, which would be a system call
    bool begun, done;
    unsigned copies, groups;                // still to be made; closed so far
    Copy copy[MOST_COPIES];
    unsigned products, product_groups;
    Product product[MOST_PRODUCTS];
};
// What the copy engine was asked for: rows of so many bytes, for a barrier in shared memory.
struct Bulk { char* to; const char* from; unsigned bytes, rows, valid; uint64_t stride; bool swizzled; void* barrier; };
const unsigned MOST_BULKS = 2048;
struct Warp { float f[2][32][4]; unsigned u[2][32][6]; unsigned count, phase, turn[32]; };
struct RunningBlock
{
    Dim index;
    Fiber* fibers;
    Warp* warps;
    char *shared, *stacks;
    unsigned left, count, phase;            // threads that are not done, and that are at a barrier
    unsigned met, meeting;                  // the same of the first threads
    bool waits;                             // for another block
    unsigned bulks;
    Bulk bulk[MOST_BULKS];
};
static RunningBlock* running_block;
static jmp_buf scheduler;
static unsigned current;
static bool at_once;

INLINED void become(unsigned fiber)
{
    current = fiber;
    threadIdx.x = fiber;
}
static void give_way()
{
    unsigned me = current;
    if (!_setjmp(running_block->fibers[me].place)) _longjmp(scheduler, 1);
    become(me);
}
static void meet(unsigned& count, unsigned& phase, unsigned all)
{
    unsigned mine = phase;
    if (++count == all) { count = 0; phase++; return; }
    while (phase == mine) give_way();
}
static void __syncthreads() { meet(running_block->count, running_block->phase, blockDim.x); }
template <unsigned COUNT> static void meet() { meet(running_block->met, running_block->meeting, COUNT); }
static void __syncwarp() { Warp& w = running_block->warps[current / 32]; meet(w.count, w.phase, 32); }

// Not by way of _Float16, which g++ widens to double in a function of its library where that is what the float becomes.
typedef short Halves __attribute__((vector_size(16)));
INLINED float half_to_float(unsigned short h) { return __builtin_ia32_vcvtph2ps(Halves{(short) h})[0]; }
INLINED unsigned short float_to_half(float f) { _Float16 h = (_Float16) f; unsigned short b; memcpy(&b, &h, 2); return b; }
DEVICE float to_float(unsigned short h) { return half_to_float(h); }
DEVICE unsigned short nearest_half(float f) { return float_to_half(f); }
template <class F> static unsigned each_half(F f)
{
    return float_to_half(f(0)) | (unsigned) float_to_half(f(16)) << 16;
}
INLINED float part(unsigned a, int shift) { return half_to_float((unsigned short) (a >> shift)); }
DEVICE unsigned h2_add(unsigned a, unsigned b) { return each_half([&](int s) { return part(a, s) + part(b, s); }); }
DEVICE unsigned h2_mul(unsigned a, unsigned b) { return each_half([&](int s) { return part(a, s) * part(b, s); }); }
DEVICE unsigned saturate(unsigned w)
{
    return each_half([&](int s) { float f = part(w, s); return f != f ? f : max(-65504.0f, min(f, 65504.0f)); });
}
DEVICE void prefetch(const void*) {}
DEVICE float small_float(unsigned v) { return (float) v; }
DEVICE unsigned same_in_warp(unsigned v) { return v; }
DEVICE unsigned in_register(unsigned v, void*) { return v; }
DEVICE void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1)
{
    Warp& w = running_block->warps[current / 32];
    unsigned lane = current % 32, turn = w.turn[lane]++ & 1;
    unsigned given[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(w.u[turn][lane], given, sizeof given);
    __syncwarp();
    for (int i = 0; i < 4; i++)
    {
        unsigned row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + (i & 1);
        double sum = d[i];
        for (unsigned k = 0; k < 16; k++)
        {
            unsigned a = w.u[turn][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            unsigned b = w.u[turn][column * 4 + k % 8 / 2][4 + k / 8];
            sum += (double) part(a, k & 1 ? 16 : 0) * part(b, k & 1 ? 16 : 0);
        }
        d[i] = (float) sum;
    }
}
// Each warp for itself: the others' rows are theirs.
DEVICE unsigned long long x_descriptor(const char* x) { return (unsigned long long) x; }
static void perform(const Product& p)
{
    Warp& w = running_block->warps[current / 32];
    unsigned lane = current % 32, turn = w.turn[lane]++ & 1;
    memcpy(w.u[turn][lane], p.a, sizeof p.a);
    __syncwarp();
    for (unsigned tile = 0; tile < p.tiles; tile++)
        for (int i = 0; i < 4; i++)
        {
            unsigned row = lane / 4 + (i / 2) * 8, column = tile * 8 + lane % 4 * 2 + (i & 1);
            double sum = p.sums[tile][i];
            for (unsigned k = 0; k < 16; k++)
            {
                unsigned a = w.u[turn][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                unsigned long long at = p.x + column * 128 + k * 2;
                unsigned short b;
                memcpy(&b, (const void*) (at ^ (at >> 7 & 7) << 4), 2);
                sum += (double) part(a, k & 1 ? 16 : 0) * half_to_float(b);
            }
            p.sums[tile][i] = (float) sum;
        }
}
template <unsigned long TILES_>
DEVICE void wgmma(float (&d)[TILES_][4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long x)
{
    Fiber& f = running_block->fibers[current];
    if (f.products == MOST_PRODUCTS) abort();
    f.product[f.products++] = {d, (unsigned) TILES_, {a0, a1, a2, a3}, f.product_groups, x};
}
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() { running_block->fibers[current].product_groups++; }
template <int PENDING> DEVICE void wgmma_wait()
{
    __syncwarp();
    Fiber& f = running_block->fibers[current];
    unsigned done = 0;
    while (done < f.products && f.product[done].group + PENDING < f.product_groups) perform(f.product[done++]);
    f.products -= done;
    memmove(f.product, f.product + done, f.products * sizeof(Product));
}
DEVICE void fence_register(float&) {}
DEVICE unsigned warp_or(unsigned v)
{
    Warp& w = running_block->warps[current / 32];
    unsigned lane = current % 32, turn = w.turn[lane]++ & 1, all = 0;
    w.u[turn][lane][0] = v;
    __syncwarp();
    for (int i = 0; i < 32; i++) all |= w.u[turn][i][0];
    return all;
}
DEVICE unsigned warp_max(unsigned v)
{
    Warp& w = running_block->warps[current / 32];
    unsigned lane = current % 32, turn = w.turn[lane]++ & 1, most = 0;
    w.u[turn][lane][0] = v;
    __syncwarp();
    for (int i = 0; i < 32; i++) most = max(most, w.u[turn][i][0]);
    return most;
}
DEVICE unsigned ones(unsigned v) { return __builtin_popcount(v); }
DEVICE unsigned float_bits(float f) { unsigned w; memcpy(&w, &f, 4); return w; }
DEVICE float bits_float(unsigned w) { float f; memcpy(&f, &w, 4); return f; }
DEVICE unsigned add_shared(unsigned* p, unsigned v) { unsigned before = *p; *p += v; return before; }
template <class T> static void add_global(T* p, T v) { *p += v; }
DEVICE void max_global(unsigned* p, unsigned v) { *p = max(*p, v); }
DEVICE unsigned long long from_lane(unsigned long long v, unsigned from)
{
    Warp& w = running_block->warps[current / 32];
    unsigned lane = current % 32, turn = w.turn[lane]++ & 1;
    memcpy(w.u[turn][lane], &v, sizeof v);
    __syncwarp();
    memcpy(&v, w.u[turn][from], sizeof v);
    return v;
}
DEVICE float warp_sum(float v)
{
    Warp& w = running_block->warps[current / 32];
    unsigned lane = current % 32, turn = w.turn[lane]++ & 1;
    float all = 0;
    w.f[turn][lane][0] = v;
    __syncwarp();
    for (int i = 0; i < 32; i++) all += w.f[turn][i][0];
    return all;
}
// What each lane of the warp gives.
static float* given(float v)
{
    Warp& w = running_block->warps[current / 32];
    unsigned lane = current % 32, turn = w.turn[lane]++ & 1;
    w.f[turn][lane][0] = v;
    __syncwarp();
    return w.f[turn][0];
}
DEVICE float shuffle(float v, unsigned lane) { return given(v)[lane * 4]; }
DEVICE float quad_max(float v)
{
    float* all = given(v) + current % 32 / 4 * 16;
    return fmaxf(fmaxf(all[0], all[4]), fmaxf(all[8], all[12]));
}
DEVICE float quad_sum(float v)
{
    float* all = given(v) + current % 32 / 4 * 16;
    return (all[0] + all[4]) + (all[8] + all[12]);
}
DEVICE unsigned nearest_halves(float low, float high) { return float_to_half(low) | (unsigned) float_to_half(high) << 16; }
DEVICE unsigned low_halves(unsigned a, unsigned b) { return (a & 0xffff) | b << 16; }
DEVICE unsigned high_halves(unsigned a, unsigned b) { return a >> 16 | (b & 0xffff0000u); }
DEVICE float reciprocal(float v) { return 1.0f / v; }
DEVICE float power_of_two(float v) { return exp2f(v); }
DEVICE unsigned arrive(unsigned* counter) { return (*counter)++; }
DEVICE void await(const unsigned* counter, unsigned count)
{
    while (*(volatile const unsigned*) counter < count)
    {
        running_block->waits = true;
        give_way();
    }
}
template <unsigned long N> DEVICE void from_others(float (&to)[N], const void* from) { memcpy(to, from, sizeof to); }
DEVICE void to_others(void* to, const float (&from)[4]) { memcpy(to, from, sizeof from); }
DEVICE float rsqrtf(float v) { return 1.0f / sqrtf(v); }
static void later(void* to, const void* from, unsigned bytes)
{
    if (at_once) memcpy(to, from, bytes);
    else
    {
        Fiber& f = running_block->fibers[current];
        if (f.copies == MOST_COPIES) abort();
        f.copy[f.copies++] = {to, from, bytes, f.groups};
    }
}
DEVICE void copy16(void* to, const void* from)
{
    if ((uintptr_t) to % 16 || (uintptr_t) from % 16) abort();
    later(to, from, 16);
}
DEVICE void copies_commit() { running_block->fibers[current].groups++; }
template <int PENDING> DEVICE void copies_wait()
{
    Fiber& f = running_block->fibers[current];
    unsigned kept = 0;
    for (unsigned i = 0; i < f.copies; i++)
    {
        const Copy& c = f.copy[i];
        if (c.group + PENDING < f.groups) memcpy(c.to, c.from, c.bytes);
        else f.copy[kept++] = c;
    }
    f.copies = kept;
}
// Barriers in shared memory: threads still to arrive, all of them, bytes still to come, parity of the phase.
struct Barrier { uint16_t left, all; int32_t bytes : 31; uint32_t parity : 1; };
static void settle(void* barrier)
{
    Barrier& b = *(Barrier*) barrier;
    if (!b.left && !b.bytes) b.left = b.all, b.parity ^= 1;
}
DEVICE void barrier_init(unsigned long long* barrier, unsigned count)
{
    Barrier b = {(uint16_t) count, (uint16_t) count, 0, 0};
    memcpy(barrier, &b, sizeof b);
}
DEVICE void barrier_init_fence() {}
DEVICE void barrier_expect(unsigned long long* barrier, unsigned bytes)
{
    Barrier& b = *(Barrier*) barrier;
    if (!b.left) abort();
    b.left--;
    b.bytes += bytes;
    settle(barrier);
}
DEVICE void barrier_arrive(unsigned long long* barrier) { barrier_expect(barrier, 0); }
static void perform(const Bulk& c)
{
    for (unsigned row = 0; row < c.rows; row++)
        for (unsigned at = 0; at < c.bytes; at += 16)
        {
            char* to = c.to + row * c.bytes + (c.swizzled ? at ^ (row & 7) * 16 : at);
            if (row < c.valid) memcpy(to, c.from + row * c.stride + at, 16);
            else memset(to, 0, 16);
        }
    ((Barrier*) c.barrier)->bytes -= c.rows * c.bytes;
    settle(c.barrier);
}
static void ask_for(const Bulk& c)
{
    if ((uintptr_t) c.to % 16 || (uintptr_t) c.from % 16 || c.bytes % 16) abort();
    if (at_once) perform(c);
    else if (running_block->bulks == MOST_BULKS) abort();
    else running_block->bulk[running_block->bulks++] = c;
}
DEVICE void bulk_copy(void* to, const void* from, unsigned bytes, unsigned long long* barrier)
{
    ask_for({(char*) to, (const char*) from, bytes, 1, 1, 0, false, barrier});
}
// A map is four numbers here: where the matrix is, bytes between its rows, its rows, and those of a box.
template <class Map> DEVICE void tile_copy(void* to, const Map* map, unsigned number, unsigned row, unsigned long long* barrier)
{
    const unsigned long long *m = map->words, left = m[2] > row ? m[2] - row : 0;
    if ((uintptr_t) to % 1024 || m[1] % 16 || m[3] > 256) abort();
    ask_for({(char*) to, (const char*) m[0] + row * m[1] + number * 2, 128, (unsigned) m[3], (unsigned) left, m[1], true, barrier});
}
DEVICE void barrier_wait(unsigned long long* barrier, unsigned parity)
{
    for (;; give_way())
    {
        RunningBlock& block = *running_block;
        unsigned kept = 0;
        for (unsigned i = 0; i < block.bulks; i++)
            if (block.bulk[i].barrier == barrier) perform(block.bulk[i]);
            else block.bulk[kept++] = block.bulk[i];
        block.bulks = kept;
        if (((Barrier*) barrier)->parity != parity) return;
    }
}
template <int COUNT> static void fewer_registers() {}
template <int COUNT> static void more_registers() {}
DEVICE void wait_for_inputs() {}
DEVICE void let_next_start() {}

template <class Argument> static void (*entry)(Argument);
template <class Argument> static const Argument* argument;
template <class Argument> static void start()
{
    entry<Argument>(*argument<Argument>);
    running_block->fibers[current].done = true;
    give_way();
}
// Blocks run in order, or with `seed` in another one; where that is odd, asynchronous copies take place at once.
template <class Argument>
static void launch(void (*kernel)(Argument), const Argument& a, Dim grid, unsigned threads, unsigned seed)
{
    at_once = seed & 1;
    entry<Argument> = kernel;
    argument<Argument> = &a;
    gridDim = grid;
    blockDim = {threads, 1, 1};
    static Dim* blocks;                     // not in registers, which a jump puts back
    static RunningBlock** running;          // each stays where it is: its fibers hold references into it
    static unsigned count, size, begun, turn, i;
    count = grid.x * grid.y * grid.z;
    blocks = (Dim*) malloc(count * sizeof(Dim));
    for (unsigned n = 0; n < count; n++) blocks[n] = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    // By Park and Miller's generator: <random> would take longer to compile than a kernel.
    uint64_t number = seed;
    for (unsigned left = seed ? count : 0; left > 1; left--)
    {
        number = number * 48271 % 2147483647;
        Dim last = blocks[left - 1];
        blocks[left - 1] = blocks[number % left];
        blocks[number % left] = last;
    }
    running = (RunningBlock**) malloc(count * sizeof(RunningBlock*));
    for (size = begun = turn = 0; begun < count || size;)
    {
        // Another one begins when all that have begun wait.
        if (turn == size && begun < count)
        {
            RunningBlock& b = *(running[size++] = (RunningBlock*) calloc(1, sizeof(RunningBlock)));
            b.index = blocks[begun++];
            b.left = threads;
            b.fibers = (Fiber*) malloc(threads * sizeof(Fiber));
            b.warps = (Warp*) calloc((threads + 31) / 32, sizeof(Warp));
            b.shared = (char*) aligned_alloc(1024, SHARED_BYTES);
            b.stacks = (char*) malloc(threads * STACK_BYTES);
            // What a block finds in shared memory is undefined: here, NaNs.
            memset(b.shared, 0xff, SHARED_BYTES);
            for (unsigned t = 0; t < threads; t++)
            {
                Fiber& f = b.fibers[t];
                f.begun = f.done = false;
                f.copies = f.groups = f.products = f.product_groups = 0;
                ucontext_t& context = f.context;
                getcontext(&context);
                context.uc_stack.ss_sp = b.stacks + t * STACK_BYTES;
                context.uc_stack.ss_size = STACK_BYTES;
                makecontext(&context, (void (*)()) start<Argument>, 0);
            }
        }
        else if (turn == size) turn = 0;
        running_block = running[turn];
        blockIdx = running_block->index;
        for (running_block->waits = false; running_block->left && !running_block->waits;)
            for (i = 0; i < threads; i++)
            {
                if (running_block->fibers[i].done) continue;
                become(i);
                if (!_setjmp(scheduler))
                {
                    if (running_block->fibers[i].begun) _longjmp(running_block->fibers[i].place, 1);
                    running_block->fibers[i].begun = true;
                    setcontext(&running_block->fibers[i].context);
                }
                if (running_block->fibers[i].done) running_block->left--;
            }
        if (running_block->left) turn++;
        else
        {
            free(running_block->fibers);
            free(running_block->warps);
            free(running_block->shared);
            free(running_block->stacks);
            free(running_block);
            size--;
            memmove(running + turn, running + turn + 1, (size - turn) * sizeof *running);
        }
    }
    free(running);
    free(blocks);
}
#pragma GCC pop_options
