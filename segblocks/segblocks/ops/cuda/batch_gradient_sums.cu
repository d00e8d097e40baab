// batch_gradient_sums: gradient (P, C) of a batch norm's output, its input (P, C) and its table ->
//   (2, C) float32: the gradients of bias and weight, which are the sums of dy and of dy * xhat.
//
// Compile-time constants beside those of dtypes.cuh:
//   SB_MASK  a ReLU followed. 0: none; 1: its mask is made again from the input; 2: read from its output
#include "columns.cuh"

struct Params {
    const scalar* grad;
    const scalar* x;
    const float* table;
    const scalar* out;
    float* sums;
    float* partials;
    long long stream;
    Columns columns;
};

constexpr int AT_ONCE = 2;  // rows of a thread

extern "C" __global__ void __launch_bounds__(THREADS, 3) batch_gradient_sums(const Params p) {
    __shared__ float all[2][VECTOR][THREADS];
    const Columns& c = p.columns;
    const Part part = my_part(c);
    const int thread = threadIdx.x;
    float sums[VECTOR] = {}, products[VECTOR] = {};
    if (part.busy) {
        float mean[VECTOR];
        load_floats(p.table + part.column, mean);
        Affine affine;
        if (SB_MASK == 1) affine.read(p.table, c.channels, part.column);
        for (long long row = part.first + part.line; row < part.end; row += AT_ONCE * c.lines) {
            vec grads[AT_ONCE], inputs[AT_ONCE], outputs[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const long long at = (row + k * c.lines) * c.channels + part.column;
                if (row + k * c.lines >= part.end) continue;
                grads[k] = load(p.grad + at);
                inputs[k] = load(p.x + at);
                if (SB_MASK == 2) outputs[k] = load(p.out + at);
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                if (row + k * c.lines >= part.end) continue;
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
#pragma unroll
                for (int i = 0; i < VECTOR; i++) {
                    sums[i] += grad[i];
                    products[i] = fmaf(grad[i], x[i] - mean[i], products[i]);
                }
            }
        }
    }
    const auto show = [&]() {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            all[0][i][thread] = sums[i];
            all[1][i][thread] = products[i];
        }
    };
    show();
    join_lines(c, part, [&](int other) {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            sums[i] += all[0][i][other];
            products[i] += all[1][i][other];
        }
        show();
    });
    leave(c, part, p.partials, sums, products);
    if (!is_last_to_arrive(p.stream)) return;
    join_parts(
        c, p.partials,
        [](int, float, float sum, float product, double (&sums)[2]) {
            sums[0] += sum;
            sums[1] += product;
        },
        [&](int column, float, const double (&sums)[2]) {
            p.sums[column] = (float)sums[0];
            p.sums[c.channels + column] =
                (float)(sums[1] * __ldg(p.table + INVSTD * (long long)c.channels + column));
        });
}
