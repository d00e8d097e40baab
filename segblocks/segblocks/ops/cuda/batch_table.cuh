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
