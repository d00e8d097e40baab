// Convolution of small dense maps, where launches and latency decide: every warp of a thread block
// takes a share of the inner dimension, each lane copies from L2 what it will multiply and nobody
// waits for anybody until the shares are added, in a fixed order. Half precision, sm_80 and later.
//
//   x        one to four maps (N, h, w, pitch), side by side along the channels; maps of another size
//            than the output are resized to it bilinearly (corners not aligned), for 1×1 only
//   weights  (chunks, cout_pad, 32): of each output channel 32 adjacent input channels of one tap;
//            taps outermost, the channels of each map rounded up to 32
//   bias     (cout_pad) float32
//   pre      (2, channels) float32 scale and shift of relu(x * scale + shift) on the input
//   out      (N, out_h, out_w, out_pitch), pitch the output channels rounded up to 8
//
// Compile-time constants: SB_SIZE side of the window, SB_PARTS maps, SB_RESIZED whether any of them
//   is, SB_PRE, SB_RELU after the bias; SB_M × 16 rows and SB_N × 8 output channels per thread block,
//   SB_WARPS, SB_AHEAD chunks of 32 that a warp has under way. Dynamic shared memory: SHARED below.
#include "common.cuh"
#include "eight.cuh"
#include "pipeline.cuh"
#include "mma.cuh"
#include "follow.cuh"

constexpr int SIZE = SB_SIZE, PARTS = SB_PARTS, MT = SB_M, NT = SB_N, WARPS = SB_WARPS;
constexpr int AHEAD = SB_AHEAD, BM = 16 * MT, BN = 8 * NT, PITCH = BN + 8;
// 16-byte places of a lane for one chunk: input rows (four corners each where maps are resized),
// weights, scale and shift. SHARED is the larger of WARPS * AHEAD * PLACES * 512 and
// WARPS * BM * PITCH * 4 bytes.
constexpr int CORNERS = SB_RESIZED ? 4 : 1, WEIGHTS = 2 * MT * CORNERS, AFFINE = WEIGHTS + NT;
constexpr int PLACES = AFFINE + (SB_PRE ? 4 : 0);

struct Map {
    const scalar* x;
    int height, width, pitch, start;  // start: first channel among those of a tap
    float scale_y, scale_x;           // height / height of the output
};

struct Arguments {
    const scalar* weights;
    const float* bias;
    const float* pre;
    scalar* out;
    Map maps[4];
    int rows, out_h, out_w, out_pitch, stride, padding, channels, cout_pad;
    Divider by_tap;  // chunks of a tap
    int reserved;
};

// The first input pixel of an output pixel's window.
struct Row {
    int n, y, x;
    bool inside;
};

INLINE Row row_at(const Arguments& p, int m) {
    int line = m / p.out_w, n = line / p.out_h;
    return {n, (line - n * p.out_h) * p.stride - p.padding,
            (m - line * p.out_w) * p.stride - p.padding, m < p.rows};
}

INLINE const scalar* pixel_at(const Map& map, int n, int y, int x) {
    return map.x + (((long long)n * map.height + y) * map.width + x) * map.pitch;
}

// Where a resized map is read for one output pixel.
struct Corners {
    int top, left, bottom, right;
    float down, across;
};

INLINE Corners corners_at(const Map& map, int y, int x) {
    float at_y = fmaxf((y + 0.5f) * map.scale_y - 0.5f, 0.f);
    float at_x = fmaxf((x + 0.5f) * map.scale_x - 0.5f, 0.f);
    int top = min((int)at_y, map.height - 1), left = min((int)at_x, map.width - 1);
    return {top, left, min(top + 1, map.height - 1), min(left + 1, map.width - 1),
            at_y - top, at_x - left};
}

INLINE const Map& map_of(const Arguments& p, int channel) {
    int part = 0;
#pragma unroll
    for (int i = 1; i < PARTS; i++) part += channel >= p.maps[i].start;
    return p.maps[part];
}

INLINE bool is_resized(const Arguments& p, const Map& map) {
    return SB_RESIZED && (map.height != p.out_h || map.width != p.out_w);
}

struct Lane {
    int g, q;  // of a product's row or output channel; of its inner dimension
    Row rows[2 * MT];
};

// Start the copies of one chunk to this lane's places, which are 512 bytes apart: of the input, and of
// what never changes.
INLINE void start_rows(const Arguments& p, const Lane& lane, int chunk, unsigned to) {
    const int per_tap = p.channels / 32, tap = SIZE > 1 ? quotient(chunk, p.by_tap) : 0;
    const int channel = (chunk - tap * per_tap) * 32, mine = channel + 8 * lane.q;
    const Map& map = map_of(p, channel);
    const int c = mine - map.start;
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const Row& row = lane.rows[i];
        const int y = row.y + tap / SIZE, x = row.x + tap % SIZE;
        bool wanted = row.inside && c < map.pitch;
        if (is_resized(p, map)) {
            const Corners at = corners_at(map, y, x);
            copy_eight(to + (4 * i) * 512, pixel_at(map, row.n, at.top, at.left) + c, wanted);
            copy_eight(to + (4 * i + 1) * 512, pixel_at(map, row.n, at.top, at.right) + c, wanted);
            copy_eight(to + (4 * i + 2) * 512, pixel_at(map, row.n, at.bottom, at.left) + c, wanted);
            copy_eight(to + (4 * i + 3) * 512, pixel_at(map, row.n, at.bottom, at.right) + c, wanted);
            continue;
        }
        if (SIZE > 1)
            wanted = wanted && (unsigned)y < (unsigned)map.height && (unsigned)x < (unsigned)map.width;
        copy_eight(to + CORNERS * i * 512, pixel_at(map, row.n, y, x) + c, wanted);
    }
}

