// The image as padded blocks of four channels, which the first convolution reads in whole lines.
//
//   image  (N, 3, H, W), any strides (in elements); SB_IMAGE_HALF: of the output's type, else float32
//   out    high blocks (n_high, b+6, b+6, 4), then low blocks (n_low, b/2+6, b/2+6, 4)
//   cells  (N*gh*gw) int32, slot (N, gh, gw) int32
//
// A padded pixel of a high block reads the full-resolution picture (a low neighbour's 2×2 averages,
// repeated), one of a low block the half-resolution picture. Beyond the image, and in the fourth
// channel, it is zero. The image itself is split on the way; nothing else reads its blocks.
#include "dtypes.cuh"

#if SB_IMAGE_HALF
typedef scalar image_t;
INLINE float image_value(image_t v) { return to_real(v); }
#else
typedef float image_t;
INLINE float image_value(image_t v) { return v; }
#endif

struct Arguments {
    const image_t* image;
    scalar* out;
    const int* slot;
    const int* cells;
    long long stride_n, stride_c, stride_y, stride_x;
    int gh, gw, n_high, n_blocks, block, padding;
};

extern "C" __global__ void __launch_bounds__(256)
    split_padded(const __grid_constant__ Arguments p) {
    int stored = blockIdx.y;
    bool high = stored < p.n_high;
    int half = p.block / 2, side = high ? p.block : half, padded = side + 6;
    int pixel = blockIdx.x * 256 + threadIdx.x;
    if (pixel >= padded * padded) return;
    int cell = p.cells[stored], gx = cell % p.gw, gy = cell / p.gw % p.gh, n = cell / p.gw / p.gh;
    int y = pixel / padded - 3 + gy * side, x = pixel % padded - 3 + gx * side;
    float v[3] = {0, 0, 0};
    if (y >= 0 && x >= 0 && y < p.gh * side && x < p.gw * side) {
        bool average = true;
        if (high) {
            average = p.slot[(n * p.gh + y / side) * p.gw + x / side] < 0;
            if (average) y /= 2, x /= 2;
        }
        const image_t* at = p.image + n * p.stride_n;
#pragma unroll
        for (int c = 0; c < 3; c++, at += p.stride_c) {
            if (average) {
                const image_t* corner = at + 2 * y * p.stride_y + 2 * x * p.stride_x;
                v[c] = 0.25f * (image_value(corner[0]) + image_value(corner[p.stride_x]) +
                                image_value(corner[p.stride_y]) +
                                image_value(corner[p.stride_y + p.stride_x]));
            } else {
                v[c] = image_value(at[y * p.stride_y + x * p.stride_x]);
            }
        }
    }
    long long place = pixel;
    int high_area = (p.block + 6) * (p.block + 6), low_area = (half + 6) * (half + 6);
    place += high ? (long long)stored * high_area
                  : (long long)p.n_high * high_area + (long long)(stored - p.n_high) * low_area;
    *(uint2*)(p.out + place * 4) = make_uint2(pack_pair(v[0], v[1]), pack_pair(v[2], 0.f));
}

// For each GEMM row of the stem's output, the first padded pixel that its window reads, halved.
struct Places {
    int* table;
    int n_high, n_blocks, block, pitch;
};

extern "C" __global__ void __launch_bounds__(256) stem_places(const __grid_constant__ Places p) {
    int m = blockIdx.x * 256 + threadIdx.x;
    if (m >= p.pitch) return;
    int out = p.block / 2, half = p.block / 2, quarter = p.block / 4;
    int high_rows = p.n_high * out * out, rows = high_rows + (p.n_blocks - p.n_high) * quarter * quarter;
    int high_area = (p.block + 6) * (p.block + 6), low_area = (half + 6) * (half + 6), place = 0;
    if (m < high_rows) {
        int quad = m / 4, oh = out / 2, stored = quad / (oh * oh);
        int y = quad / oh % oh * 2 + m % 4 / 2, x = quad % oh * 2 + m % 2;
        place = stored * high_area + 2 * y * (p.block + 6) + 2 * x;
    } else if (m < rows) {
        int within = m - high_rows, stored = within / (quarter * quarter);
        int y = within / quarter % quarter, x = within % quarter;
        place = p.n_high * high_area + stored * low_area + 2 * y * (half + 6) + 2 * x;
    }
    p.table[m] = place / 2;
}
