// pixel_cross_entropy_tiles: pixel_cross_entropy_backward where the logits are enlarged by 2, 4 or
//   8: every output's share of the gradient is computed once a tile, for a few classes at a time.
//
// Cell (i, j) is the SB_SCALE x SB_SCALE outputs between logits i-1 and i down, j-1 and j across. A
// thread block owns the logits that only its own cells read. A thread takes columns of cells: it
// sums the column up into the logits above and below, its neighbours sum those up across, and what
// four cells have for a logit meets in shared memory. The order never changes; nothing is atomic.
#include "cross_entropy.cuh"

struct Params {
    const real* grad;
    const scalar* logits;
    const long long* labels;
    const real* log_sums;
    scalar* out;
    Maps of_grad;
    Images in;
    Maps of_labels;
    Images of_out;
    long long ignored;
    Sizes size;
    int tiles_x;
};

constexpr int THREADS = 512;
constexpr int CELLS_X = 16, LANES = CELLS_X * SB_SCALE, LINES = THREADS / LANES;
constexpr int HELD = SB_SCALE == 2 ? 1 : 2;  // columns of a thread, LINES cells apart
constexpr int CELLS_Y = LINES * HELD;
constexpr int OWN_X = CELLS_X - 1, OWN_Y = CELLS_Y - 1;    // logits; launched for tiles of these
constexpr int READ_X = CELLS_X + 1, READ_Y = CELLS_Y + 1;  // logits, clamped to the image
constexpr int CLASSES = 4;
// 8 more than a multiple of 32, so that classes and corners fall on different banks.
constexpr int READ = (READ_X * READ_Y + 23) / 32 * 32 + 8;
constexpr int PART = CELLS_X * CELLS_Y + 8, PARTS = 4 * PART + 8;
enum { UPPER_LEFT, UPPER_RIGHT, LOWER_LEFT, LOWER_RIGHT };

// One column of a cell.
struct Column {
    real pull[SB_SCALE];     // the gradient, 0 where there is none
    real log_sum[SB_SCALE];  // to base 2, infinite where there is none
    int label[SB_SCALE];
    bool top, bottom;  // of the image: there is no logit above, below
};

INLINE bool read_column(Column& column, const Params& p, int n, int cell, int x) {
    const Sizes& size = p.size;
    bool busy = false;
    column.top = cell == 0;
    column.bottom = cell == size.h;
#pragma unroll
    for (int k = 0; k < SB_SCALE; k++) {
        const int y = first_output(cell) + k;
        column.pull[k] = 0;
        column.log_sum[k] = infinity();  // a probability of 0, however large the logit
        column.label[k] = -1;
        if ((unsigned)y >= (unsigned)size.height || (unsigned)x >= (unsigned)size.width) continue;
        const long long label =
            __ldg(p.labels + n * (index_t)p.of_labels.n + y * (index_t)p.of_labels.y +
                  x * (index_t)p.of_labels.x);
        const real pull = __ldg(p.grad + n * (index_t)p.of_grad.n + y * (index_t)p.of_grad.y +
                                x * (index_t)p.of_grad.x);
        if (label == p.ignored || pull == 0) continue;
        column.pull[k] = pull;
        column.log_sum[k] =
            LOG2_E * __ldg(p.log_sums + ((index_t)n * size.height + y) * size.width + x);
        column.label[k] = (int)label;
        busy = true;
    }
    return busy;
}

// What a column has for the logits above and below it.
INLINE void sum_column(const Column& column, int c, real upper, real lower, real& above,
                       real& below) {
    above = below = 0;
#pragma unroll
    for (int k = 0; k < SB_SCALE; k++) {
        const real z = mix(upper, lower, fraction(k));
        real part = column.pull[k] * power_of_2(z - column.log_sum[k]);
        if (column.label[k] == c) part -= column.pull[k];
        above += (1 - fraction(k)) * part;
        below += fraction(k) * part;
    }
    if (column.top) {
        below += above;
        above = 0;
    }
    if (column.bottom) {
        above += below;
        below = 0;
    }
}

INLINE real exchange(real value, int distance) {
    return __shfl_xor_sync(0xffffffffu, value, distance);
}

