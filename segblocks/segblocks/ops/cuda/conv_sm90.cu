// Convolution over both resolutions in one launch, on Hopper's warpgroup matrix units.
//
// An implicit GEMM: rows are the stored pixels of both resolutions, columns the output channels,
// and the inner dimension runs over input channels, 64 at a time, and taps; taps innermost, because
// nine taps read nearly the same pixels, which then come from L1. Two warpgroups multiply; the warps
// behind them fetch: pixel rows through the neighbour table, 16 bytes a thread, and weights as one
// bulk copy. Everything point-wise around the convolution is done in the same launch.
//
//   x          (extended rows, cin)    input; see tables.cu for extended buffers and tables
//   averages   with SEPARATE, where x holds stored pixels only: the rows that would follow them
//   table      (TAPS, pitch) int32     row of x that a tap reads, per GEMM row
//   weights    (k/64, cout_pad, 64)    packed by `pack_weights`, k = TAPS*cin + cin2
//   bias       (cout_pad) float32
//   x2         (.., cin2), table2 (pitch): a second input through a 1×1 convolution (EXTRA)
//   own        (pitch) int32           buffer row of each GEMM row of the output
//   STEM       x is instead the image as padded blocks of four channels (stem.cu), the kernel 7×7
//              with stride 2; table (pitch) is the first pixel that each GEMM row reads, halved; a
//              step covers two rows of eight pixels, weights beyond 7×7×3 are zero
//   addend     (rows, cout) added before the ReLU (ADD 1), or (extended rows at half the block,
//              cout) enlarged bilinearly first (ADD 2, with up_table (9, up_pitch) and up_zero)
//   pre        (2, cin) float32        x becomes relu(x * pre[0] + pre[1]) (PRE, TAPS == 1 only)
//   post       (2, cout_pad) float32   the same on the result (POST)
//   out        (extended rows, cout)   AVERAGES: with the averages that low neighbours will read
//   work       (split, rows, cout) float32, count (tiles) int32 zeros: for split > 1
//
// cin and cin2 are multiples of 64, cout of 8. BM is 128, the warpgroups sharing the rows, or 64,
// the warpgroups sharing the inner dimension.
#include "dtypes.cuh"
#include "wgmma.cuh"
#include "pipeline.cuh"

constexpr int BM = SB_BM, BN = SB_BN, BK = 64, STAGES = SB_STAGES, TAPS = SB_TAPS;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int PRODUCERS = SB_PRODUCERS, EACH = BM * 8 / PRODUCERS;  // EACH: 16-byte copies a thread
constexpr int PITCH = BN + 8;  // floats per staged row; keeps the fragments' stores conflict-free

struct Arguments {
    const scalar* x;
    const int* table;
    const scalar* weights;
    const float* bias;
    const scalar* x2;
    const int* table2;
    const int* own;
    const scalar* addend;
    const int* up_table;
    const float* pre;
    const float* post;
    scalar* out;
    float* work;
    int* count;
    const scalar* averages;
    int rows, high_rows, block, pitch, up_high_rows, up_pitch, up_zero;
    int cin, cin2, cout, cout_pad, split, line, half_line, stored, padding;
};

