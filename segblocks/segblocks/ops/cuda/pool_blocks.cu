// pool_blocks: max pooling of blocks with what lies around them, in training. pixels (P, C) at block
//   side b -> out (P', C) and taps (P', C) uint8 at block side b / stride. A tap is the position in
//   the window, row by row, of the value that won: the first of equals, and the last NaN, as in
//   PyTorch. Around a block lies what blockpad gives it, but no padded copy is made.
// pool_blocks_backward: gradient of out -> gradient of the pixels, by gathering: a pixel visits the
//   few windows that contain it. No atomics, so it repeats bit for bit.
//
// Compile-time constants beside those of dtypes.cuh:
//   SB_KERNEL_Y, SB_KERNEL_X      the window, at most 256 taps
//   SB_DILATION_Y, SB_DILATION_X
//   SB_STRIDE                     the same in both directions
#include "lookup.cuh"

struct Params {
    const scalar* in;
    scalar* out;
    unsigned char* taps;
    const int* slot;
    const int* cells;
    double fill;
    Place place;  // of the pixels
    int left, right, top, bottom, replicate;
    Divider by_block, by_half;  // sides of a high and of a low block
    Divider by_out, by_out_half;  // and of those of the output
};

constexpr int KY = SB_KERNEL_Y, KX = SB_KERNEL_X, DY = SB_DILATION_Y, DX = SB_DILATION_X;
constexpr int STRIDE = SB_STRIDE, REACH_Y = DY * (KY - 1), REACH_X = DX * (KX - 1);
constexpr int WINDOWS_Y = REACH_Y / STRIDE + 1, WINDOWS_X = REACH_X / STRIDE + 1;
constexpr int UNROLL_TAPS = KY * KX <= 9 ? 3 : 1;
constexpr int UNROLL_WINDOWS = WINDOWS_Y * WINDOWS_X <= 9 ? 3 : 1;

template <int BYTES> struct Bytes { typedef typename Raw<BYTES>::type type; };
template <> struct Bytes<1> { typedef unsigned char type; };

// The taps of one vector.
union Taps {
    Bytes<VECTOR>::type v;
    unsigned char tap[VECTOR];
};

template <bool HIGH> INLINE index_t first_output(const Params& p, int k) {
    return first_pixel<HIGH>(p.place, k) / (STRIDE * STRIDE);
}

// at(ky, kx) fetches one vector of the window.
template <class At> INLINE void pool_window(real (&best)[VECTOR], Taps& taps, const At& at) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        best[i] = -__int_as_float(0x7f800000);
        taps.tap[i] = 0;
    }
#pragma unroll UNROLL_TAPS
    for (int ky = 0; ky < KY; ky++)
#pragma unroll UNROLL_TAPS
        for (int kx = 0; kx < KX; kx++) {
            real value[VECTOR];
            unpack(at(ky, kx), value);
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                if (value[i] > best[i] || value[i] != value[i]) {
                    best[i] = value[i];
                    taps.tap[i] = (unsigned char)(ky * KX + kx);
                }
        }
}

template <bool HIGH> INLINE void pool(const Params& p, const Work& w) {
    const Divider& by_width = HIGH ? p.by_out : p.by_out_half;
    const int out_side = by_width.divisor, id = w.chunk * (int)blockDim.x + threadIdx.x;
    if (id >= out_side * out_side * p.place.vectors) return;
    const Position at = position(id, p.place.by_vectors, by_width);
    const int side = side_of<HIGH>(p.place), channels = p.place.channels;
    const int y = at.y * STRIDE - p.top, x = at.x * STRIDE - p.left;
    const scalar* own = p.in + first_pixel<HIGH>(p.place, w.k) * channels + at.v * VECTOR;
    const auto inside = [&](int row, int column) {
        return load(own + (index_t)(row * side + column) * channels);
    };
    real best[VECTOR];
    Taps taps;
    if (y >= 0 && x >= 0 && y + REACH_Y < side && x + REACH_X < side) {
        pool_window(best, taps, [&](int ky, int kx) { return inside(y + ky * DY, x + kx * DX); });
    } else {
        const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
        pool_window(best, taps, [&](int ky, int kx) {
            const int row = y + ky * DY, column = x + kx * DX;
            if ((unsigned)row < (unsigned)side && (unsigned)column < (unsigned)side)
                return inside(row, column);
            return look_up<HIGH>(p, cell, row, column, at.v);
        });
    }
    const index_t to = first_output<HIGH>(p, w.k) * channels + (index_t)id * VECTOR;
    store(p.out + to, pack(best));
    *reinterpret_cast<Bytes<VECTOR>::type*>(p.taps + to) = taps.v;
}

