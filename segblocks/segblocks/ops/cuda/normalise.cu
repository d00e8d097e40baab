// Batch norm in evaluation over a pixel buffer, and a ReLU behind it where `relu` is set.
//
//   x, out          (P, C), C a multiple of SB_VECTOR
//   mean, variance  (C), weight and bias (C) or null: SB_STATISTICS_HALF of x's type, else float32
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
    long long vectors;
    int channels, relu;
    float eps;
};

extern "C" __global__ void __launch_bounds__(256) normalise(const __grid_constant__ Arguments p) {
    long long item = blockIdx.x * 256ll + threadIdx.x, step = gridDim.x * 256ll;
    // The grid's stride is a multiple of the vectors in a row, so a thread keeps its channels.
    int column = (int)(item % (p.channels / VECTOR)) * VECTOR;
    real scale[VECTOR], shift[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        real w = p.weight ? value(p.weight[column + i]) : 1;
        scale[i] = w * rsqrtf(value(p.variance[column + i]) + p.eps);
        shift[i] = (p.bias ? value(p.bias[column + i]) : 0) - value(p.mean[column + i]) * scale[i];
    }
    for (; item < p.vectors; item += step) {
        real x[VECTOR];
        unpack(load(p.x + item * VECTOR), x);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            x[i] = x[i] * scale[i] + shift[i];
            if (p.relu && x[i] < 0) x[i] = 0;  // NaN stays
        }
        store(p.out + item * VECTOR, pack(x));
    }
}
