// Batch norm in evaluation over a pixel buffer, and a ReLU behind it where `relu` is set.
//
//   x, out          (P, C), C a multiple of SB_VECTOR
//   mean, variance  (C), weight and bias (C) or null: SB_STATISTICS_HALF of x's type, else float32
//   SB_EXTENDED: out is extended (tables.cu), with the averages at the edges of high blocks, which are
//                all that low neighbours read; own: the row of each GEMM row
#include "dtypes.cuh"

#if SB_STATISTICS_HALF
typedef scalar statistic;
INLINE real value(statistic s) { return to_real(s); }
#else
typedef float statistic;
INLINE real value(statistic s) { return s; }
#endif

struct Arguments {
    const scalar* x;
    const statistic* mean;
    const statistic* variance;
    const statistic* weight;
    const statistic* bias;
    scalar* out;
#if SB_EXTENDED
    const int* own;
#endif
    long long vectors;
    int channels, relu;
    float eps;
#if SB_EXTENDED
    int high_rows, half, first;  // half the block; the thread block that the averages begin with
#endif
};

INLINE void load_affine(const Arguments& p, int column, real (&scale)[VECTOR], real (&shift)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        real w = p.weight ? value(p.weight[column + i]) : 1;
        scale[i] = w * rsqrtf(value(p.variance[column + i]) + p.eps);
        shift[i] = (p.bias ? value(p.bias[column + i]) : 0) - value(p.mean[column + i]) * scale[i];
    }
}

INLINE void apply(const Arguments& p, const real (&scale)[VECTOR], const real (&shift)[VECTOR],
                  real (&x)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        x[i] = x[i] * scale[i] + shift[i];
        if (p.relu && x[i] < 0) x[i] = 0;  // NaN stays
    }
}

#if SB_EXTENDED
// One quad of a high block, or the row of zeros behind the last, VECTOR channels of it. The pixels are
// computed again, as nobody waits here for those who store them.
INLINE void average_quad(const Arguments& p, int item) {
    int vectors = p.channels / VECTOR, quad = item / vectors, quads = p.high_rows / 4;
    int column = (item - quad * vectors) * VECTOR;
    if (quad > quads) return;
    int line = quad / p.half, x = quad - line * p.half, y = line % p.half;
    real mean[VECTOR] = {};
    if (quad < quads) {
        if (x && y && x < p.half - 1 && y < p.half - 1) return;
        real scale[VECTOR], shift[VECTOR];
        load_affine(p, column, scale, shift);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            real v[VECTOR];
            unpack(load(p.x + (long long)p.own[quad * 4 + r] * p.channels + column), v);
            apply(p, scale, shift, v);
            unpack(pack(v), v);  // as stored
#pragma unroll
            for (int i = 0; i < VECTOR; i++) mean[i] += real(0.25) * v[i];
        }
    }
    store(p.out + (p.vectors + (long long)quad * vectors) * VECTOR + column, pack(mean));
}
#endif

extern "C" __global__ void __launch_bounds__(256) normalise(const __grid_constant__ Arguments p) {
#if SB_EXTENDED
    int blocks = p.first;
    if (blockIdx.x >= blocks) return average_quad(p, (blockIdx.x - blocks) * 256 + threadIdx.x);
#else
    int blocks = gridDim.x;
#endif
    long long item = blockIdx.x * 256ll + threadIdx.x, step = blocks * 256ll;
    // The grid's stride is a multiple of the vectors in a row, so a thread keeps its channels.
    int column = (int)(item % (p.channels / VECTOR)) * VECTOR;
    real scale[VECTOR], shift[VECTOR];
    load_affine(p, column, scale, shift);
    for (; item < p.vectors; item += step) {
        real x[VECTOR];
        unpack(load(p.x + item * VECTOR), x);
        apply(p, scale, shift, x);
        store(p.out + item * VECTOR, pack(x));
    }
}
