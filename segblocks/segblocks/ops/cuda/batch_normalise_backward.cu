// batch_normalise_backward: gradient (P, C) of a batch norm's output, its input (P, C), its table
//   (affine.cuh) and what batch_gradient_sums made -> gradient (P, C) of the input,
//       scale * (dy - sum(dy) / P - xhat * sum(dy * xhat) / P),
//   and, unless `masked` is null, dy (P, C) behind the ReLU's mask: the gradient of an addend.
//
// Compile-time constants beside those of dtypes.cuh: SB_MASK as in batch_gradient_sums.cu.
#include "affine.cuh"

struct Params {
    const scalar* grad;
    const scalar* x;
    const float* table;
    const float* sums;
    const scalar* out;
    scalar* for_x;
    scalar* masked;
    long long vectors;
    int channels;
    float share;  // 1 / P
};

constexpr int AT_ONCE = 2;

extern "C" __global__ void __launch_bounds__(256) batch_normalise_backward(const Params p) {
    const long long step = gridDim.x * 256ll;
    long long item = blockIdx.x * 256ll + threadIdx.x;
    // The grid's stride is a multiple of the vectors in a row, so a thread keeps its channels.
    const int column = (int)(item % (p.channels / VECTOR)) * VECTOR;
    Affine affine;
    affine.read(p.table, p.channels, column);
    float mean[VECTOR], lower[VECTOR], slope[VECTOR];
    load_floats(p.table + column, mean);
    load_floats(p.table + INVSTD * (long long)p.channels + column, slope);
    load_floats(p.sums + column, lower);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        lower[i] *= p.share;
        slope[i] *= __ldg(p.sums + p.channels + column + i) * p.share;
    }
    for (; item < p.vectors; item += AT_ONCE * step) {
        vec grads[AT_ONCE], inputs[AT_ONCE], outputs[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const long long at = (item + k * step) * VECTOR;
            if (item + k * step >= p.vectors) continue;
            grads[k] = load(p.grad + at);
            inputs[k] = load(p.x + at);
            if (SB_MASK == 2) outputs[k] = load(p.out + at);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const long long at = (item + k * step) * VECTOR;
            if (item + k * step >= p.vectors) continue;
            float grad[VECTOR], x[VECTOR];
            unpack(grads[k], grad);
            unpack(inputs[k], x);
            if (SB_MASK == 1) {
                float y[VECTOR];
                unpack(inputs[k], y);
                affine.apply(y);
                mask(grad, pack(y));
            }
            if (SB_MASK == 2) mask(grad, outputs[k]);
            if (p.masked) store(p.masked + at, pack(grad));
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                x[i] = affine.scale[i] * (grad[i] - lower[i] - (x[i] - mean[i]) * slope[i]);
            store(p.for_x + at, pack(x));
        }
    }
}
