// batch_join: tables (W, 4, C) of the batch norms of W processes' pixels, float32, in place of the shift
// the number of their rows -> the table (4, C) of all rows, and the share of them that `rows` are.
//   weight, bias, running_mean, running_var: as in batch_statistics.cu.
#include "batch_table.cuh"

enum { ROWS = SHIFT };

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
    const auto read = [&](int process, int row) -> double {
        return p.tables[(4ll * process + row) * p.channels + column];
    };
    double rows = 0, mean = 0, variance = 0;
    for (int i = 0; i < p.processes; i++) {
        rows += read(i, ROWS);
        mean += read(i, ROWS) * read(i, MEAN);
    }
    mean /= rows;
    for (int i = 0; i < p.processes; i++) {
        const double invstd = read(i, INVSTD), distance = read(i, MEAN) - mean;
        variance += read(i, ROWS) * (1 / (invstd * invstd) - p.eps + distance * distance);
    }
    write_column(p, p.channels, column, rows, mean, variance < 0 ? 0 : variance / rows);
    if (column == 0) *p.share = (float)(p.rows / rows);
}
