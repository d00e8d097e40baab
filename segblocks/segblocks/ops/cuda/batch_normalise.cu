// batch_normalise: pixels (P, C) and a batch norm's table (affine.cuh) -> x * scale + shift, (P, C), plus
//   an addend (P, C) or null, then a ReLU where `relu` is set: rounded once, at the end.
#include "affine.cuh"

struct Params {
    const scalar* x;
    const float* table;
    const scalar* addend;
    scalar* out;
    long long vectors;
    int channels, relu;
};

constexpr int AT_ONCE = 2;

extern "C" __global__ void __launch_bounds__(256) batch_normalise(const Params p) {
    const long long step = gridDim.x * 256ll;
    long long item = blockIdx.x * 256ll + threadIdx.x;
    // The grid's stride is a multiple of the vectors in a row, so a thread keeps its channels.
    Affine affine;
    affine.read(p.table, p.channels, (int)(item % (p.channels / VECTOR)) * VECTOR);
    for (; item < p.vectors; item += AT_ONCE * step) {
        vec held[AT_ONCE], more[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const long long at = (item + k * step) * VECTOR;
            if (item + k * step >= p.vectors) continue;
            held[k] = load(p.x + at);
            if (p.addend) more[k] = load(p.addend + at);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (item + k * step >= p.vectors) continue;
            float y[VECTOR];
            unpack(held[k], y);
            affine.apply(y);
            if (p.addend) add(y, more[k], 1);
            if (p.relu) rectify(y);
            store(p.out + (item + k * step) * VECTOR, pack(y));
        }
    }
}
