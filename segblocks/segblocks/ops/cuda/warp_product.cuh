// The product of a warp's share of two tiles in shared memory (sm_80). Behind mma.cuh.
#pragma once

// acc += A B of 16·MT rows of `a` and 8·NT of `b`, output channels, with 64 values of the inner dimension
// each: eight chunks of eight values, and those of row r lie at `place(r, chunk)`, which repeats every
// eight rows. acc as `mma` has it.
//
// A lane takes whole chunks (see mma.cuh). The eight lanes that read at a time read the same four chunks of
// two rows, which `place` puts into different banks.
template <int MT, int NT, class Place>
INLINE void warp_product(float (&acc)[MT][NT][4], const char* a, const char* b, const Place& place) {
    int lane = threadIdx.x % 32, row = lane / 4, eighth = place(8, 0) - place(0, 0);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = place(row, half * 4 + lane % 4);
        uint4 right[NT];
#pragma unroll
        for (int j = 0; j < NT; j++) right[j] = *(const uint4*)(b + at + j * eighth);
#pragma unroll
        for (int i = 0; i < MT; i++) {
            uint4 upper = *(const uint4*)(a + at + 2 * i * eighth);
            uint4 lower = *(const uint4*)(a + at + (2 * i + 1) * eighth);
#pragma unroll
            for (int j = 0; j < NT; j++) mma_chunk(acc[i][j], upper, lower, right[j]);
        }
    }
}
