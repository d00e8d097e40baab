// Two sums down every column of (P, C) pixels in one launch, the same bits every time.
//
// A thread block takes `per_block` rows, `width` vectors of each; a thread takes one vector of every
// lines-th row. What it found it leaves in `partials` (thread blocks, 2, C). The last thread block to
// arrive of those that share their columns joins them in their own order, in double.
#pragma once
#include "affine.cuh"

struct Columns {
    long long rows, per_block;
    int channels, width, lines;
};

constexpr int THREADS = 256;
// By streams, which may run at the same time, and by columns. Every launch leaves zeros behind.
constexpr int STREAMS = 64, TILES = 512;
__device__ int arrived[STREAMS * TILES];

struct Part {
    int line, column;      // of a thread
    bool busy;             // whether it has a column
    long long first, end;  // rows of the thread block
};

INLINE Part my_part(const Columns& c) {
    const int line = threadIdx.x / c.width;
    const int vector = blockIdx.y * c.width + threadIdx.x - line * c.width;
    const long long first = blockIdx.x * c.per_block;
    const long long end = first + c.per_block < c.rows ? first + c.per_block : c.rows;
    return {line, vector * VECTOR, line < c.lines && vector * VECTOR < c.channels, first, end};
}

// Joins the threads of each column: join(thread) takes in what that one has left in shared memory.
template <class Join> INLINE void join_lines(const Columns& c, const Part& part, const Join& join) {
    int step = 1;
    while (2 * step < c.lines) step *= 2;
    for (; step; step /= 2) {
        __syncthreads();
        if (part.busy && part.line < step && part.line + step < c.lines)
            join((int)threadIdx.x + step * c.width);
    }
}

INLINE void leave(const Columns& c, const Part& part, float* partials, const float (&a)[VECTOR],
                  const float (&b)[VECTOR]) {
    if (!part.busy || part.line) return;
    float* at = partials + 2ll * blockIdx.x * c.channels + part.column;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        at[i] = a[i];
        at[c.channels + i] = b[i];
    }
}

// Whether this thread block is the last with these columns; all others have left their parts then.
INLINE bool is_last_to_arrive(long long stream) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* count = arrived + stream * TILES + blockIdx.y;
        is_last = atomicAdd(count, 1) == (int)gridDim.x - 1;
        if (is_last) *count = 0;
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

// For each column of this thread block: take(part, first, a, b, sums) for all parts in order, where
// `first` is a of part 0, then finish(column, first, sums).
template <class Take, class Finish>
INLINE void join_parts(const Columns& c, const float* partials, const Take& take,
                       const Finish& finish) {
    __shared__ double joined[2][THREADS];
    const int across = c.width * VECTOR, groups = THREADS / across;
    const int group = threadIdx.x / across, column = blockIdx.y * across + threadIdx.x % across;
    double sums[2] = {0, 0};
    float first = 0;
    if (group < groups && column < c.channels) {
        const int parts = gridDim.x;
        first = __ldcg(partials + column);
#pragma unroll 8
        for (int part = group; part < parts; part += groups) {
            const float* at = partials + 2ll * part * c.channels + column;
            take(part, first, __ldcg(at), __ldcg(at + c.channels), sums);
        }
    }
    joined[0][threadIdx.x] = sums[0];
    joined[1][threadIdx.x] = sums[1];
    __syncthreads();
    if (group || column >= c.channels) return;
    for (int other = 1; other < groups; other++) {
        sums[0] += joined[0][threadIdx.x + other * across];
        sums[1] += joined[1][threadIdx.x + other * across];
    }
    finish(column, first, sums);
}
