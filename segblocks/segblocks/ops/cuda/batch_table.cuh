// The end of a batch norm's statistics: one column of its table, and of the running statistics.
#pragma once
#include "affine.cuh"

// From the mean of so many rows and their mean squared distance from it. `p` has weight, bias,
// running_mean and running_var, each null where there is none, table, momentum and eps.
template <class Params>
INLINE void write_column(const Params& p, int channels, int column, double rows, double mean,
                         double variance) {
    const float invstd = (float)(1 / sqrt(variance + p.eps));
    const float scale = p.weight ? p.weight[column] * invstd : invstd;
    float* table = p.table + column;
    table[MEAN * (long long)channels] = (float)mean;
    table[INVSTD * (long long)channels] = invstd;
    table[SCALE * (long long)channels] = scale;
    table[SHIFT * (long long)channels] = fmaf(-(float)mean, scale, p.bias ? p.bias[column] : 0);
    const double stay = 1 - p.momentum;
    if (p.running_mean)
        p.running_mean[column] = (float)(stay * p.running_mean[column] + p.momentum * mean);
    if (p.running_var)
        p.running_var[column] =
            (float)(stay * p.running_var[column] + p.momentum * variance * (rows / (rows - 1)));
}

// The column of all rows, from those of each process: read(process, what) is their number, mean and
// 1 / standard deviation. `p` has `rows` of this process and the `share` of all that they are, too.
enum { ROWS, ROWS_MEAN, ROWS_INVSTD };

template <class Params, class Read>
INLINE void join_column(const Params& p, int processes, int channels, int column, const Read& read) {
    double rows = 0, mean = 0, variance = 0;
    for (int i = 0; i < processes; i++) {
        const double count = read(i, ROWS);
        rows += count;
        mean += count * read(i, ROWS_MEAN);
    }
    mean /= rows;
    for (int i = 0; i < processes; i++) {
        const double invstd = read(i, ROWS_INVSTD), distance = read(i, ROWS_MEAN) - mean;
        variance += read(i, ROWS) * (1 / (invstd * invstd) - p.eps + distance * distance);
    }
    write_column(p, channels, column, rows, mean, variance < 0 ? 0 : variance / rows);
    if (column == 0) *p.share = (float)(p.rows / rows);
}
