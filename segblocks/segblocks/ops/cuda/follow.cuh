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
