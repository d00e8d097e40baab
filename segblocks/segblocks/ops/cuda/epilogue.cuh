// What a convolution does with its sums before it stores them: bias, addend (enlarged bilinearly or
// not), ReLU, a second affine and ReLU, and the averages of the high blocks. Included by
// conv_sm90.cu and conv_sm80.cu.
#pragma once
#include "gemm_rows.cuh"

INLINE void add_row(const scalar* from, float weight, float (&sum)[8]) {
    uint4 v = *(const uint4*)from;
    unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float a, b;
        unpack_pair(w[j], a, b);
        sum[2 * j] += weight * a;
        sum[2 * j + 1] += weight * b;
    }
}

// The rows that the bilinear ×2 of a buffer at half the block side reads for a high quad: of a pixel of
// the smaller buffer and its neighbours, line by line. Beyond the image the position is clamped, axis by
// axis.
INLINE void look_around(const Arguments& p, int quad, int shift, int (&at)[9]) {
    int half = p.block / 2;
    auto [stored, y, x] = spot_at(quad, half, shift);
    // The smaller buffer's own quads: its GEMM row of pixel (y, x).
    int near = stored * half * half + (y / 2 * (half / 2) + x / 2) * 4 + y % 2 * 2 + x % 2;
#pragma unroll
    for (int tap = 0; tap < 9; tap++) at[tap] = p.up_table[tap * p.up_pitch + near];
#pragma unroll
    for (int tap = 0; tap < 9; tap += 2) {
        int beside = at[3 + tap % 3], above = at[tap / 3 * 3 + 1];
        if (tap != 4 && at[tap] == p.up_zero) at[tap] = above == p.up_zero ? beside : above;
    }
#pragma unroll
    for (int tap = 0; tap < 9; tap++) at[tap] = at[tap] == p.up_zero ? at[4] : at[tap];
}

// Eight channels of the enlarged pixel between four of the smaller buffer, of which `at` is nearest.
INLINE void add_enlarged(const Arguments& p, int at, int at_y, int at_x, int at_yx, int column,
                         float (&sum)[8]) {
    add_row(p.addend + (long long)at * p.cout + column, 0.5625f, sum);
    add_row(p.addend + (long long)at_y * p.cout + column, 0.1875f, sum);
    add_row(p.addend + (long long)at_x * p.cout + column, 0.1875f, sum);
    add_row(p.addend + (long long)at_yx * p.cout + column, 0.0625f, sum);
}
// Of pixel r of a high quad.
INLINE void add_enlarged(const Arguments& p, const int (&at)[9], int r, int column, float (&sum)[8]) {
    int y = r & 2 ? 3 : -3, x = r & 1 ? 1 : -1;
    add_enlarged(p, at[4], at[4 + y], at[4 + x], at[4 + y + x], column, sum);
}
// Of the pixel at GEMM row m, of a low block.
INLINE void add_enlarged(const Arguments& p, int m, int column, int shift, float (&sum)[8]) {
    int half = p.block / 2;
    auto [stored, y, x] = spot_at(m - p.high_rows, half, shift);
    int near = p.up_high_rows + (stored * (half / 2) + y / 2) * (half / 2) + x / 2;
    int step_y = y & 1 ? 3 : -3, step_x = x & 1 ? 1 : -1;
    const int* table = p.up_table + 4 * p.up_pitch + near;
    int at = table[0], at_y = table[step_y * p.up_pitch], at_x = table[step_x * p.up_pitch];
    int at_yx = table[(step_y + step_x) * p.up_pitch];
    if (at_yx == p.up_zero) at_yx = at_y == p.up_zero ? at_x : at_y;
    if (at_yx == p.up_zero) at_yx = at;
    if (at_y == p.up_zero) at_y = at;
    if (at_x == p.up_zero) at_x = at;
    add_enlarged(p, at, at_y, at_x, at_yx, column, sum);
}

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
// halves: the other warpgroup's share of the inner dimension is staged 64 rows further, to be added.
INLINE void finish(const Arguments& p, const float* staged, int m0, int tile_n, int thread,
                   int threads, bool halves) {
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
        int4 own = *(const int4*)(p.own + m);
        int rows[4] = {own.x, own.y, own.z, own.w};
        uint4 addend[4];
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (add && m + r < p.rows)
                addend[r] = *(const uint4*)(p.addend + (long long)rows[r] * p.cout + column);
        int around[9];
        const bool high = m < p.high_rows;
        if (SB_ADD == 2 && high) look_around(p, m / 4, shift, around);
        float mean[8] = {};
#pragma unroll
        for (int r = 0; r < 4; r++) {
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
            if (SB_ADD == 2 && high)
                add_enlarged(p, around, r, column, v);
            else if (SB_ADD == 2)
                add_enlarged(p, min(m + r, p.rows - 1), column, shift, v);
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
        if (averages && high) {
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