// Sum over the SB_SCALE columns of a cell: each lane ends with one corner, or with two.
INLINE void store_cell(real* parts, int i, real above, real below, real right) {
    const bool low = i & 1, far = i & 2;
    real left_sum = low ? below : above, other = low ? above : below;
    real right_sum = left_sum * right;
    left_sum *= 1 - right;
    left_sum += exchange(other * (1 - right), 1);
    right_sum += exchange(other * right, 1);
    real* at = parts + (low ? LOWER_LEFT : UPPER_LEFT) * PART;
    if (SB_SCALE == 2) {
        at[0] = left_sum;
        at[PART] = right_sum;
        return;
    }
    real sum = far ? right_sum : left_sum;
    sum += exchange(far ? left_sum : right_sum, 2);
    if (SB_SCALE == 8) sum += exchange(sum, 4);
    if (i < 4) at[far ? PART : 0] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) pixel_cross_entropy_tiles(const Params p) {
    __shared__ real read[CLASSES * READ];
    __shared__ real parts[CLASSES * PARTS];
    const Sizes& size = p.size;
    const int n = blockIdx.x / size.blocks, tile = blockIdx.x - n * size.blocks;
    const int row = tile / p.tiles_x * OWN_Y, first = tile % p.tiles_x * OWN_X;
    const int thread = threadIdx.x, lane = thread % LANES, line = thread / LANES;
    const int j = lane / SB_SCALE, i = lane % SB_SCALE;
    const int x = first_output(first + j) + i;
    const real right = first + j == 0 ? real(1) : first + j == size.w ? real(0) : fraction(i);

    Column columns[HELD];
    bool busy[HELD];
#pragma unroll
    for (int h = 0; h < HELD; h++)
        busy[h] = __any_sync(0xffffffffu,
                             read_column(columns[h], p, n, row + line + h * LINES, x));

    const scalar* image = p.logits + n * (index_t)p.in.n;
    scalar* out = p.out + n * (index_t)p.of_out.n;
    for (int c = 0; c < size.classes; c += CLASSES) {
        for (int t = thread; t < CLASSES * READ_X * READ_Y; t += THREADS) {
            const int k = SB_LAST ? t % CLASSES : t / (READ_X * READ_Y);
            const int pixel = SB_LAST ? t / CLASSES : t % (READ_X * READ_Y);
            const int sy = min(max(row - 1 + pixel / READ_X, 0), size.h - 1);
            const int sx = min(max(first - 1 + pixel % READ_X, 0), size.w - 1);
            if (c + k < size.classes)
                read[k * READ + pixel] =
                    LOG2_E * to_real(__ldg(image + offset_of(p.in, c + k, sy, sx)));
        }
        __syncthreads();
        for (int k = 0; k < CLASSES && c + k < size.classes; k++) {
#pragma unroll
            for (int h = 0; h < HELD; h++) {
                const int cell = line + h * LINES;
                real above = 0, below = 0;
                if (busy[h]) {
                    const real* at = read + k * READ + cell * READ_X + j;
                    sum_column(columns[h], c + k, mix(at[0], at[1], right),
                               mix(at[READ_X], at[READ_X + 1], right), above, below);
                }
                store_cell(parts + k * PARTS + cell * CELLS_X + j, i, above, below, right);
            }
        }
        __syncthreads();
        for (int t = thread; t < CLASSES * OWN_X * OWN_Y; t += THREADS) {
            const int k = SB_LAST ? t % CLASSES : t / (OWN_X * OWN_Y);
            const int pixel = SB_LAST ? t / CLASSES : t % (OWN_X * OWN_Y);
            const int oy = pixel / OWN_X, ox = pixel % OWN_X;
            if (c + k >= size.classes || row + oy >= size.h || first + ox >= size.w) continue;
            const real* at = parts + k * PARTS + oy * CELLS_X + ox;
            const real sum = at[LOWER_RIGHT * PART] + at[LOWER_LEFT * PART + 1] +
                             at[UPPER_RIGHT * PART + CELLS_X] + at[UPPER_LEFT * PART + CELLS_X + 1];
            out[offset_of(p.of_out, c + k, row + oy, first + ox)] = to_scalar(sum);
        }
    }
}
