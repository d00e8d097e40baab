// The policy network at batch 1 is three small convolutions and a choice: its first layer and what
// follows its last. Half precision, sm_80 and later.
//
//   policy_first   7×7, stride 4, padding 3 of an image with three channels, bias, ReLU
//     image    (N, 3, height, width) as it is read, any strides (in elements)
//     weights  (7, cout, 32): of each output channel a window's row of 8 pixels of 4 channels
//     out      (N, out_h, out_w, cout), cout a multiple of 64
//   policy_scores  5×5, stride 2, padding 2 to one channel; the last thread block to finish then
//              chooses the blocks, as choose_slots does
//     x        (N, h, w, 64), weights (25, 64), bias (1) float32
//     place    (PLACES, PLACES) float32, what is added by place in the picture; null for nothing
//     scores   (N, out_h, out_w) float32; grid, slot, cells: as from choose_slots
//     arrived  one int32 that is zero before and after
#include "choose.cuh"
#include "pipeline.cuh"
#include "mma.cuh"
#include "follow.cuh"

// A thread block does 4×16 output pixels: a warp one row of them and 32 of 64 output channels.
constexpr int TILE_Y = 4, TILE_X = 16, PATCH_Y = 4 * TILE_Y + 3, PATCH_X = 4 * TILE_X + 4;

struct FirstArguments {
    const scalar* image;
    const scalar* weights;
    const float* bias;
    scalar* out;
    long long stride_n, stride_c, stride_y, stride_x;
    int height, width, out_h, out_w, tiles_x, cout;
};

// The three channels of a pixel. Where they lie side by side, `packed`, with one access that takes in
// the first of the next pixel.
INLINE uint2 load_pixel(const scalar* at, long long stride_c, bool packed) {
    if (packed) {
        const uint2 v = *(const uint2*)at;
        return make_uint2(v.x, v.y & 0xffff);
    }
    const unsigned r = at[0], g = at[stride_c], b = at[2 * stride_c];
    return make_uint2(r | g << 16, b);
}

extern "C" __global__ void __launch_bounds__(256, 3)
    policy_first(const __grid_constant__ FirstArguments p) {
    constexpr int PIXELS = PATCH_Y * PATCH_X, EACH = (PIXELS + 255) / 256;
    __shared__ __align__(16) uint2 patch[PIXELS];
    __shared__ uint4 weights[7 * 256];  // of 64 output channels, four accesses each
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int groups = p.cout / 64, n = blockIdx.y / groups, channel = blockIdx.y % groups * 64;
    const int tile_y = blockIdx.x / p.tiles_x * TILE_Y, tile_x = blockIdx.x % p.tiles_x * TILE_X;
    const int own_y = warp / 2, first = warp % 2 * 32;
    uint4 own_weights[7];  // on their way while the kernel ahead may still run, then while pixels are
#pragma unroll
    for (int dy = 0; dy < 7; dy++)
        own_weights[dy] =
            *(const uint4*)(p.weights + ((dy * p.cout + channel) * 4 + threadIdx.x) * 8);
    follow();
    const scalar* image = p.image + n * p.stride_n;
    const bool packed = p.stride_c == 1 && p.stride_x && !((p.stride_y | p.stride_x) % 4) &&
                        !((unsigned long long)image % 8);
    uint2 pixels[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int i = threadIdx.x + 256 * e;
        const int y = tile_y * 4 - 3 + i / PATCH_X, x = tile_x * 4 - 3 + i % PATCH_X;
        pixels[e] = make_uint2(0, 0);
        if (i < PIXELS && (unsigned)y < (unsigned)p.height && (unsigned)x < (unsigned)p.width)
            pixels[e] = load_pixel(image + y * p.stride_y + x * p.stride_x, p.stride_c, packed);
    }
#pragma unroll
    for (int e = 0; e < EACH; e++)
        if (threadIdx.x + 256 * e < PIXELS) patch[threadIdx.x + 256 * e] = pixels[e];
#pragma unroll
    for (int dy = 0; dy < 7; dy++) weights[256 * dy + threadIdx.x] = own_weights[dy];
    __syncthreads();
    float sums[4][4] = {};
#pragma unroll
    for (int dy = 0; dy < 7; dy++) {
        const uint2* from = patch + (own_y * 4 + dy) * PATCH_X + 2 * q;
        const uint4 upper = *(const uint4*)(from + 4 * g);
        const uint4 lower = *(const uint4*)(from + 4 * (g + 8));
#pragma unroll
        for (int t = 0; t < 4; t++)
            mma_chunk(sums[t], upper, lower, weights[(dy * 64 + first + 8 * t + g) * 4 + q]);
    }
    const int y = tile_y + own_y;
    if (y >= p.out_h) return;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const int column = channel + first + 8 * t + 2 * q;
        const float2 bias = __ldg((const float2*)(p.bias + column));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int x = tile_x + g + 8 * half;
            if (x >= p.out_w) continue;
            const long long pixel = ((long long)n * p.out_h + y) * p.out_w + x;
            *(unsigned*)(p.out + pixel * p.cout + column) =
                pack_pair(fmaxf(sums[t][2 * half] + bias.x, 0.f),
                          fmaxf(sums[t][2 * half + 1] + bias.y, 0.f));
        }
    }
}

