// What a dense excursion does besides convolving: averages over bins that feed a 1×1 convolution,
// and the way back to blocks. Half precision.
//
//   pooled_conv     for up to four levels: x averaged over rows × columns bins per image (adaptive:
//                   bin i of n begins at floor(i·size/n) and ends at ceil((i+1)·size/n)), optionally
//                   relu(mean * scale + shift), then weights, bias and optionally ReLU
//     x        (N, h, w, pitch), pitch the channels rounded up to 8, at most MOST_CHANNELS
//     weights  (cout, pitch); bias (cout), pre (2, pitch) or none: float32
//     out      (N, rows, columns, out_pitch), pitch the output channels rounded up to 8
//   split_extended  an image with adjacent channels (a multiple of 8) as an extended buffer of both
//                   resolutions; see tables.cu
#include "eight.cuh"
#include "follow.cuh"

constexpr int MOST_CHANNELS = 2048;

struct Level {
    const scalar* weights;
    const float* bias;
    const float* pre;
    scalar* out;
    int rows, columns, cout, out_pitch, relu, first;  // first: thread block that begins the level
};

struct PoolArguments {
    const scalar* x;
    Level levels[4];
    int count, n, height, width, pitch, reserved;
};

// One thread block does one bin: 256 threads share its pixels by chunks of 8 channels.
extern "C" __global__ void __launch_bounds__(256)
    pooled_conv(const __grid_constant__ PoolArguments p) {
    __shared__ float sums[MOST_CHANNELS];  // of groups × channels
    __shared__ float mean[MOST_CHANNELS];
    int which = 0;
    for (int i = 1; i < p.count; i++) which += (int)blockIdx.x >= p.levels[i].first;
    const Level& level = p.levels[which];
    const int bin = (int)blockIdx.x - level.first, line = bin / level.columns;
    const int n = line / level.rows, by = line - n * level.rows, bx = bin - line * level.columns;
    const int top = by * p.height / level.rows, left = bx * p.width / level.columns;
    const int bottom = ((by + 1) * p.height + level.rows - 1) / level.rows;
    const int right = ((bx + 1) * p.width + level.columns - 1) / level.columns;
    const int wide = right - left, pixels = (bottom - top) * wide;
    const int chunks = p.pitch / 8, groups = 256 / chunks;
    const int chunk = threadIdx.x % chunks, group = threadIdx.x / chunks;
    follow();
    if (group < groups) {
        float sum[8] = {};
#pragma unroll 8
        for (int i = group; i < pixels; i += groups) {
            const int y = i / wide;
            const long long pixel =
                ((long long)n * p.height + top + y) * p.width + left + i - y * wide;
            float v[8];
            unpack_eight(*(const uint4*)(p.x + pixel * p.pitch + 8 * chunk), v);
#pragma unroll
            for (int k = 0; k < 8; k++) sum[k] += v[k];
        }
#pragma unroll
        for (int k = 0; k < 8; k++) sums[group * p.pitch + 8 * chunk + k] = sum[k];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < p.pitch; c += 256) {
        float v = 0;
        for (int i = 0; i < groups; i++) v += sums[i * p.pitch + c];
        v /= pixels;
        if (level.pre != nullptr)
            v = fmaxf(v * __ldg(level.pre + c) + __ldg(level.pre + p.pitch + c), 0.f);
        mean[c] = v;
    }
    __syncthreads();
    // Eight lanes share an output channel.
    const int lane = threadIdx.x % 8;
    scalar* out = level.out + (long long)bin * level.out_pitch;
#pragma unroll 2
    for (int o = threadIdx.x / 8; o < level.out_pitch; o += 32) {
        float v = 0;
        if (o < level.cout) {
            const scalar* weights = level.weights + (long long)o * p.pitch;
#pragma unroll 2
            for (int c = 8 * lane; c < p.pitch; c += 64) {
                float w[8];
                unpack_eight(__ldg((const uint4*)(weights + c)), w);
#pragma unroll
                for (int k = 0; k < 8; k++) v += w[k] * mean[c + k];
            }
        }
        for (int step = 1; step < 8; step *= 2)
            v += __shfl_xor_sync(0xffu << (threadIdx.x & 24), v, step);
        if (lane) continue;
        if (o < level.cout) v += __ldg(level.bias + o);
        out[o] = to_scalar(level.relu ? fmaxf(v, 0.f) : v);
    }
}

struct SplitArguments {
    const scalar* image;
    scalar* out;
    const int* cells;
    long long stride_n, stride_y, stride_x;
    int gh, gw, n_high, n_blocks, block, channels;
};

// A thread does 8 channels of a 2×2 quad of the image, which a low block stores as its mean.
extern "C" __global__ void __launch_bounds__(256)
    split_extended(const __grid_constant__ SplitArguments p) {
    follow();
    const int chunks = p.channels / 8, item = blockIdx.x * 256 + threadIdx.x;
    const int quad = item / chunks, column = (item - quad * chunks) * 8;
    const int half = p.block / 2, line = quad / half, stored = line / half;
    const int y = line - stored * half, x = quad - line * half;
    const long long high_rows = (long long)p.n_high * p.block * p.block;
    const long long rows = high_rows + (long long)(p.n_blocks - p.n_high) * half * half;
    if (stored > p.n_blocks || (stored == p.n_blocks && quad > p.n_blocks * half * half)) return;
    if (stored == p.n_blocks) {  // one more: the row of zeros
        *(uint4*)(p.out + (rows + high_rows / 4) * p.channels + column) = make_uint4(0, 0, 0, 0);
        return;
    }
    const int cell = p.cells[stored], cell_line = cell / p.gw, n = cell_line / p.gh;
    const int iy = (cell_line - n * p.gh) * p.block + 2 * y, ix = (cell - cell_line * p.gw) * p.block + 2 * x;
    const scalar* from = p.image + n * p.stride_n + iy * p.stride_y + ix * p.stride_x + column;
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        v[i] = *(const uint4*)(from + i / 2 * p.stride_y + i % 2 * p.stride_x);
    float mean[8] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float w[8];
        unpack_eight(v[i], w);
#pragma unroll
        for (int k = 0; k < 8; k++) mean[k] += 0.25f * w[k];
    }
    if (stored < p.n_high) {
        const long long row = ((long long)stored * p.block + 2 * y) * p.block + 2 * x;
#pragma unroll
        for (int i = 0; i < 4; i++)
            *(uint4*)(p.out + (row + i / 2 * p.block + i % 2) * p.channels + column) = v[i];
    }
    const long long place = stored < p.n_high ? rows + quad : high_rows + quad - high_rows / 4;
    *(uint4*)(p.out + place * p.channels + column) = pack_eight(mean);
}