INLINE uint4 affine_relu(uint4 v, const float* pre, int cin, int column) {
    unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float a, b;
        unpack_pair(w[i], a, b);
        float2 scale = *(const float2*)(pre + column + 2 * i);
        float2 shift = *(const float2*)(pre + cin + column + 2 * i);
        w[i] = pack_pair(fmaxf(a * scale.x + shift.x, 0.f), fmaxf(b * scale.y + shift.y, 0.f));
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// The fetching warps: they fill the stages with input pixels and weights. A thread copies one 16-byte
// chunk of each of EACH consecutive rows.
INLINE void produce(const Arguments& p, unsigned smem, unsigned full, unsigned empty, int tile_m,
                    int tile_n, int first, int last) {
    int thread = threadIdx.x - 256, chunk = thread & 7, lane_row = (thread >> 3) * EACH;
    int main_steps = SB_STEM ? 4 : TAPS * (p.cin / BK);
    int m = tile_m * BM + lane_row;
    int tap = first % TAPS, column = first / TAPS * BK;
    int4 rows[EACH / 4];
    auto lookup = [&](const int* table) {
#pragma unroll
        for (int i = 0; i < EACH / 4; i++) rows[i] = __ldg((const int4*)(table + m) + i);
    };
    auto table_of = [&](int k, int t) {
        return SB_EXTRA && k >= main_steps ? p.table2 : p.table + t * p.pitch;
    };
    lookup(table_of(first, tap));
    for (int k = first, stage = 0, phase = 1; k < last; k++) {
        barrier_wait(empty + 8 * stage, phase);
        unsigned to = smem + stage * STAGE_BYTES, filled = full + 8 * stage;
        if (thread == 0) {
            barrier_expect(filled, B_BYTES);
            copy_bulk(to + A_BYTES, p.weights + ((long long)k * p.cout_pad + tile_n * BN) * BK,
                      B_BYTES, filled);
        }
        to += lane_row * 128;
        bool second = SB_EXTRA && k >= main_steps;
        int width = second ? p.cin2 : p.cin;
        const scalar* x = (second ? p.x2 + (k - main_steps) * BK : p.x + column) + chunk * 8;
#if SB_STEM
        // Row y of the window lies y lines further; chunks 4 to 7 are its next row.
        x = p.x + chunk % 4 * 8;
        long long line = (long long)(2 * k + chunk / 4);
        long long high = line * p.line, low = line * p.half_line;
        width = 8;
#endif
        auto row = [&](int i) { return ((const int*)rows)[i]; };
        auto place = [&](int i) { return to + i * 128 + ((chunk ^ (i & 7)) << 4); };
#if SB_PRE
        uint4 v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) v[i] = *(const uint4*)(x + (long long)row(i) * width);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            uint4 w = affine_relu(v[i], p.pre, p.cin, column + chunk * 8);
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place(i)), "r"(w.x),
                         "r"(w.y), "r"(w.z), "r"(w.w)
                         : "memory");
        }
        fence_proxy();
        barrier_arrive(filled);
#else
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const scalar* from = x + (long long)row(i) * width;
#if SB_STEM
            from += m + i < p.high_rows ? high : low;
#endif
#if SB_SEPARATE
            if (row(i) >= p.stored)
                from = p.averages + (long long)(row(i) - p.stored) * width + column + chunk * 8;
#endif
            copy_async(place(i), from);
        }
        copy_async_arrive(filled);
#endif
        if (++tap == TAPS) tap = 0, column += BK;
        if (k + 1 < last && !SB_STEM && (TAPS > 1 || SB_EXTRA)) lookup(table_of(k + 1, tap));
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

// x / f without a division where f is a power of two, which `shift` says (-1: it is not).
INLINE int divide(int x, int f, int shift) { return shift >= 0 ? x >> shift : x / f; }

INLINE void add_row(const scalar* from, float weight, float (&sum)[8]) {
    uint4 v = __ldg((const uint4*)from);
    unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float a, b;
        unpack_pair(w[j], a, b);
        sum[2 * j] += weight * a;
        sum[2 * j + 1] += weight * b;
    }
}

// Eight channels of the bilinear ×2 of a buffer at half the block side, read at GEMM row m.
INLINE void add_enlarged(const Arguments& p, int m, int column, int shift, float (&sum)[8]) {
    int near, dy, dx, half = p.block / 2;
    if (m < p.high_rows) {
        int quad = m / 4, row = divide(quad, half, shift), x = quad - row * half;
        int stored = divide(row, half, shift), y = row - stored * half;
        // The smaller buffer's own quads: its GEMM row of pixel (y, x).
        near = stored * half * half + (y / 2 * (half / 2) + x / 2) * 4 + y % 2 * 2 + x % 2;
        dy = m & 2, dx = m & 1;
    } else {
        int within = m - p.high_rows, row = divide(within, half, shift), x = within - row * half;
        int stored = divide(row, half, shift), y = row - stored * half;
        near = p.up_high_rows + (stored * (half / 2) + y / 2) * (half / 2) + x / 2;
        dy = y & 1, dx = x & 1;
    }
    int step_y = dy ? 3 : -3, step_x = dx ? 1 : -1;
    const int* table = p.up_table + 4 * p.up_pitch + near;
    int at = table[0], at_y = table[step_y * p.up_pitch], at_x = table[step_x * p.up_pitch];
    int at_yx = table[(step_y + step_x) * p.up_pitch];
    // Beyond the image the position is clamped, axis by axis.
    if (at_yx == p.up_zero) at_yx = at_y == p.up_zero ? at_x : at_y;
    if (at_yx == p.up_zero) at_yx = at;
    if (at_y == p.up_zero) at_y = at;
    if (at_x == p.up_zero) at_x = at;
    add_row(p.addend + (long long)at * p.cout + column, 0.5625f, sum);
    add_row(p.addend + (long long)at_y * p.cout + column, 0.1875f, sum);
    add_row(p.addend + (long long)at_x * p.cout + column, 0.1875f, sum);
    add_row(p.addend + (long long)at_yx * p.cout + column, 0.0625f, sum);
}

