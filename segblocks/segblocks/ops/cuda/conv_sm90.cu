// Convolution over both resolutions in one launch, on Hopper's warpgroup matrix units.
//
// Two warpgroups multiply; the warps behind them fetch: pixel rows through the neighbour table, 16 bytes a
// thread, and weights as one bulk copy. conv_arguments.cuh says what is convolved, and what the arguments
// are. BM is 128, the warpgroups sharing the rows, or 64, the warpgroups sharing the inner dimension.
#include "dtypes.cuh"
#include "wgmma.cuh"
#include "pipeline.cuh"
#include "follow.cuh"
#include "conv_arguments.cuh"

constexpr bool HALVES = BM == 64;  // of the inner dimension, one for each warpgroup
constexpr int PRODUCERS = SB_PRODUCERS, EACH = BM * 8 / PRODUCERS;  // EACH: 16-byte copies a thread

#include "shares.cuh"

// Matrix descriptor of a K-major tile with 128-byte rows and 128-byte swizzle.
INLINE unsigned long long tile_descriptor(unsigned address) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | 1ull << 16 | (1024ull >> 4) << 32 |
           1ull << 62;
}

// The fetching warps: they fill the stages with input pixels and weights. A thread copies one 16-byte
// chunk of each of EACH consecutive rows.
INLINE void produce(const Arguments& p, unsigned smem, unsigned full, unsigned empty,
                    const Share& share, int* looked_up) {
    int thread = threadIdx.x - 256, chunk = thread & 7, lane_row = (thread >> 3) * EACH;
    int main_steps = main_steps_of(p);
    int m = share.tile_m * BM + lane_row, first = share.first, last = share.last;
    int tap = first % TAPS, column = first / TAPS * BK;
    auto fetch_weights = [&](int k, int stage) {
        barrier_expect(full + 8 * stage, B_BYTES);
        copy_bulk(smem + stage * STAGE_BYTES + A_BYTES,
                  p.weights + ((long long)k * p.cout_pad + share.tile_n * BN) * BK, B_BYTES,
                  full + 8 * stage);
    };
    // Weights of the first stages, while the kernel ahead may still run.
    int ahead = min(first + STAGES, last);
    for (int k = first; k < ahead && thread == 0; k++) fetch_weights(k, k - first);
    // All rows that the tile reads are looked up at once, so that no step waits for a table. The eight
    // threads that share rows are of one warp. STEM's table is the same for every grid: no kernel makes it.
    for (int t = chunk; t < TAPS + SB_EXTRA; t += 8) {
        const int4* from = (const int4*)((t < TAPS ? p.table + t * p.pitch : p.table2) + m);
        int4* to = (int4*)(looked_up + t * BM + lane_row);
#pragma unroll
        for (int i = 0; i < EACH / 4; i++) {
            if (TAPS > 1) {
                copy_ahead(shared_address(to + i), from + i);
                continue;
            }
            int4 v = read_ahead(from + i);
            int left = p.rows - m - 4 * i;  // x may end with the stored pixels: past them, read the first
            v.x = left > 0 ? v.x : 0, v.y = left > 1 ? v.y : 0;
            v.z = left > 2 ? v.z : 0, v.w = left > 3 ? v.w : 0;
            to[i] = v;
        }
    }
    if (TAPS > 1) copies_landed();
    __syncwarp();
    follow();
    int4 rows[EACH / 4];
    auto lookup = [&](int t) {
#pragma unroll
        for (int i = 0; i < EACH / 4; i++) rows[i] = ((const int4*)(looked_up + t * BM + lane_row))[i];
    };
    lookup(SB_EXTRA && first >= main_steps ? TAPS : tap);
    for (int k = first, stage = 0, phase = 1; k < last; k++) {
        barrier_wait(empty + 8 * stage, phase);
        unsigned to = smem + stage * STAGE_BYTES, filled = full + 8 * stage;
        if (thread == 0 && k >= ahead) fetch_weights(k, stage);
        to += lane_row * 128;
        Chunk source = chunk_at(p, k, column, chunk);
        auto row = [&](int i) { return ((const int*)rows)[i]; };
        auto place = [&](int i) { return to + i * 128 + ((chunk ^ (i & 7)) << 4); };
#if SB_PRE
        int channel = source.exists ? column + chunk * 8 : 0;  // in place of one that does not, the first
        if (!source.exists) source.x = p.x;
        uint4 v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) v[i] = *(const uint4*)source.of(p, row(i), m + i);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            uint4 w = affine_relu(v[i], p.pre, p.cin, channel);
            if (!source.exists) w = make_uint4(0, 0, 0, 0);
            store_shared(place(i), w);
        }
        fence_proxy();
        barrier_arrive(filled);
#else
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (!source.exists) {
                copy_zeros(place(i), p.x);
                continue;
            }
            const scalar* from = source.of(p, row(i), m + i);
#if SB_SEPARATE
            if (row(i) >= p.stored)
                from = p.averages + (long long)(row(i) - p.stored) * source.width + column + chunk * 8;
#endif
            copy_async(place(i), from);
        }
        copy_async_arrive(filled);
#endif
        if (++tap == TAPS) tap = 0, column += BK;
        if (k + 1 < last && !SB_STEM && (TAPS > 1 || SB_EXTRA))
            lookup(SB_EXTRA && k + 1 >= main_steps ? TAPS : tap);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

#include "epilogue.cuh"

// A multiplying warpgroup: 64 rows of the tile, then the epilogue.
INLINE void consume(const Arguments& p, char* memory, unsigned smem, unsigned full, unsigned empty,
                    const Share& share, Places& places, int* arrived) {
    int thread = threadIdx.x, group = thread / 128, lane = thread % 128;
    float acc[BN / 2];
    // Rows are shared, or steps: then each warpgroup takes every other one.
    constexpr int STRIDE = BM == 64 ? 2 : 1;
    int start = share.first + (BM == 64 ? group : 0), previous = -1;
    int stage = start - share.first, phase = 0;
    if (!SB_STEM) look_up_places(p, share, places);
    follow();
    if (SB_STEM) look_up_places(p, share, places);
    for (int k = start; k < share.last; k += STRIDE) {
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
    if (start >= share.last) {
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
    constexpr int READERS = BM == 64 ? 256 : 128;
    auto meet = [&] { sync_threads(BM == 64 ? 1 : 2 + group, READERS); };
    int row = BM == 64 ? 0 : group * 64, reader = BM == 64 ? thread : lane;
    if (BM == 64) staged = (float*)memory;
    meet();
    bool halves = BM == 64;
    if (share.shared >= 0) {
        if (!add_parts<READERS>(p, share, staged, row, reader, arrived)) return;
        halves = false;
        meet();
    }
    finish(p, staged, places, row, share.tile_m * BM + row, share.tile_n, reader, READERS, halves);
}

extern "C" __global__ void __launch_bounds__(256 + PRODUCERS, SB_BLOCKS)
    block_conv(const __grid_constant__ Arguments p) {
    extern __shared__ char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES];
    __shared__ int arrived;
    __shared__ Places places;
    __shared__ __align__(16) int looked_up[(TAPS + SB_EXTRA) * BM];
    char* memory = (char*)(((unsigned long long)dynamic + 1023) & ~1023ull);
    unsigned smem = shared_address(memory);
    unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
    Share share = share_of(p, steps_of(p));
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, PRODUCERS + 1);
            barrier_init(empty + 8 * i, BM == 64 ? 4 : 8);
        }
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= 256)
        produce(p, smem, full, empty, share, looked_up);
    else
        consume(p, memory, smem, full, empty, share, places, &arrived);
}
