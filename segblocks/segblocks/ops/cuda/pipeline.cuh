// Asynchronous copies into shared memory (sm_80), and the barriers that they and bulk copies complete on (sm_90).
#pragma once

INLINE unsigned shared_address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}
INLINE void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
INLINE void barrier_arrive(unsigned barrier, int times = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(times) : "memory");
}
INLINE void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}
INLINE void barrier_wait(unsigned barrier, int parity) {
    asm volatile(
        "{.reg .pred p;\n"
        "WAIT%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra WAIT%=;}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
// Makes barriers just initialised visible to asynchronous copies; all threads meet after it.
INLINE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
INLINE int load_shared(unsigned from) {
    int word;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(word) : "r"(from));
    return word;
}
// Counts one more; orders what was written before it ahead of what others read behind theirs.
INLINE int count_arrival(int* count) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
    return before;
}
// 16 bytes, kept in L1 on the way.
INLINE void copy_async(unsigned to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Zeros in the place of such 16 bytes; nothing is read, but `from` has to be an address.
INLINE void copy_zeros(unsigned to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, 0;" ::"r"(to), "l"(from) : "memory");
}
// Like copy_async, but past L1: for tables, ahead of `follow` (follow.cuh).
INLINE void copy_ahead(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Waits until all of this thread's are there.
INLINE void copies_landed() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Those since the last call are a group.
INLINE void copies_begun() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all of this thread's copies but those of the last PENDING groups are there.
template <int PENDING> INLINE void copies_landed() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
INLINE void store_shared(unsigned to, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}
// Arrives on the barrier once this thread's earlier copy_async have landed.
INLINE void copy_async_arrive(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
INLINE void copy_bulk(unsigned to, const void* from, int bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}
// Registers of this warpgroup's threads from here on; more of them wait until others gave some up.
template <int COUNT, bool MORE> INLINE void set_registers() {
    if (MORE)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
INLINE void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
INLINE void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
