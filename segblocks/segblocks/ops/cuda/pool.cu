// Max pooling 3×3, stride 2, padding 1 of both resolutions, through a neighbour table.
//
//   x      (extended rows, C) input; table (9, pitch) int32, zero: see tables.cu
//   own    (pitch) int32: buffer row of each GEMM row of the output
//   out    (extended rows, C), with the averages that low neighbours of the next layer read
//   averages  with SEPARATE, where x holds stored pixels only, or does not know: the rows that follow
//             them, wherever they are; out is extended as ever
//
// C is a multiple of 8. A thread does 8 channels of 4 GEMM rows, which in a high block are one quad:
// 25 different input pixels for its 36 taps. sm_80 and later.
#include "eight.cuh"
#include "follow.cuh"

#ifndef SB_SEPARATE
#define SB_SEPARATE 0
#endif

struct Arguments {
    const scalar* x;
    const int* table;
    const int* own;
    scalar* out;
#if SB_SEPARATE
    const scalar* averages;
#endif
    int zero, rows, high_rows, block, pitch, channels;
#if SB_SEPARATE
    int stored, padding;
#endif
};

// NaN wins, as in PyTorch.
INLINE unsigned larger_pair(unsigned a, unsigned b) {
    unsigned c;
#if SB_DTYPE == 1
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#endif
    return c;
}

INLINE uint4 larger(const uint4& a, const uint4& b) {
    return make_uint4(larger_pair(a.x, b.x), larger_pair(a.y, b.y), larger_pair(a.z, b.z),
                      larger_pair(a.w, b.w));
}

struct Reader {
    const Arguments& p;
    const scalar* x;  // from this thread's first channel on
    int4 rows[9];     // of each tap for the four GEMM rows

    // The input of one tap of one GEMM row; beyond the image lies -inf.
    INLINE uint4 at(int tap, int r) const {
        const int4& four = rows[tap];
        const int row = r == 0 ? four.x : r == 1 ? four.y : r == 2 ? four.z : four.w;
        const unsigned least = SB_DTYPE == 1 ? 0xff80ff80u : 0xfc00fc00u;
        if (row == p.zero) return make_uint4(least, least, least, least);
#if SB_SEPARATE
        if (row >= p.stored)
            return *(const uint4*)(p.averages + (x - p.x) +
                                   (long long)(row - p.stored) * p.channels);
#endif
        return *(const uint4*)(x + (long long)row * p.channels);
    }
};

// Columns of a line of input pixels, COUNT outputs of stride 2 beside one another, three taps each.
template <int COUNT> struct Line {
    uint4 best[COUNT];

    template <class At> INLINE explicit Line(const At& at) {
        uint4 v[2 * COUNT + 1];
#pragma unroll
        for (int i = 0; i <= 2 * COUNT; i++) v[i] = at(min(i / 2, COUNT - 1), i - 2 * min(i / 2, COUNT - 1));
#pragma unroll
        for (int i = 0; i < COUNT; i++) best[i] = larger(larger(v[2 * i], v[2 * i + 1]), v[2 * i + 2]);
    }
};

// A quad of a high block: five lines of five pixels.
INLINE void pool_quad(const Reader& reader, uint4 (&best)[4]) {
#pragma unroll
    for (int i = 0; i < 5; i++) {
        const int out = i >= 2, dy = i - 2 * out;  // an output row and its tap that read this line
        const Line<2> line([&](int column, int dx) { return reader.at(dy * 3 + dx, out * 2 + column); });
#pragma unroll
        for (int column = 0; column < 2; column++) {
            if (i <= 2) best[column] = i ? larger(best[column], line.best[column]) : line.best[column];
            if (i >= 2)
                best[2 + column] = i > 2 ? larger(best[2 + column], line.best[column]) : line.best[column];
        }
    }
}

// Four pixels of a line of a low block, or of any lines.
INLINE void pool_four(const Reader& reader, bool in_line, uint4 (&best)[4]) {
#pragma unroll
    for (int dy = 0; dy < 3; dy++) {
        uint4 line[4];
        if (in_line) {
            const Line<4> four([&](int column, int dx) { return reader.at(dy * 3 + dx, column); });
#pragma unroll
            for (int r = 0; r < 4; r++) line[r] = four.best[r];
        } else {
#pragma unroll
            for (int r = 0; r < 4; r++)
                line[r] = larger(larger(reader.at(dy * 3, r), reader.at(dy * 3 + 1, r)),
                                 reader.at(dy * 3 + 2, r));
        }
#pragma unroll
        for (int r = 0; r < 4; r++) best[r] = dy ? larger(best[r], line[r]) : line[r];
    }
}

extern "C" __global__ void __launch_bounds__(256) max_pool(const __grid_constant__ Arguments p) {
    follow();
    int chunks = p.channels / 8, item = blockIdx.x * 256 + threadIdx.x;
    int quad = item / chunks, column = (item - quad * chunks) * 8, m = quad * 4;
    if (quad == 0)
        *(uint4*)(p.out + (long long)(p.rows + p.high_rows / 4) * p.channels + column) =
            make_uint4(0, 0, 0, 0);
    if (m >= p.rows) return;
    Reader reader = {p, p.x + column, {}};
#pragma unroll
    for (int tap = 0; tap < 9; tap++)
        reader.rows[tap] = *(const int4*)(p.table + (long long)tap * p.pitch + m);
    const int4 own = *(const int4*)(p.own + m);
    uint4 best[4];
    if (m < p.high_rows)
        pool_quad(reader, best);
    else
        pool_four(reader, p.block % 8 == 0, best);
    const int rows[4] = {own.x, own.y, own.z, own.w};
    float mean[8] = {};
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if (m + r >= p.rows) break;  // whole quads of high blocks; the last low pixels may be fewer
        *(uint4*)(p.out + (long long)rows[r] * p.channels + column) = best[r];
        float v[8];
        unpack_eight(best[r], v);
#pragma unroll
        for (int i = 0; i < 8; i++) mean[i] += 0.25f * v[i];
    }
    if (m < p.high_rows)
        *(uint4*)(p.out + (long long)(p.rows + quad) * p.channels + column) = pack_eight(mean);
}

// What follows the stored pixels in an extended buffer: the averages of the high blocks and the row
// of zeros.
struct Averages {
    const scalar* x;
    const int* own;
    scalar* out;
    int high_rows, channels;
};

extern "C" __global__ void __launch_bounds__(256) averages(const __grid_constant__ Averages p) {
    follow();
    int chunks = p.channels / 8, item = blockIdx.x * 256 + threadIdx.x;
    int quad = item / chunks, column = item % chunks * 8, m = quad * 4;
    if (m > p.high_rows) return;
    float mean[8] = {};
    if (m < p.high_rows) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float v[8];
            unpack_eight(*(const uint4*)(p.x + (long long)p.own[m + r] * p.channels + column), v);
#pragma unroll
            for (int i = 0; i < 8; i++) mean[i] += 0.25f * v[i];
        }
    }
    *(uint4*)(p.out + (long long)quad * p.channels + column) = pack_eight(mean);
}
