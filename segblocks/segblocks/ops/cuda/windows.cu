// gather_windows: padded blocks (P', C) -> (P, taps, C), what the window of each output reads.
// sum_windows: its gradient, by gathering.
//
// A thread block takes one row of the result. Compile-time constants: those of dtypes.cuh.
#include "dtypes.cuh"

struct Params {
    const scalar* in;
    scalar* out;
    int n_high, block, more_y, more_x, side;
    int kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x;
    int channels;
};

// A position in a buffer of blocks, of `side` a side if high, with `more_y` and `more_x` pixels more.
struct Spot {
    bool high;
    int k, y, x;  // the block among those of its resolution
};

INLINE Spot spot(int row, int n_high, int side, int more_y, int more_x) {
    const int high = n_high * (side + more_y) * (side + more_x);
    Spot s;
    s.high = row < high;
    const int b = s.high ? side : side / 2, width = b + more_x, area = (b + more_y) * width;
    const int r = s.high ? row : row - high;
    s.k = r / area;
    s.y = (r - s.k * area) / width;
    s.x = r - s.k * area - s.y * width;
    return s;
}

// First row of the same block in such a buffer.
INLINE long long first_row(const Spot& s, int n_high, int side, int more_y, int more_x) {
    const int b = s.high ? side : side / 2;
    const long long before = s.high ? 0 : (long long)n_high * (side + more_y) * (side + more_x);
    return before + (long long)s.k * (b + more_y) * (b + more_x);
}

extern "C" __global__ void __launch_bounds__(256) gather_windows(const Params p) {
    const Spot s = spot(blockIdx.x, p.n_high, p.side, 0, 0);
    const int width = (s.high ? p.block : p.block / 2) + p.more_x;
    const int vectors = p.channels / VECTOR, total = p.kernel_y * p.kernel_x * vectors;
    const long long first = first_row(s, p.n_high, p.block, p.more_y, p.more_x) +
                            (s.y * p.stride_y) * width + s.x * p.stride_x;
    scalar* out = p.out + (long long)blockIdx.x * total * VECTOR;
    for (int t = threadIdx.x; t < total; t += blockDim.x) {
        const int tap = t / vectors, v = t - tap * vectors;
        const int ky = tap / p.kernel_x, kx = tap - ky * p.kernel_x;
        const long long row = first + ky * p.dilation_y * width + kx * p.dilation_x;
        store(out + t * VECTOR, load(p.in + row * p.channels + v * VECTOR));
    }
}

extern "C" __global__ void __launch_bounds__(256) sum_windows(const Params p) {
    const Spot s = spot(blockIdx.x, p.n_high, p.block, p.more_y, p.more_x);
    const int side = s.high ? p.side : p.side / 2, taps = p.kernel_y * p.kernel_x;
    const long long first = first_row(s, p.n_high, p.side, 0, 0);
    for (int v = threadIdx.x; v < p.channels / VECTOR; v += blockDim.x) {
        real sum[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sum[i] = 0;
        for (int ky = 0; ky < p.kernel_y; ky++) {
            const int dy = s.y - ky * p.dilation_y, y = dy / p.stride_y;
            if (dy < 0 || y * p.stride_y != dy || y >= side) continue;
            for (int kx = 0; kx < p.kernel_x; kx++) {
                const int dx = s.x - kx * p.dilation_x, x = dx / p.stride_x;
                if (dx < 0 || x * p.stride_x != dx || x >= side) continue;
                const long long row = (first + y * side + x) * taps + ky * p.kernel_x + kx;
                add(sum, load(p.in + row * p.channels + v * VECTOR), 1);
            }
        }
        store(p.out + ((long long)blockIdx.x * p.channels + v * VECTOR), pack(sum));
    }
}
