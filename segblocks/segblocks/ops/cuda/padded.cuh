// The image as padded blocks (stem.cu).
#pragma once
#include "common.cuh"

struct Split {
    const scalar* image;
    scalar* out;
    const int* slot;
    const int* cells;
    long long stride_n, stride_c, stride_y, stride_x;
    int gh, gw, n_high, block;
    int chunks_high, chunks_low;  // thread blocks for one stored block
    Divider by_high, by_low;      // pairs in a padded line
};

// Two adjacent pixels of the image, the first in an even column.
struct Pair {
    float v[2][3];
};

INLINE Pair load_two(const Split& p, const scalar* at) {
    Pair pair;
#if SB_PACKED
    const unsigned* words = (const unsigned*)at;
    unpack_pair(fetch(words), pair.v[0][0], pair.v[0][1]);
    unpack_pair(fetch(words + 1), pair.v[0][2], pair.v[1][0]);
    unpack_pair(fetch(words + 2), pair.v[1][1], pair.v[1][2]);
#else
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int c = 0; c < 3; c++)
            pair.v[i][c] = to_real(fetch(at + i * p.stride_x + c * p.stride_c));
#endif
    return pair;
}

// The mean of a 2×2 quad of the image.
INLINE void average(const Split& p, const scalar* at, float (&mean)[3]) {
    const Pair upper = load_two(p, at), lower = load_two(p, at + p.stride_y);
#pragma unroll
    for (int c = 0; c < 3; c++)
        mean[c] = 0.25f * (upper.v[0][c] + upper.v[1][c] + lower.v[0][c] + lower.v[1][c]);
}

// Part `id` of the blocks, by 256 threads. A thread does two pixels of a line, the first in an even
// column of the block, so that both lie in the same block and, where that is low and its neighbour
// high, under the same average.
INLINE void split_two(const Split& p, int id) {
    const int of_high = p.n_high * p.chunks_high;
    const bool high = id < of_high;
    const int chunks = high ? p.chunks_high : p.chunks_low, index = high ? id : id - of_high;
    const int stored = index / chunks, unit = (index - stored * chunks) * 256 + threadIdx.x;
    const int half = p.block / 2, side = high ? p.block : half, padded = side + 6;
    const Divider& by = high ? p.by_high : p.by_low;
    const int line = quotient(unit, by), y = line - 3;
    const int x = 2 * (unit - line * (int)by.divisor) - 4;
    if (line >= padded) return;
    const int cell = fetch(p.cells + stored + (high ? 0 : p.n_high)), cell_line = cell / p.gw;
    const int n = cell_line / p.gh, gy = cell_line - n * p.gh, gx = cell - cell_line * p.gw;
    const int step_y = y < 0 ? -1 : y >= side, step_x = x < 0 ? -1 : x >= side;
    Pair pair = {};
    if ((unsigned)(gy + step_y) < (unsigned)p.gh && (unsigned)(gx + step_x) < (unsigned)p.gw) {
        const bool beside = step_y || step_x;
        const scalar* image = p.image + n * p.stride_n;
        const int iy = gy * side + y, ix = gx * side + x;
        if (!high) {
            const scalar* at = image + 2 * iy * p.stride_y + 2 * ix * p.stride_x;
            average(p, at, pair.v[0]);
            average(p, at + 2 * p.stride_x, pair.v[1]);
        } else if (beside && fetch(p.slot + cell + step_y * p.gw + step_x) < 0) {
            average(p, image + (iy & ~1) * p.stride_y + ix * p.stride_x, pair.v[0]);
#pragma unroll
            for (int c = 0; c < 3; c++) pair.v[1][c] = pair.v[0][c];
        } else {
            pair = load_two(p, image + iy * p.stride_y + ix * p.stride_x);
        }
    }
    const long long high_area = (p.block + 6) * (p.block + 6), low_area = (half + 6) * (half + 6);
    const long long start = high ? stored * high_area : p.n_high * high_area + stored * low_area;
    scalar* out = p.out + (start + (long long)line * padded + x + 3) * 4;
#pragma unroll
    for (int i = 0; i < 2; i++)
        if ((unsigned)(x + 3 + i) < (unsigned)padded)
            *(uint2*)(out + 4 * i) = make_uint2(pack_pair(pair.v[i][0], pair.v[i][1]),
                                                pack_pair(pair.v[i][2], 0.f));
}
