// pixel_cross_entropy: logits (N, C, h, w) and labels (N, H, W) -> losses (N, H, W) and the
//   logarithms of the sums of exponentials (N, H, W), both 0 where the label is `ignored` and NaN
//   where it is no class.
//
// A thread takes the outputs of one column that lie between the same four logits.
#include "cross_entropy.cuh"

struct Params {
    const scalar* logits;
    const long long* labels;
    real* losses;
    real* log_sums;
    Images in;
    Maps of_labels;
    long long ignored;
    Sizes size;
};

constexpr real LN_2 = 0.6931471805599453;
constexpr real LOWEST = SB_DTYPE == 3 ? -1.7e308 : -3.4e38;
constexpr int ROWS = SB_SCALE ? SB_SCALE : 1;
constexpr int CLASSES = 4;  // at a time: their loads overlap, and the maximum moves once for all

enum { IGNORED = -1, NO_CLASS = -2 };

INLINE real at_row(int k, real upper, real lower, real weight) {
    return SB_SCALE == 1 ? upper : mix(upper, lower, SB_SCALE ? fraction(k) : weight);
}

extern "C" __global__ void __launch_bounds__(256) pixel_cross_entropy(const Params p) {
    const Sizes& size = p.size;
    const int n = blockIdx.x / size.blocks, chunk = blockIdx.x - n * size.blocks;
    const index_t item = (index_t)chunk * 256 + threadIdx.x;
    const int line = (int)(item / size.width), x = (int)(item - (index_t)line * size.width);
    if (line >= (SB_SCALE > 1 ? size.h + 1 : size.height)) return;
    const int top = SB_SCALE > 1 ? first_output(line) : line;

    int label[ROWS];
    bool any = false;
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        label[k] = IGNORED;
        if ((unsigned)(top + k) >= (unsigned)size.height) continue;
        const long long id = __ldg(p.labels + n * (index_t)p.of_labels.n +
                                   (top + k) * (index_t)p.of_labels.y + x * (index_t)p.of_labels.x);
        if (id == p.ignored) continue;
        label[k] = id < 0 || id >= size.classes ? (int)NO_CLASS : (int)id;
        any = true;
    }

    Tap across{x, x, 0}, down{line, line, 0};
    if (SB_SCALE > 1) {
        const int cell = (x + SB_SCALE / 2) / ROWS;
        across = between(cell, size.w, fraction(x - first_output(cell)));
        down = between(line, size.h, 0);
    } else if (SB_SCALE == 0) {
        across = tap_of(x, size.w, size.width);
        down = tap_of(line, size.h, size.height);
    }
    const index_t stride = (index_t)p.in.c;
    const Corners from = corners_of(p.logits + n * (index_t)p.in.n, p.in, down, across);

    real most[ROWS], sum[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        most[k] = LOWEST;  // not -inf, which less itself is NaN
        sum[k] = 0;
    }
    for (int c = 0; any && c < size.classes; c += CLASSES) {
        real upper[CLASSES], lower[CLASSES];
#pragma unroll
        for (int j = 0; j < CLASSES; j++) {
            upper[j] = lower[j] = -infinity();
            if (c + j < size.classes) read_lines(from, (c + j) * stride, upper[j], lower[j]);
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            real z[CLASSES], now = most[k];
#pragma unroll
            for (int j = 0; j < CLASSES; j++) {
                // A class that does not exist stays -inf whatever the weight, even 0.
                z[j] = c + j < size.classes ? at_row(k, upper[j], lower[j], down.weight)
                                            : -infinity();
                now = larger(now, z[j]);
            }
            sum[k] *= power_of_2(most[k] - now);
            most[k] = now;
#pragma unroll
            for (int j = 0; j < CLASSES; j++) sum[k] += power_of_2(z[j] - now);
        }
    }

#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if ((unsigned)(top + k) >= (unsigned)size.height) continue;
        real loss = 0, log_sum = 0;
        if (label[k] == NO_CLASS) loss = log_sum = infinity() - infinity();
        if (label[k] >= 0) {
            real upper, lower;
            read_lines(from, label[k] * stride, upper, lower);
            const real log = log_2(sum[k]);
            // The maximum is taken off first: adding it would round a small loss away.
            loss = (most[k] - at_row(k, upper, lower, down.weight) + log) * LN_2;
            log_sum = (most[k] + log) * LN_2;
        }
        const index_t out = ((index_t)n * size.height + top + k) * size.width + x;
        p.losses[out] = loss;
        p.log_sums[out] = log_sum;
    }
}
