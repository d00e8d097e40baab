// The image as padded blocks of four channels, which the first convolution reads in whole lines.
//
//   image  (N, 3, H, W), any strides (in elements)
//   out    high blocks (n_high, b+6, b+6, 4), then low blocks (n_low, b/2+6, b/2+6, 4)
//   cells  (N*gh*gw) int32, slot (N, gh, gw) int32
//   SB_PACKED: the three channels of a pixel and the pixels of a row lie side by side, rows aligned
//          to 16 bytes; pairs of pixels are then read with three accesses
//
// A padded pixel of a high block reads the full-resolution picture (a low neighbour's 2×2 averages,
// repeated), one of a low block the half-resolution picture. Beyond the image, and in the fourth
// channel, it is zero. The image itself is split on the way; nothing else reads its blocks.
#define SB_FOLLOWS
#include "padded.cuh"
#include "follow.cuh"

extern "C" __global__ void __launch_bounds__(256) split_padded(const __grid_constant__ Split p) {
    follow();
    split_two(p, blockIdx.x);
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
