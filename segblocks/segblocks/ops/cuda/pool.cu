// Max pooling 3×3, stride 2, padding 1 of both resolutions, through a neighbour table.
//
//   x      (extended rows, C) input; table (9, pitch) int32, zero: see tables.cu
//   own    (pitch) int32: buffer row of each GEMM row of the output
//   out    (extended rows, C), with the averages that low neighbours of the next layer read
//
// C is a multiple of 8. A thread does 8 channels of 4 GEMM rows, which in a high block are one quad.
#include "dtypes.cuh"

struct Arguments {
    const scalar* x;
    const int* table;
    const int* own;
    scalar* out;
    int zero, rows, high_rows, block, pitch, channels;
};

extern "C" __global__ void __launch_bounds__(256) max_pool(const __grid_constant__ Arguments p) {
    int chunks = p.channels / 8, item = blockIdx.x * 256 + threadIdx.x;
    int quad = item / chunks, column = item % chunks * 8, m = quad * 4;
    if (quad == 0)
        *(uint4*)(p.out + (long long)(p.rows + p.high_rows / 4) * p.channels + column) =
            make_uint4(0, 0, 0, 0);
    if (m >= p.rows) return;
    float mean[8] = {};
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if (m + r >= p.rows) break;
        float best[8];
#pragma unroll
        for (int i = 0; i < 8; i++) best[i] = -__int_as_float(0x7f800000);
#pragma unroll
        for (int tap = 0; tap < 9; tap++) {
            int row = p.table[tap * p.pitch + m + r];
            if (row == p.zero) continue;  // beyond the image lies -inf
            uint4 v = __ldg((const uint4*)(p.x + (long long)row * p.channels + column));
            unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float a, b;
                unpack_pair(w[j], a, b);
                // NaN wins, as in PyTorch.
                best[2 * j] = a > best[2 * j] || a != a ? a : best[2 * j];
                best[2 * j + 1] = b > best[2 * j + 1] || b != b ? b : best[2 * j + 1];
            }
        }
        uint4 packed = make_uint4(pack_pair(best[0], best[1]), pack_pair(best[2], best[3]),
                                  pack_pair(best[4], best[5]), pack_pair(best[6], best[7]));
        *(uint4*)(p.out + (long long)p.own[m + r] * p.channels + column) = packed;
#pragma unroll
        for (int i = 0; i < 8; i++) mean[i] += best[i];
    }
    if (m < p.high_rows) {
#pragma unroll
        for (int i = 0; i < 8; i++) mean[i] *= 0.25f;
        *(uint4*)(p.out + (long long)(p.rows + quad) * p.channels + column) =
            make_uint4(pack_pair(mean[0], mean[1]), pack_pair(mean[2], mean[3]),
                       pack_pair(mean[4], mean[5]), pack_pair(mean[6], mean[7]));
    }
}

// What follows the stored pixels in an extended buffer: the averages of the high blocks and the row
// of zeros.
struct Averages {
    const scalar* x;
    const int* own;
    scalar* out;
    int high_rows, channels;
};

extern "C" __global__ void __launch_bounds__(256) averages(const __grid_constant__ Averages p) {
    int chunks = p.channels / 8, item = blockIdx.x * 256 + threadIdx.x;
    int quad = item / chunks, column = item % chunks * 8, m = quad * 4;
    if (m > p.high_rows) return;
    float mean[8] = {};
    if (m < p.high_rows) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint4 v = *(const uint4*)(p.x + (long long)p.own[m + r] * p.channels + column);
            unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float a, b;
                unpack_pair(w[j], a, b);
                mean[2 * j] += 0.25f * a;
                mean[2 * j + 1] += 0.25f * b;
            }
        }
    }
    *(uint4*)(p.out + (long long)quad * p.channels + column) =
        make_uint4(pack_pair(mean[0], mean[1]), pack_pair(mean[2], mean[3]),
                   pack_pair(mean[4], mean[5]), pack_pair(mean[6], mean[7]));
}
