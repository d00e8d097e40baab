// What a batch norm in training makes of a pixel. Whoever makes it again, for a padded copy or for the
// ReLU's mask, gets the same bits. For storage types whose arithmetic is in float32.
#pragma once
#include "dtypes.cuh"

// Rows of a batch norm's table (4, C): a pixel x becomes x * scale + shift.
enum { MEAN, INVSTD, SCALE, SHIFT };

// VECTOR numbers of a row of C, from a column that is a multiple of VECTOR; tables begin on 16 bytes.
INLINE void load_floats(const float* at, float (&x)[VECTOR]) {
#if SB_VECTOR % 4 == 0
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(at + i));
        x[i] = v.x;
        x[i + 1] = v.y;
        x[i + 2] = v.z;
        x[i + 3] = v.w;
    }
#else
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = __ldg(at + i);
#endif
}

struct Affine {
    float scale[VECTOR], shift[VECTOR];

    INLINE void read(const float* table, int channels, int column) {
        load_floats(table + SCALE * (long long)channels + column, scale);
        load_floats(table + SHIFT * (long long)channels + column, shift);
    }

    INLINE void apply(float (&x)[VECTOR]) const {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) x[i] = fmaf(x[i], scale[i], shift[i]);
    }
};

INLINE void rectify(float (&x)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = x[i] < 0 ? 0 : x[i];  // NaN stays
}

// Sets to 0 the gradients that a ReLU holds back; `y` is its output, or its input, as stored.
INLINE void mask(float (&grad)[VECTOR], vec y) {
    float value[VECTOR];
    unpack(y, value);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) grad[i] = value[i] <= 0 ? 0 : grad[i];
}
