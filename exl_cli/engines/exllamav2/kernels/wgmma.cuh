// Asynchronous products of a warpgroup (compute capability 9.0a, PTX ISA: wgmma): each of its four warps unpacks its own
// operand into registers, and the tensor cores read x from shared memory.

#if WGMMA
#ifndef EMULATED

// d += a b: a 64x16, of which each warp has 16x16 as for `mma`, b 16 x 8 TILES at x.
#define FOUR_SUMS(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
DEVICE void wgmma(float (&d)[TILES][4], u32 a0, u32 a1, u32 a2, u32 a3, u64 x)
{
#if TILES == 4
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
        : FOUR_SUMS(0), FOUR_SUMS(1), FOUR_SUMS(2), FOUR_SUMS(3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(x));
#elif TILES == 8
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
        : FOUR_SUMS(0), FOUR_SUMS(1), FOUR_SUMS(2), FOUR_SUMS(3), FOUR_SUMS(4), FOUR_SUMS(5),
          FOUR_SUMS(6), FOUR_SUMS(7)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(x));
#elif TILES == 16
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
        : FOUR_SUMS(0), FOUR_SUMS(1), FOUR_SUMS(2), FOUR_SUMS(3), FOUR_SUMS(4), FOUR_SUMS(5),
          FOUR_SUMS(6), FOUR_SUMS(7), FOUR_SUMS(8), FOUR_SUMS(9), FOUR_SUMS(10), FOUR_SUMS(11),
          FOUR_SUMS(12), FOUR_SUMS(13), FOUR_SUMS(14), FOUR_SUMS(15)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(x));
#else
#error "with WGMMA a warp has 4, 8 or 16 tiles"
#endif
}
#undef FOUR_SUMS

// The matrix descriptor of rows of x in shared memory: 128 bytes of each, swizzled over 128 bytes, 8 rows in 1024 bytes.
DEVICE u64 x_descriptor(const char* x)
{
    return (u64) (shared_address(x) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keep the compiler from reading a sum before `wgmma_wait`.
DEVICE void fence_register(float& f) { asm volatile("" : "+f"(f)::"memory"); }

#endif
#endif