extern "C" __global__ void __launch_bounds__(256) pool_blocks(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        pool<true>(p, w);
    else
        pool<false>(p, w);
}

// The outputs first..last whose windows span a row (or column) of a padded block.
struct Range {
    int first, last;
};

INLINE Range windows_over(int at, int reach, int outputs) {
    const int first = at > reach ? (at - reach + STRIDE - 1) / STRIDE : 0;
    return {first, at < 0 ? -1 : min(at / STRIDE, outputs - 1)};
}

// Adds the gradient of padded pixel (row, column) of stored block k: that of the windows it won.
template <bool HIGH>
INLINE void gather_windows(real (&sum)[VECTOR], const Params& p, int k, int row, int column, int v,
                           real weight) {
    const int side = (HIGH ? p.by_out : p.by_out_half).divisor;
    const Range ys = windows_over(row, REACH_Y, side), xs = windows_over(column, REACH_X, side);
    const index_t start = first_output<HIGH>(p, k) * p.place.channels + v * VECTOR;
#pragma unroll UNROLL_WINDOWS
    for (int i = 0; i < WINDOWS_Y; i++) {
        const int y = ys.first + i, dy = row - y * STRIDE;
        if (y > ys.last || dy % DY) continue;
#pragma unroll UNROLL_WINDOWS
        for (int j = 0; j < WINDOWS_X; j++) {
            const int x = xs.first + j, dx = column - x * STRIDE;
            if (x > xs.last || dx % DX) continue;
            const int tap = dy / DY * KX + dx / DX;
            const index_t from = start + (index_t)(y * side + x) * p.place.channels;
            Taps taps;
            taps.v = __ldg(reinterpret_cast<const Bytes<VECTOR>::type*>(p.taps + from));
            real grad[VECTOR];
            unpack(load(p.in + from), grad);
#pragma unroll
            for (int c = 0; c < VECTOR; c++)
                if (taps.tap[c] == tap) sum[c] += weight * grad[c];
        }
    }
}

template <bool HIGH> INLINE void pool_backward(const Params& p, const Work& w) {
    const int side = side_of<HIGH>(p.place), id = w.chunk * (int)blockDim.x + threadIdx.x;
    if (id >= side * side * p.place.vectors) return;
    const Position at = position(id, p.place.by_vectors, by_side<HIGH>(p));
    real sum[VECTOR];
    clear(sum);
    if (read_by_own_alone<HIGH>(p, at.y, at.x)) {
        gather_windows<HIGH>(sum, p, w.k, at.y + p.top, at.x + p.left, at.v, real(1));
    } else {
        const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
        for_each_reader<HIGH>(p, cell, at.y, at.x, [&](bool high, int s, int row, int column, real weight) {
            if (high)
                gather_windows<true>(sum, p, s, row, column, at.v, weight);
            else
                gather_windows<false>(sum, p, p.place.n_high - 1 - s, row, column, at.v, weight);
        });
    }
    const index_t to = first_pixel<HIGH>(p.place, w.k) * p.place.channels + (index_t)id * VECTOR;
    store(p.out + to, pack(sum));
}

extern "C" __global__ void __launch_bounds__(256) pool_blocks_backward(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        pool_backward<true>(p, w);
    else
        pool_backward<false>(p, w);
}
