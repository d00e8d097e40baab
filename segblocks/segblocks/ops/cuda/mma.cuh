// A warp's matrix product from registers (sm_80 and later).
//
// The inner dimension goes in chunks of 32 values. Which of them a product calls its k-th is nobody's
// concern as long as both factors agree, so every lane takes 8 adjacent ones with one 16-byte load:
// of row (or output channel) lane / 4 those from 8 * (lane % 4).
// Behind dtypes.cuh and pipeline.cuh.
#pragma once

#if SB_DTYPE == 1
#define MMA_TYPE "bf16.bf16"
#else
#define MMA_TYPE "f16.f16"
#endif

// Copies eight adjacent values to shared memory, or zeros where not `wanted`.
INLINE void copy_eight(unsigned to, const scalar* from, bool wanted) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}

// d[16,8] += a[16,16] b[16,8]; lane l holds d of rows l/4 and l/4 + 8, columns 2*(l%4) and the next.
INLINE void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// One chunk: `upper` of row lane/4, `lower` of row lane/4 + 8, `b` of output channel lane/4.
INLINE void mma_chunk(float (&d)[4], const uint4& upper, const uint4& lower, const uint4& b) {
    mma(d, upper.x, lower.x, upper.y, lower.y, b.x, b.y);
    mma(d, upper.z, lower.z, upper.w, lower.w, b.z, b.w);
}
