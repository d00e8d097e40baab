// What a convolution does with its sums before it stores them: bias, addend (enlarged bilinearly or
// not), ReLU, a second affine and ReLU, and the averages of the high blocks. Included by
// conv_sm90.cu and conv_sm80.cu.
#pragma once
#include "gemm_rows.cuh"

// What tables say of a tile's rows: where each is stored, and with ADD 2 the four rows of the smaller buffer
// that the enlarged pixel lies between, the nearest first, then of the next line, column and both.
struct Places {
    int own[BM];
    int4 between[SB_ADD == 2 ? BM : 1];
};

// Of GEMM row m, in the smaller buffer, whose blocks have half the side. Beyond the image a position is
// clamped, axis by axis.
INLINE int4 look_between(const Arguments& p, int m) {
    int half = p.block / 2, shift = shift_of(half), near, y, x;
    if (m < p.high_rows) {
        Spot quad = spot_at(m / 4, half, shift);
        // The smaller buffer has quads of its own.
        near = quad.rank * half * half + (quad.y / 2 * (half / 2) + quad.x / 2) * 4 + quad.y % 2 * 2 +
               quad.x % 2;
        y = m & 2, x = m & 1;
    } else {
        Spot pixel = spot_at(m - p.high_rows, half, shift);
        near = p.up_high_rows + (pixel.rank * (half / 2) + pixel.y / 2) * (half / 2) + pixel.x / 2;
        y = pixel.y & 1, x = pixel.x & 1;
    }
    const int* table = p.up_table + 4 * p.up_pitch + near;
    int line = (y ? 3 : -3) * p.up_pitch, column = (x ? 1 : -1) * p.up_pitch;
    int at = read_ahead(table), at_y = read_ahead(table + line), at_x = read_ahead(table + column);
    int at_yx = read_ahead(table + line + column);
    if (at_yx == p.up_zero) at_yx = at_y == p.up_zero ? at_x : at_y;
    return {at, at_y == p.up_zero ? at : at_y, at_x == p.up_zero ? at : at_x,
            at_yx == p.up_zero ? at : at_yx};
}

// A row a thread. Before `follow`, but for a network's first convolution, which is the launch behind that of
// the tables.
INLINE void look_up_places(const Arguments& p, const Share& share, Places& places) {
    int row = threadIdx.x, m = share.tile_m * BM + row;
    if (row >= BM || m >= p.rows) return;
    places.own[row] = read_ahead(p.own + m);
    if (SB_ADD == 2) places.between[row] = look_between(p, m);
}

INLINE void add_row(uint4 v, float weight, float (&sum)[8]) {
    unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float a, b;
        unpack_pair(w[j], a, b);
        sum[2 * j] += weight * a;
        sum[2 * j + 1] += weight * b;
    }
}

// Enlarged pixels that a thread has under way, and rows that it finishes; narrow tiles have more threads
// on Hopper, with fewer registers.
constexpr int AT_ONCE = BN == 64 ? 1 : 2, ROWS_AT_ONCE = SB_ADD == 2 && BN == 64 ? 1 : 4;

// Eight channels of an enlarged pixel: its surroundings are asked for before the first is needed, as one
// takes as long to come as all of them.
struct Enlarged {
    uint4 near[4];

    INLINE void fetch(const Arguments& p, int4 between, int column) {
        int rows[4] = {between.x, between.y, between.z, between.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            near[i] = *(const uint4*)(p.addend + (long long)rows[i] * p.cout + column);
    }
    INLINE void add(float (&sum)[8]) const {
        add_row(near[0], 0.5625f, sum);
        add_row(near[1], 0.1875f, sum);
        add_row(near[2], 0.1875f, sum);
        add_row(near[3], 0.0625f, sum);
    }
};

INLINE void load_eight(const float* from, float (&v)[8]) {
    float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

INLINE uint4 pack_eight(const float (&v)[8]) {
    return make_uint4(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]),
                      pack_pair(v[6], v[7]));
}

// A ReLU that keeps NaN, as PyTorch's does.
INLINE float positive(float x) {
#ifdef __CUDA_ARCH__
    asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
    return x;
#else
    return x < 0 ? 0 : x;
#endif
}

// No more than `limit`; NaN stays.
INLINE float at_most(float x, float limit) {
#ifdef __CUDA_ARCH__
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
    return x;
#else
    return x > limit ? limit : x;
#endif
}

// Eight statistics of a batch norm; `absent` where there are none.
INLINE void load_statistics(const void* from, bool half, int column, float absent, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = absent;
    if (!from) return;
    if (half) {
        uint4 w = *(const uint4*)((const scalar*)from + column);
        unpack_pair(w.x, v[0], v[1]), unpack_pair(w.y, v[2], v[3]);
        unpack_pair(w.z, v[4], v[5]), unpack_pair(w.w, v[6], v[7]);
    } else {
        load_eight((const float*)from + column, v);
    }
}

