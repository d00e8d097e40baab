// What patch_sm90.cu does with its sums: adds up the parts of the inner dimension, then bias, ReLU,
// a second affine and ReLU, and the averages of the high blocks. Sums stay in registers: a thread holds pairs
// of neighbouring pixels of two channels, and 8×8 matrices are turned round on the way out.
#pragma once
#include "turned.cuh"

// Sums of LINES lines of eight pixels: all of a tile (OWN), or half of one; STORED of them are wanted.
template <int LINES> constexpr bool OWN = LINES >= 16;
template <int LINES> constexpr int STORED = LINES == WOVEN_LINES ? 8 : LINES;
constexpr int MOST_LINES = SB_TRIPLES ? 24 : 16;
template <int LINES> INLINE constexpr int line_of(int stored) {
    return LINES == WOVEN_LINES && stored >= 4 ? stored + WOVEN_GAP : stored;
}

// Leaves the sum over all parts in `acc` of the part that arrives last, and says whether this is it.
// half: which of a shared tile, else 0.
template <int LINES>
INLINE bool add_parts(const Arguments& p, float (&acc)[4 * LINES], int index, int half,
                      const Share& share, int group, int* arrived) {
    int thread = threadIdx.x % 128, unit = index * (p.cout / 64) + share.slice;
    int* count = p.count + 2 * unit + half;
    constexpr int PART = MOST_LINES * 128;
    float4* work = (float4*)p.work + (long long)unit * p.parts * PART + half * (PART / 2) + thread;
#pragma unroll
    for (int i = 0; i < STORED<LINES>; i++) {
        int at = 4 * line_of<LINES>(i);
        __stcg(work + share.part * PART + i * 128,
               make_float4(acc[at], acc[at + 1], acc[at + 2], acc[at + 3]));
    }
    sync_threads(1 + group, 128);
    if (thread == 0) {  // the barrier and this order what all threads wrote before what others read
        *arrived = count_arrival(count);
        if (*arrived == p.parts - 1) *count = 0;
    }
    sync_threads(1 + group, 128);
    if (*arrived < p.parts - 1) return false;
    auto add = [&](const float4* from) {
#pragma unroll
        for (int i = 0; i < STORED<LINES>; i++) {
            int at = 4 * line_of<LINES>(i);
            float4 v = __ldcg(from + i * 128);
            acc[at] += v.x, acc[at + 1] += v.y, acc[at + 2] += v.z, acc[at + 3] += v.w;
        }
    };
    if (p.parts == 2) {  // a + b is b + a
        add(work + (1 - share.part) * PART);
        return true;
    }
#pragma unroll
    for (int i = 0; i < 4 * LINES; i++) acc[i] = 0;
    // In the order of the parts, so that the sum never depends on who was last.
    for (int part = 0; part < p.parts; part++) add(work + part * PART);
    return true;
}

// Where a thread's results go: for each stored line j the row of its pixel r, and for each eight
// averages the row of average r.
template <int COUNT> struct Rows {
    int pixels[COUNT], averages[COUNT / 4];
};

// The same, left in the copy of the table in shared memory: of three patches there are too many.
struct RowsElsewhere {
    unsigned pixels_at, averages_at;
};
INLINE int pixel_row(const RowsElsewhere& rows, int j) { return load_shared(rows.pixels_at + 32 * j); }
INLINE int average_row(const RowsElsewhere& rows, int j) { return load_shared(rows.averages_at + 32 * j); }
template <int COUNT> INLINE int pixel_row(const Rows<COUNT>& rows, int j) { return rows.pixels[j]; }
template <int COUNT> INLINE int average_row(const Rows<COUNT>& rows, int j) { return rows.averages[j]; }

INLINE RowsElsewhere rows_elsewhere(const Tile& tile, unsigned from) {
    unsigned r = threadIdx.x % 32 / 4;
    return {from + r * 4, from + (pixels_of(tile) + r) * 4};
}

// From the copy of the table in shared memory.
template <int COUNT>
INLINE Rows<COUNT> rows_of(const Arguments& p, const Tile& tile, unsigned from, int half) {
    Rows<COUNT> rows;
    int r = threadIdx.x % 32 / 4, skipped = 8 * COUNT * half, first = tile.first + skipped;
    unsigned averages = from + (pixels_of(tile) + skipped / 4) * 4;
    from += skipped * 4;
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        rows.pixels[j] = load_shared(from + (8 * j + r) * 4);
        if (tile.kind == ROWS && first + 8 * j + r >= p.at.rows) rows.pixels[j] = p.at.zero;
    }
#pragma unroll
    for (int j = 0; j < COUNT / 4; j++) {
        int m = first + 32 * j + 4 * r;
        rows.averages[j] = load_shared(averages + (8 * j + r) * 4);
        if (tile.kind == ROWS) rows.averages[j] = m < p.at.high_rows ? p.at.rows + m / 4 : -1;
    }
    return rows;
}