INLINE void load_eight(const float* from, float (&v)[8]) {
    float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

INLINE uint4 pack_eight(const float (&v)[8]) {
    return make_uint4(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]),
                      pack_pair(v[6], v[7]));
}

// Bias, addend, activation, store and averages of `quads` staged groups of four rows.
INLINE void finish(const Arguments& p, const float* staged, int m0, int tile_n, int thread,
                   int threads, int quads) {
    constexpr int CHUNKS = BN / 8;
    int chunk = thread % CHUNKS, column = tile_n * BN + chunk * 8;
    if (column >= p.cout) return;
    int half = p.block / 2, shift = half & (half - 1) ? -1 : 31 - __clz(half);
    float bias[8], scale[8], offset[8];
    load_eight(p.bias + column, bias);
    if (SB_POST) {
        load_eight(p.post + column, scale);
        load_eight(p.post + p.cout_pad + column, offset);
    }
    if (SB_AVERAGES && m0 == 0 && thread < CHUNKS)
        *(uint4*)(p.out + (long long)(p.rows + p.high_rows / 4) * p.cout + column) =
            make_uint4(0, 0, 0, 0);
    for (int quad = thread / CHUNKS; quad < quads; quad += threads / CHUNKS) {
        int m = m0 + quad * 4;
        if (m >= p.rows) break;
        int4 own = __ldg((const int4*)(p.own + m));
        int rows[4] = {own.x, own.y, own.z, own.w};
        uint4 addend[4];
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (SB_ADD == 1 && m + r < p.rows)
                addend[r] = __ldg((const uint4*)(p.addend + (long long)rows[r] * p.cout + column));
        float mean[8] = {};
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float v[8];
            if (p.split > 1) {
#pragma unroll
                for (int i = 0; i < 8; i++) v[i] = 0;
                for (int part = 0; part < p.split && m + r < p.rows; part++) {
                    const float* from =
                        p.work + ((long long)part * p.rows + m + r) * p.cout + column;
                    float4 a = __ldcg((const float4*)from), b = __ldcg((const float4*)from + 1);
                    v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w;
                    v[4] += b.x, v[5] += b.y, v[6] += b.z, v[7] += b.w;
                }
            } else {
                load_eight(staged + (quad * 4 + r) * PITCH + chunk * 8, v);
                if (BM == 64) {  // the other warpgroup's share of the inner dimension
                    float w[8];
                    load_eight(staged + (64 + quad * 4 + r) * PITCH + chunk * 8, w);
#pragma unroll
                    for (int i = 0; i < 8; i++) v[i] += w[i];
                }
            }
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += bias[i];
            if (SB_ADD == 1) {
                unsigned w[4] = {addend[r].x, addend[r].y, addend[r].z, addend[r].w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float a, b;
                    unpack_pair(w[j], a, b);
                    v[2 * j] += a;
                    v[2 * j + 1] += b;
                }
            }
            if (SB_ADD == 2) add_enlarged(p, min(m + r, p.rows - 1), column, shift, v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (SB_RELU) v[i] = fmaxf(v[i], 0.f);
                if (SB_POST) v[i] = fmaxf(v[i] * scale[i] + offset[i], 0.f);
                mean[i] += v[i];
            }
            if (m + r < p.rows)
                *(uint4*)(p.out + (long long)rows[r] * p.cout + column) = pack_eight(v);
        }
        if (SB_AVERAGES && m < p.high_rows) {
            int q = m / 4, row = divide(q, half, shift), x = q - row * half;
            int y = row - divide(row, half, shift) * half;
            if (y == 0 || y == half - 1 || x == 0 || x == half - 1) {
#pragma unroll
                for (int i = 0; i < 8; i++) mean[i] *= 0.25f;
                *(uint4*)(p.out + (long long)(p.rows + q) * p.cout + column) = pack_eight(mean);
            }
        }
    }
}