// The batch norm of `sum + bias` as sum * scale + bias.
INLINE void fold_norm(const Arguments& p, int column, float (&scale)[8], float (&bias)[8]) {
    bool half = p.flags & 4;
    float v[8];
    load_statistics(p.variance, half, column, 1, v);
    load_statistics(p.gain, half, column, 1, scale);
#pragma unroll
    for (int i = 0; i < 8; i++) scale[i] *= rsqrtf(v[i] + p.eps);
    load_statistics(p.mean, half, column, 0, v);
#pragma unroll
    for (int i = 0; i < 8; i++) bias[i] = (bias[i] - v[i]) * scale[i];
    load_statistics(p.offset, half, column, 0, v);
#pragma unroll
    for (int i = 0; i < 8; i++) bias[i] += v[i];
}

// Bias, addend, activation, store and averages of 64 staged rows, in groups of four.
// row: the first of them in the tile, GEMM row m0.
// halves: the other warpgroup's share of the inner dimension is staged 64 rows further, to be added.
INLINE void finish(const Arguments& p, const float* staged, const Places& places, int row, int m0,
                   int tile_n, int thread, int threads, bool halves) {
    constexpr int CHUNKS = BN / 8;
    int chunk = thread % CHUNKS, column = tile_n * BN + chunk * 8;
    if (column >= p.cout) return;
    int half = p.block / 2, shift = shift_of(half);
    float bias[8], scale[8], offset[8];
    load_eight(p.bias + column, bias);
    const bool norm = SB_LATE && p.mean, add = SB_LATE ? p.addend != 0 : SB_ADD == 1;
    const bool relu = SB_LATE ? p.flags & 1 : SB_RELU;
    const bool averages = SB_LATE ? p.flags & 2 : SB_AVERAGES;
    if (norm) fold_norm(p, column, scale, bias);
    if (SB_POST) {
        load_eight(p.post + column, scale);
        load_eight(p.post + p.cout_pad + column, offset);
    }
    if (averages && m0 == 0 && thread < CHUNKS)
        *(uint4*)(p.out + (long long)(p.rows + p.high_rows / 4) * p.cout + column) =
            make_uint4(0, 0, 0, 0);
    for (int quad = thread / CHUNKS; quad < 16; quad += threads / CHUNKS) {
        int m = m0 + quad * 4;
        if (m >= p.rows) break;
        const int* rows = places.own + row + quad * 4;
        uint4 addend[4];
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (add && m + r < p.rows)
                addend[r] = *(const uint4*)(p.addend + (long long)rows[r] * p.cout + column);
        Enlarged enlarged[AT_ONCE];
        float mean[8] = {};
#pragma unroll ROWS_AT_ONCE
        for (int r = 0; r < 4; r++) {
            if (SB_ADD == 2 && r % AT_ONCE == 0) {
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if (m + r + i < p.rows)
                        enlarged[i].fetch(p, places.between[row + quad * 4 + r + i], column);
            }
            float v[8];
            load_eight(staged + (quad * 4 + r) * PITCH + chunk * 8, v);
            if (halves) {
                float w[8];
                load_eight(staged + (64 + quad * 4 + r) * PITCH + chunk * 8, w);
#pragma unroll
                for (int i = 0; i < 8; i++) v[i] += w[i];
            }
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = norm ? v[i] * scale[i] + bias[i] : v[i] + bias[i];
            if (add) {
                unsigned w[4] = {addend[r].x, addend[r].y, addend[r].z, addend[r].w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float a, b;
                    unpack_pair(w[j], a, b);
                    v[2 * j] += a;
                    v[2 * j + 1] += b;
                }
            }
            if (SB_ADD == 2) enlarged[r % AT_ONCE].add(v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (relu) v[i] = positive(v[i]);
                if (SB_RELU == 2) v[i] = at_most(v[i], p.limit);
                if (SB_POST) v[i] = fmaxf(v[i] * scale[i] + offset[i], 0.f);
                mean[i] += v[i];
            }
            if (m + r < p.rows)
                *(uint4*)(p.out + (long long)rows[r] * p.cout + column) = pack_eight(v);
        }
        if (averages && m < p.high_rows) {
            int q = m / 4;
            auto [stored, y, x] = spot_at(q, half, shift);
            if (y == 0 || y == half - 1 || x == 0 || x == half - 1) {
#pragma unroll
                for (int i = 0; i < 8; i++) mean[i] *= 0.25f;
                *(uint4*)(p.out + (long long)(p.rows + q) * p.cout + column) = pack_eight(mean);
            }
        }
    }
}