INLINE void start_weights(const Arguments& p, const Lane& lane, int chunk, int n0, unsigned to) {
    const scalar* weights = p.weights + ((long long)chunk * p.cout_pad + n0 + lane.g) * 32 + 8 * lane.q;
#pragma unroll
    for (int t = 0; t < NT; t++) copy_eight(to + (WEIGHTS + t) * 512, weights + 8 * 32 * t, true);
#if SB_PRE
    const int mine = chunk * 32 + 8 * lane.q;  // of a window of one pixel
#pragma unroll
    for (int i = 0; i < 4; i++)
        copy_eight(to + (AFFINE + i) * 512,
                   (const scalar*)(p.pre + i / 2 * p.channels + mine + i % 2 * 4), true);
#endif
}

// Row i of a chunk that has landed, resized and activated.
INLINE uint4 landed_row(const Arguments& p, const Lane& lane, const Map& map, int i,
                        const uint4* from) {
    if (!SB_PRE && !is_resized(p, map)) return from[CORNERS * i * 32];
    float v[8];
    unpack_eight(from[CORNERS * i * 32], v);
    if (is_resized(p, map)) {
        const Corners at = corners_at(map, lane.rows[i].y, lane.rows[i].x);
        const float weights[4] = {(1 - at.down) * (1 - at.across), (1 - at.down) * at.across,
                                  at.down * (1 - at.across), at.down * at.across};
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] *= weights[0];
#pragma unroll
        for (int corner = 1; corner < CORNERS; corner++) {
            float w[8];
            unpack_eight(from[(CORNERS * i + corner) * 32], w);
#pragma unroll
            for (int k = 0; k < 8; k++) v[k] += weights[corner] * w[k];
        }
    }
#if SB_PRE
    const uint4* affine = from + AFFINE * 32;
#pragma unroll
    for (int k = 0; k < 8; k++)
        v[k] = fmaxf(v[k] * ((const float*)(affine + k / 4 * 32))[k % 4] +
                         ((const float*)(affine + (2 + k / 4) * 32))[k % 4],
                     0.f);
#endif
    return pack_eight(v);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    small_conv(const __grid_constant__ Arguments p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int warp = threadIdx.x / 32, m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
    Lane lane = {(int)threadIdx.x % 32 / 4, (int)threadIdx.x % 4, {}};
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) lane.rows[i] = row_at(p, m0 + 8 * i + lane.g);
    const int chunks = SIZE * SIZE * (p.channels / 32);
    const uint4* places = (const uint4*)memory + warp * AHEAD * PLACES * 32 + threadIdx.x % 32;
    const auto place = [&](int i) { return shared_address(places + i % AHEAD * PLACES * 32); };
    // Weights of the first chunks, while the kernel ahead may still run.
    for (int i = 0; i < AHEAD - 1; i++)
        if (warp + i * WARPS < chunks) start_weights(p, lane, warp + i * WARPS, n0, place(i));
    follow();
    float sums[MT][NT][4] = {};
    for (int i = 0; i < AHEAD - 1; i++) {
        if (warp + i * WARPS < chunks) start_rows(p, lane, warp + i * WARPS, place(i));
        copies_begun();
    }
    for (int i = 0, chunk = warp; chunk < chunks; i++, chunk += WARPS) {
        const int next = chunk + (AHEAD - 1) * WARPS;
        if (next < chunks) {
            start_weights(p, lane, next, n0, place(i + AHEAD - 1));
            start_rows(p, lane, next, place(i + AHEAD - 1));
        }
        copies_begun();
        copies_landed<AHEAD - 1>();
        const uint4* from = places + i % AHEAD * PLACES * 32;
        const Map& map = map_of(p, SIZE > 1 ? 0 : chunk * 32);
        uint4 rows[2 * MT];
#pragma unroll
        for (int k = 0; k < 2 * MT; k++) rows[k] = landed_row(p, lane, map, k, from);
#pragma unroll
        for (int t = 0; t < NT; t++) {
            const uint4 weights = from[(WEIGHTS + t) * 32];
#pragma unroll
            for (int k = 0; k < MT; k++)
                mma_chunk(sums[k][t], rows[2 * k], rows[2 * k + 1], weights);
        }
    }
    copies_landed<0>();
    __syncthreads();  // the places become the staging area of the shares
    float(*shares)[BM][PITCH] = (float(*)[BM][PITCH])memory;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(float2*)&shares[warp][16 * i + 8 * half + lane.g][8 * t + 2 * lane.q] =
                    make_float2(sums[i][t][2 * half], sums[i][t][2 * half + 1]);
    __syncthreads();
    for (int item = threadIdx.x; item < BM * BN / 4; item += 32 * WARPS) {
        const int m = item / (BN / 4), column = item % (BN / 4) * 4;
        if (m0 + m >= p.rows || n0 + column >= p.out_pitch) continue;
        float4 v = __ldg((const float4*)(p.bias + n0 + column));
        for (int w = 0; w < WARPS; w++) {
            const float4 share = *(const float4*)&shares[w][m][column];
            v.x += share.x, v.y += share.y, v.z += share.z, v.w += share.w;
        }
        if (SB_RELU)
            v = make_float4(fmaxf(v.x, 0.f), fmaxf(v.y, 0.f), fmaxf(v.z, 0.f), fmaxf(v.w, 0.f));
        *(uint2*)(p.out + (long long)(m0 + m) * p.out_pitch + n0 + column) =
            make_uint2(pack_pair(v.x, v.y), pack_pair(v.z, v.w));
    }
}
