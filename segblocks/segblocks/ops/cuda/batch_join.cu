// batch_join: tables (W, 4, C) of the batch norms of W processes' pixels, float32, in place of the shift
// the number of their rows -> the table (4, C) of all rows, and the share of them that `rows` are.
//   weight, bias, running_mean, running_var: as in batch_statistics.cu.
#include "batch_table.cuh"

struct Params {
    const float* tables;
    const float* weight;
    const float* bias;
    float* running_mean;
    float* running_var;
    float* table;
    float* share;
    int processes, channels;
    double rows, momentum, eps;
};

extern "C" __global__ void batch_join(const Params p) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.channels) return;
    const int place[] = {SHIFT, MEAN, INVSTD};
    join_column(p, p.processes, p.channels, column, [&](int process, int what) -> double {
        return p.tables[(4ll * process + place[what]) * p.channels + column];
    });
}
