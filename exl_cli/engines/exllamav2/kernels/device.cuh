// What the kernels use of the machine, in one place, so that the same kernel source can be compiled for the CPU by the
// tests, which give these functions a body of their own. Half precision numbers travel as their 16 bits, two in a u32.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(16) Words { u32 x, y, z, w; };

#ifndef EMULATED

#define DEVICE __device__ __forceinline__
// Aligned as `bulk.cuh` wants boxes that are swizzled over 128 bytes.
extern __shared__ __align__(1024) Words shared_memory[];

DEVICE u32 h2_add(u32 a, u32 b) { u32 d; asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 h2_mul(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE float to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE u16 nearest_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE u32 nearest_halves(float low, float high)
{
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
// Infinities become the largest finite halves, NaNs stay what they are.
DEVICE u32 saturate(u32 w)
{
    u32 d;
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(w), "r"(0x7bff7bffu));
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(w) : "r"(d), "r"(0xfbfffbffu));
    return w;
}
// The low, and the high, halves of two words.
DEVICE u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
DEVICE u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

DEVICE float reciprocal(float f) { float d; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(f)); return d; }
DEVICE float power_of_two(float f) { float d; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(f)); return d; }

// A number below 2^23, without the conversion that takes four times as long as other instructions.
DEVICE float small_float(u32 v) { return __uint_as_float(0x4b000000u | v) - 8388608.0f; }

// A constant that the compiler does not know as one, and so keeps in a register: it goes through shared memory.
DEVICE u32 in_register(u32 v, void* scratch)
{
    *(volatile u32*) scratch = v;
    return *(volatile u32*) scratch;
}

// d += a b of a warp: a 16x16, b 16x8, d 16x8 in float32, each lane holding its part (PTX ISA, mma.m16n8k16).
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE u32 shared_address(const void* p) { return (u32) __cvta_generic_to_shared(p); }

// Asynchronous copies into shared memory, past the first-level cache: weights are read once.
DEVICE void copy16(void* to, const void* from)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// A barrier of the first COUNT threads of the block.
template <u32 COUNT> DEVICE void meet() { asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory"); }

// A number that all lanes have, known to the compiler as such.
DEVICE u32 same_in_warp(u32 v) { return __shfl_sync(0xffffffffu, v, 0); }

DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

DEVICE u32 warp_or(u32 v) { return __reduce_or_sync(0xffffffffu, v); }
DEVICE u32 warp_max(u32 v) { return __reduce_max_sync(0xffffffffu, v); }
DEVICE u32 ones(u32 v) { return __popc(v); }

DEVICE u32 float_bits(float f) { return __float_as_uint(f); }
DEVICE float bits_float(u32 w) { return __uint_as_float(w); }

// Atomic, in memory that the threads of a block share: what was there before.
DEVICE u32 add_shared(u32* p, u32 v) { return atomicAdd(p, v); }
DEVICE void add_global(u32* p, u32 v) { atomicAdd(p, v); }
DEVICE void add_global(float* p, float v) { atomicAdd(p, v); }
DEVICE void max_global(u32* p, u32 v) { atomicMax(p, v); }

DEVICE u64 from_lane(u64 v, u32 lane) { return __shfl_sync(0xffffffffu, v, lane); }

DEVICE float warp_sum(float v)
{
    #pragma unroll
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

DEVICE float shuffle(float v, u32 lane) { return __shfl_sync(0xffffffffu, v, lane); }
// Over the four lanes that follow a multiple of four.
DEVICE float quad_max(float v)
{
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
DEVICE float quad_sum(float v)
{
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Count a block in whose threads have met; returns how many came before. What their threads wrote, this one's can read,
// by `from_others`: from the second-level cache, which all share.
DEVICE u32 arrive(u32* counter)
{
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
// Wait until a counter has come that far.
DEVICE void await(const u32* counter, u32 count)
{
    u32 now;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    while (now < count);
}
DEVICE void from_others(float (&to)[2], const void* from)
{
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "l"(from) : "memory");
}
DEVICE void from_others(float (&to)[4], const void* from)
{
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "l"(from) : "memory");
}

DEVICE void to_others(void* to, const float (&from)[4])
{
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]) : "memory");
}

// Programmatic dependent launch: the kernel before may still be running until `wait_for_inputs` returns. Both do
// nothing where a kernel was launched without it.
DEVICE void wait_for_inputs()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#endif

// Numbers on their way to memory. Sums may leave the range of half precision: models with massive activations (Sun, Chen,
// Kolter and Liu 2024, arXiv 2402.17762) come near its end, and a norm of an infinity, or a sum of two, would be NaN.
DEVICE u16 to_half(float f) { return (u16) saturate(nearest_half(f)); }
DEVICE u32 to_halves(float low, float high) { return saturate(nearest_halves(low, high)); }
DEVICE Words saturate(Words w) { return Words{saturate(w.x), saturate(w.y), saturate(w.z), saturate(w.w)}; }

// The sum over a block's threads, in every one of them, always in the same order. `scratch`: a number for each warp.
DEVICE float block_sum(float v, float* scratch)
{
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    for (u32 w = 0; w < (blockDim.x + 31) / 32; w++) sum += scratch[w];
    return sum;
}

// Of two halves in a word: the sum of their squares, their products with those of another word and a factor, and the two
// that lie at places of a row.
DEVICE float square(u32 w)
{
    float a = to_float((u16) w), b = to_float((u16) (w >> 16));
    return a * a + b * b;
}
DEVICE u32 scaled(u32 w, u32 v, float factor)
{
    return to_half(to_float((u16) w) * factor * to_float((u16) v))
           | (u32) to_half(to_float((u16) (w >> 16)) * factor * to_float((u16) (v >> 16))) << 16;
}
DEVICE u32 gather(const u16* row, u32 places) { return row[places & 0xffff] | (u32) row[places >> 16] << 16; }
