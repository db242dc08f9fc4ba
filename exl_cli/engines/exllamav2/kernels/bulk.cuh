// Copies into shared memory by the copy engine, and barriers that count threads and bytes (compute capability 9.0, PTX ISA:
// cp.async.bulk and mbarrier).

// A CUtensorMap, which describes a matrix to the copy engine.
struct alignas(64) TensorMap { u64 words[16]; };

#ifndef EMULATED

DEVICE void barrier_init(u64* barrier, u32 count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Make initialized barriers visible to the copy engine, and to threads after the next `__syncthreads`.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(u64* barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive, and have the barrier's phase wait for so many bytes of copies, too.
DEVICE void barrier_expect(u64* barrier, u32 bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Wait until the phase of this parity is complete. A barrier begins in phase 0, as if one of parity 1 had been before.
DEVICE void barrier_wait(u64* barrier, u32 parity)
{
    u32 over;
    do
        asm volatile(
            "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over; }"
            : "=r"(over) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    while (!over);
}

// Size and both addresses are multiples of 16 bytes.
DEVICE void bulk_copy(void* to, const void* from, u32 bytes, u64* barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// A box of the map's matrix, whose first value is this number of this row; zeros behind the last row.
DEVICE void tile_copy(void* to, const TensorMap* map, u32 number, u32 row, u64* barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(map), "r"(number), "r"(row), "r"(shared_address(barrier)) : "memory");
}

// Lower or raise the registers of each thread to COUNT, a multiple of 8; all warps of a warpgroup call it. Raising waits until
// others have given theirs back.
template <u32 COUNT> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <u32 COUNT> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

#endif