// The two output channels of a thread, the first of the four that it stores, and their parameters.
struct Channels {
    int column;
    float bias[2], scale[2], shift[2];
};

INLINE Channels channels_of(const Arguments& p, int slice) {
    Channels channels;
    int lane = threadIdx.x % 32, base = slice * 64 + threadIdx.x % 128 / 32 * 16;
    channels.column = base + lane % 4 * 4;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int channel = base + channel_of(lane) + 2 * k;
        channels.bias[k] = p.bias[channel];
        channels.scale[k] = SB_POST ? p.post[channel] : 0;
        channels.shift[k] = SB_POST ? p.post[p.cout_pad + channel] : 0;
    }
    return channels;
}

// Sums of the four pixels of two quads, of columns 2c and 2c + 1 of a matrix of eight averages. `acc`
// holds sums of two neighbouring pixels: of j in acc[4j], of the other channel in acc[4j + 2].
// SIZE: patches of the tile that take turns; 0: it is ROWS.
template <int SIZE, int SUMS>
INLINE float2 quads(const float (&acc)[SUMS], int group, int channel, int c) {
    int of = 2 * channel;
    if constexpr (SIZE > 0) {
        int upper = upper_line(SIZE, 2 * group), next = upper_line(SIZE, 2 * group + 1);
        return make_float2(acc[4 * upper + of] + acc[4 * (upper + SIZE) + of],
                           acc[4 * next + of] + acc[4 * (next + SIZE) + of]);
    } else {  // four consecutive pixels are a quad: each j holds two; c takes those of the c-th of four
        float2 found[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float sum = acc[4 * (4 * group + i) + of];
            float quad = sum + __shfl_xor_sync(0xffffffffu, sum, 1);
            float other = __shfl_xor_sync(0xffffffffu, quad, 2);
            found[i] = c < 2 ? make_float2(quad, other) : make_float2(other, quad);
        }
        return c == 0 ? found[0] : c == 1 ? found[1] : c == 2 ? found[2] : found[3];
    }
}

template <int SIZE, int LINES, class Where>
INLINE void store_averages(const Arguments& p, const float (&acc)[4 * LINES], const Where& rows,
                           int column, int c) {
    unsigned means[LINES / 4][2];
#pragma unroll
    for (int i = 0; i < LINES / 2; i++) {
        float2 sums = quads<SIZE>(acc, i / 2, i % 2, c);
        means[i / 2][i % 2] = pack_pair(0.25f * sums.x, 0.25f * sums.y);
    }
#pragma unroll
    for (int i = 0; i < LINES / 4; i++)
        means[i][0] = transpose(means[i][0]), means[i][1] = transpose(means[i][1]);
#pragma unroll
    for (int i = 0; i < LINES / 4; i++) {
        int row = average_row(rows, i);
        if (row >= 0)
            *(uint2*)(p.out + (long long)row * p.cout + column) = make_uint2(means[i][0], means[i][1]);
    }
}

template <int LINES, class Where>
INLINE void finish(const Arguments& p, float (&acc)[4 * LINES], const Tile& tile, const Where& rows,
                   const Channels& channels) {
    int c = threadIdx.x % 4, column = channels.column;
    bool high = tile.first < p.at.high_rows;  // some of its pixels at least
#pragma unroll
    for (int first = 0; first < STORED<LINES>; first += 4) {
        unsigned packed[4][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = 4 * line_of<LINES>(first + i);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float a = acc[at + 2 * k] + channels.bias[k];
                float b = acc[at + 2 * k + 1] + channels.bias[k];
                if (SB_RELU) a = fmaxf(a, 0.f), b = fmaxf(b, 0.f);
                if (SB_POST) {
                    a = fmaxf(a * channels.scale[k] + channels.shift[k], 0.f);
                    b = fmaxf(b * channels.scale[k] + channels.shift[k], 0.f);
                }
                acc[at + 2 * k] = a + b;
                packed[i][k] = pack_pair(a, b);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            packed[i][0] = transpose(packed[i][0]), packed[i][1] = transpose(packed[i][1]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = pixel_row(rows, first + i);
            if (row < p.at.rows)
                *(uint2*)(p.out + (long long)row * p.cout + column) =
                    make_uint2(packed[i][0], packed[i][1]);
        }
    }
    if constexpr (LINES != WOVEN_LINES) {
        if (!high) return;
        if constexpr (LINES % 12 == 0)
            store_averages<3, LINES>(p, acc, rows, column, c);
        else if (tile.kind == TALL)
            store_averages<1, LINES>(p, acc, rows, column, c);
        else if (tile.kind == PATCHES)
            store_averages<2, LINES>(p, acc, rows, column, c);
        else
            store_averages<0, LINES>(p, acc, rows, column, c);
    }
}