// A multiplying warpgroup: 64 rows of the tile, then the epilogue.
INLINE void consume(const Arguments& p, char* memory, unsigned smem, unsigned full, unsigned empty,
                    int tile_m, int tile_n, int first, int last, int* arrived) {
    int thread = threadIdx.x, group = thread / 128, lane = thread % 128;
    float acc[BN / 2];
    // Rows are shared, or steps: then each warpgroup takes every other one.
    constexpr int STRIDE = BM == 64 ? 2 : 1;
    int start = first + (BM == 64 ? group : 0), previous = -1;
    int stage = start - first, phase = 0;
    for (int k = start; k < last; k += STRIDE) {
        barrier_wait(full + 8 * stage, phase);
        fence_proxy();  // cp.async wrote through the generic proxy, the matrix unit reads another
        unsigned a = smem + stage * STAGE_BYTES + (BM == 64 ? 0 : group * 8192);
        unsigned b = smem + stage * STAGE_BYTES + A_BYTES;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++)
            Wgmma<BN>::run(acc, tile_descriptor(a + 32 * i), tile_descriptor(b + 32 * i),
                           k > start || i > 0);
        wgmma_commit();
        wgmma_wait<1>();
        // The product before this one has finished, so its stage may be filled again.
        if (previous >= 0 && thread % 32 == 0) barrier_arrive(empty + 8 * previous);
        previous = stage;
        stage += STRIDE;
        if (stage >= STAGES) stage -= STAGES, phase ^= 1;
    }
    wgmma_wait<0>();
    sync_threads(1, 256);  // the stages become the staging area

    float* staged = (float*)memory + group * 64 * PITCH;
    if (start >= last) {
#pragma unroll
        for (int i = 0; i < BN / 2; i++) acc[i] = 0;
    }
    int r = lane / 32 * 16 + lane % 32 / 4, c = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        *(float2*)(staged + r * PITCH + 8 * j + c) = make_float2(acc[4 * j], acc[4 * j + 1]);
        *(float2*)(staged + (r + 8) * PITCH + 8 * j + c) =
            make_float2(acc[4 * j + 2], acc[4 * j + 3]);
    }
    // Who reads what: with shared rows each warpgroup its own 64, else all threads all 64.
    if (BM == 64) {
        staged = (float*)memory;
        sync_threads(1, 256);
    } else {
        sync_threads(2 + group, 128);
    }
    int m0 = tile_m * BM + (BM == 64 ? 0 : group * 64);
    int member = BM == 64 ? thread : lane, members = BM == 64 ? 256 : 128;
    if (p.split > 1) {
        int part = blockIdx.y;
        for (int item = member; item < 64 * BN / 4; item += members) {
            int m = item / (BN / 4), column = item % (BN / 4) * 4;
            if (m0 + m >= p.rows || tile_n * BN + column >= p.cout) continue;
            float4 v = *(const float4*)(staged + m * PITCH + column);
            if (BM == 64) {
                float4 w = *(const float4*)(staged + (64 + m) * PITCH + column);
                v = make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
            }
            *(float4*)(p.work + ((long long)part * p.rows + m0 + m) * p.cout + tile_n * BN +
                       column) = v;
        }
        __threadfence();
        sync_threads(1, 256);
        if (thread == 0) {
            *arrived = atomicAdd(p.count + blockIdx.x, 1);
            if (*arrived == p.split - 1) p.count[blockIdx.x] = 0;
        }
        sync_threads(1, 256);
        // The last part to arrive adds all of them in their own order, so the sum never varies.
        if (*arrived < p.split - 1) return;
        __threadfence();
    }
    finish(p, staged, m0, tile_n, member, members, 16);
}

extern "C" __global__ void __launch_bounds__(256 + PRODUCERS, SB_BLOCKS)
    block_conv(const __grid_constant__ Arguments p) {
    extern __shared__ char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES];
    __shared__ int arrived;
    char* memory = (char*)(((unsigned long long)dynamic + 1023) & ~1023ull);
    unsigned smem = shared_address(memory);
    unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
    int columns = (p.cout + BN - 1) / BN;
    int tile_m = blockIdx.x / columns, tile_n = blockIdx.x % columns;
    int steps = SB_STEM ? 4 : (TAPS * p.cin + (SB_EXTRA ? p.cin2 : 0)) / BK;
    int per_part = (steps + p.split - 1) / p.split;
    int first = blockIdx.y * per_part, last = min(first + per_part, steps);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, PRODUCERS + 1);
            barrier_init(empty + 8 * i, BM == 64 ? 4 : 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= 256)
        produce(p, smem, full, empty, tile_m, tile_n, first, last);
    else
        consume(p, memory, smem, full, empty, tile_m, tile_n, first, last, &arrived);
}
