// A kernel that may start while the one ahead of it in its stream still runs (overlap.py).
#pragma once

// Waits until all kernels ahead have finished and all that they wrote is there; then lets the kernel
// behind start. Before it a thread may touch only what no kernel writes, such as weights, and it writes
// nothing: the kernel ahead may still read it. Every thread block comes here, so that a kernel has never
// finished before those ahead of it. What they wrote is read by plain loads: the read-only path
// (`__ldg`) is for what never changes, and the compiler may move its loads past any wait.
//
// After an ordinary launch it does nothing.
__device__ __forceinline__ void follow() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Words of a table, before `follow` or after it. Before it this is sound for what was written at
// least two launches ago, since a kernel lets the next one start only after its own wait: those ahead
// of it have finished by then. Past L1, which may still hold what was there earlier.
__device__ __forceinline__ int4 read_ahead(const int4* at) {
    int4 v;
    asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}
__device__ __forceinline__ int read_ahead(const int* at) {
    int v;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}
