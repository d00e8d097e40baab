// batch_statistics: pixels (P, C) -> the table (4, C) of a batch norm in training, float32 (affine.cuh).
//   weight and bias (C) or null, float32. running_mean and running_var (C) or null, float32, are moved
//   towards the mean and the unbiased variance by `momentum`.
//
// Means and squared distances from them are joined as by Chan, Golub and LeVeque, "Updating formulae and
// a pairwise algorithm for computing sample variances" (1979): nothing is lost where the mean is large.
#include "batch_table.cuh"
#include "columns.cuh"

struct Params {
    const scalar* x;
    const float* weight;
    const float* bias;
    float* running_mean;
    float* running_var;
    float* table;
    float* partials;
    long long stream;
    Columns columns;
    double momentum, eps;
};

constexpr int AT_ONCE = 4;  // rows of a thread

// Of so many rows: their mean, and the sum of squared distances from it.
struct Moments {
    float mean[VECTOR], squares[VECTOR];
    int count;
};

INLINE void take_in(Moments& m, int i, float mean, float squares, float before, float share) {
    const float distance = mean - m.mean[i];
    m.mean[i] = fmaf(distance, share, m.mean[i]);
    m.squares[i] += squares + distance * before * share * distance;  // 0 of infinite squares
}

// The N rows from `at` on that lie `step` elements apart.
template <int N> INLINE void take_rows(Moments& m, const scalar* at, long long step) {
    vec held[N];
#pragma unroll
    for (int k = 0; k < N; k++) held[k] = load(at + k * step);
    float value[N][VECTOR];
#pragma unroll
    for (int k = 0; k < N; k++) unpack(held[k], value[k]);
    const float before = m.count;
    m.count += N;
    const float share = N / (float)m.count;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        float sum = 0, squares = 0;
#pragma unroll
        for (int k = 0; k < N; k++) sum += value[k][i];
        const float mean = sum / N;
#pragma unroll
        for (int k = 0; k < N; k++)
            squares = fmaf(value[k][i] - mean, value[k][i] - mean, squares);
        take_in(m, i, mean, squares, before, share);
    }
}

INLINE Moments moments_of_thread(const Params& p, const Part& part) {
    Moments m = {};
    if (!part.busy) return m;
    const Columns& c = p.columns;
    const long long step = (long long)c.lines * c.channels;
    long long row = part.first + part.line;
    const scalar* at = p.x + row * c.channels + part.column;
    for (; row + (AT_ONCE - 1) * c.lines < part.end; row += AT_ONCE * c.lines) {
        take_rows<AT_ONCE>(m, at, step);
        at += AT_ONCE * step;
    }
    for (; row < part.end; row += c.lines) {
        take_rows<1>(m, at, step);
        at += step;
    }
    return m;
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) batch_statistics(const Params p) {
    __shared__ float means[VECTOR][THREADS], squares[VECTOR][THREADS];
    __shared__ int counts[THREADS];
    const Columns& c = p.columns;
    const Part part = my_part(c);
    const int thread = threadIdx.x;
    Moments m = moments_of_thread(p, part);
    const auto show = [&]() {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            means[i][thread] = m.mean[i];
            squares[i][thread] = m.squares[i];
        }
        counts[thread] = m.count;
    };
    show();
    join_lines(c, part, [&](int other) {
        const int more = counts[other];
        if (!more) return;
        const float before = m.count;
        m.count += more;
        const float share = more / (float)m.count;
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            take_in(m, i, means[i][other], squares[i][other], before, share);
        show();
    });
    leave(c, part, p.partials, m.mean, m.squares);
    if (!is_last_to_arrive(p.stream)) return;
    // Relative to the mean of the first part, which is near all others.
    join_parts(
        c, p.partials,
        [&](int k, float first, float mean, float square, double (&sums)[2]) {
            const long long left = c.rows - k * c.per_block;
            const double n = left < c.per_block ? left : c.per_block;
            const double distance = (double)mean - first;
            sums[0] += n * distance;
            sums[1] += square + n * distance * distance;
        },
        [&](int column, float first, const double (&sums)[2]) {
            const double moved = sums[0] / c.rows, left = sums[1] - sums[0] * moved;
            const double variance = left < 0 ? 0 : left / c.rows;
            write_column(p, c.channels, column, c.rows, first + moved, variance);
        });
}