struct ScoreArguments {
    const scalar* x;
    const scalar* weights;
    const float* bias;
    const float* place;
    float* scores;
    int* arrived;
    Choice choice;  // without a grid: scores only
    int height, width, out_h, out_w;
};

// Two of PLACES values and what the second counts: bilinear, at the centre of block i of n.
constexpr int PLACES = 16;
INLINE int2 between(int i, int n, float& part) {
    const float at = fmaxf((i + 0.5f) * PLACES / n - 0.5f, 0.f);
    const int first = min((int)at, PLACES - 1);
    part = at - first;
    return make_int2(first, min(first + 1, PLACES - 1));
}

INLINE float of_place(const float* place, int y, int rows, int x, int columns) {
    float down, right;
    const int2 ys = between(y, rows, down), xs = between(x, columns, right);
    const float* upper = place + ys.x * PLACES;
    const float* lower = place + ys.y * PLACES;
    const float above = upper[xs.x] + right * (upper[xs.y] - upper[xs.x]);
    const float below = lower[xs.x] + right * (lower[xs.y] - lower[xs.x]);
    return above + down * (below - above);
}

INLINE float dot_eight(const uint4& a, const uint4& b, float sum) {
    const unsigned v[4] = {a.x, a.y, a.z, a.w}, w[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float x, y, s, t;
        unpack_pair(v[i], x, y);
        unpack_pair(w[i], s, t);
        sum += x * s + y * t;
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(256)
    policy_scores(const __grid_constant__ ScoreArguments p) {
    __shared__ bool is_last;
    const int lane = threadIdx.x % 32, cell = blockIdx.x * 8 + threadIdx.x / 32;
    const int column = lane % 8 * 8;  // eight lanes share a pixel, four groups of them the taps
    uint4 a[7], b[7];
#pragma unroll
    for (int i = 0; i < 7; i++) {  // weights, while the kernel ahead may still run
        const int tap = min(lane / 8 + 4 * i, 24);
        b[i] = *(const uint4*)(p.weights + tap * 64 + column);
    }
    follow();
    if (cell < p.choice.cells_in_all) {
        const int line = cell / p.out_w, n = line / p.out_h;
        const int row = line - n * p.out_h, of_row = cell - line * p.out_w;
        const int y0 = row * 2 - 2, x0 = of_row * 2 - 2;
#pragma unroll
        for (int i = 0; i < 7; i++) {
            const int tap = lane / 8 + 4 * i, y = y0 + tap / 5, x = x0 + tap % 5;
            const bool inside =
                tap < 25 && (unsigned)y < (unsigned)p.height && (unsigned)x < (unsigned)p.width;
            const long long pixel = ((long long)n * p.height + y) * p.width + x;
            a[i] = make_uint4(0, 0, 0, 0);
            if (inside) a[i] = *(const uint4*)(p.x + pixel * 64 + column);
        }
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 7; i++) sum = dot_eight(a[i], b[i], sum);
        for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) {
            sum += __ldg(p.bias);
            if (p.place) sum += of_place(p.place, row, p.out_h, of_row, p.out_w);
            p.scores[cell] = sum;
            __threadfence();
        }
    }
    if (p.choice.grid == nullptr) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(p.arrived, 1) == (int)gridDim.x - 1;
        if (is_last) *p.arrived = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    choose_blocks(p.choice, [&](int i) { return key_of(__ldcg(p.scores + i)); });
}
