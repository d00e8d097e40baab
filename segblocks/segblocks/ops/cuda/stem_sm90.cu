// The first convolution of a network over both resolutions, on Hopper's warpgroup matrix units: 7×7
// (or 3×3) with stride 2 on an image of three channels, then bias and ReLU.
//
// As in patch_sm90.cu output channels are the rows of the product and pixels its columns. Lines of the
// padded blocks of stem.cu are fetched as they are: a pixel has four channels, so neighbouring outputs
// read 16 bytes further, which is what the matrix unit wants of columns without swizzle, and 16 values
// of the inner dimension are four pixels of a line.
//
//   x        padded blocks (stem.cu)
//   weights  (4, cout_pad, 64)        packed by `pack_patch_weights` from `stem_matrix`
//   bias     (cout_pad) float32
//   out      (extended rows, cout)    with the averages that low neighbours will read
//
// cout is a multiple of 64. A tile is `lines` output lines of a block; blocks have 64, 32 or 16 outputs
// in a line. Two warpgroups take its pairs of lines in turn.
#include "dtypes.cuh"
#include "wgmma.cuh"
#include "pipeline.cuh"
#include "neighbours.cuh"
#include "follow.cuh"

constexpr int WEIGHT_BYTES = 4 * 64 * 64 * 2, SLOT_BYTES = 22528, RING = 2, STEPS = 14;

struct Arguments {
    const scalar* x;
    const scalar* weights;
    const float* bias;
    scalar* out;
    Extended at;
    int n_high, n_blocks, cout, cout_pad, high_tiles, tiles, relu;
};

struct Tile {
    bool high;
    int side, block, line, lines;  // outputs in a line; rank of the block; first line, number of them
    long long first;               // byte of x where its lines begin
};

INLINE int padded_area(int side) { return (side + 6) * (side + 6) * 8; }

INLINE Tile tile_at(const Arguments& p, int index) {
    Tile tile;
    tile.high = index < p.high_tiles;
    tile.side = tile.high ? p.at.block : p.at.block / 2;
    tile.lines = min(tile.side, 512 / tile.side);
    int within = tile.high ? index : index - p.high_tiles, each = tile.side / tile.lines;
    tile.block = within / each;
    tile.line = within % each * tile.lines;
    tile.first = (long long)tile.block * padded_area(2 * tile.side);
    if (!tile.high) tile.first += (long long)p.n_high * padded_area(2 * p.at.block);
    tile.first += 2 * tile.line * (2 * tile.side + 6) * 8;
    return tile;
}

INLINE void fetch(const Arguments& p, unsigned lines, unsigned full, unsigned empty, int lane, int lanes) {
    int round = 0, slot = 0;
    for (int index = lane; index < p.tiles; index += lanes) {
        Tile tile = tile_at(p, index);
        int bytes = (2 * tile.lines + 5) * (2 * tile.side + 6) * 8;
        barrier_wait(empty + 8 * slot, round ^ 1);
        barrier_expect(full + 8 * slot, bytes);
        copy_bulk(lines + slot * SLOT_BYTES, (const char*)p.x + tile.first, bytes, full + 8 * slot);
        if (++slot == RING) slot = 0, round ^= 1;
    }
}

#include "turned.cuh"

// Two lines of N outputs: products, then bias, ReLU, the averages of their quads, and out.
template <int N>
INLINE void line_pair(const Arguments& p, const Tile& tile, unsigned weights, unsigned lines, int pair,
                      int pitch, const float (&bias)[2], int column) {
    float acc[2][N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[0][i] = acc[1][i] = 0;
    unsigned first = lines + 4 * pair * pitch;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        int dy = step / 2;
        unsigned a = (weights + dy / 2 * 8192) >> 4 | 1u << 16;
        unsigned long long left = 0x4000004000000000ull | (a + dy % 2 * 4 + step % 2 * 2);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned b = (first + (2 * i + dy) * pitch) >> 4 | 1u << 16;
            Wgmma<N>::run(acc[i], left, 0x0000000800000000ull | (b + step % 2 * 2), 1);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();

    int r = threadIdx.x % 32 / 4, line = tile.line + 2 * pair;
    long long row = (tile.high ? 0 : p.at.high_rows) +
                    (long long)(tile.block * tile.side + line) * tile.side + r;
    scalar* to = p.out + row * p.cout + column;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            unsigned packed[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float& v = acc[i][4 * j + 2 * k];
                float& w = acc[i][4 * j + 2 * k + 1];
                v += bias[k], w += bias[k];
                if (p.relu) v = fmaxf(v, 0.f), w = fmaxf(w, 0.f);
                packed[k] = transpose(pack_pair(v, w));
                v += w;
            }
            *(uint2*)(to + (long long)(i * tile.side + 8 * j) * p.cout) = make_uint2(packed[0], packed[1]);
        }
    }
    if (!tile.high) return;
    int half = tile.side / 2, y = line / 2;
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {  // columns 2c + e: the quad c of the eight pixels j + e
        int x = 4 * (j + r % 2) + r / 2;
        unsigned means[2];
#pragma unroll
        for (int k = 0; k < 2; k++)
            means[k] = transpose(pack_pair(0.25f * (acc[0][4 * j + 2 * k] + acc[1][4 * j + 2 * k]),
                                           0.25f * (acc[0][4 * j + 4 + 2 * k] + acc[1][4 * j + 4 + 2 * k])));
        // Only averages along the edge of a block are ever read.
        if (y == 0 || y == half - 1 || x == 0 || x == half - 1) {
            long long at = p.at.rows + (long long)(tile.block * half + y) * half + x;
            *(uint2*)(p.out + at * p.cout + column) = make_uint2(means[0], means[1]);
        }
    }
}

INLINE void multiply(const Arguments& p, unsigned weights, unsigned lines, unsigned full, unsigned empty,
                     unsigned weights_full, int slice, int lane, int lanes) {
    int group = threadIdx.x / 128, round = 0, slot = 0;
    int thread = threadIdx.x % 32, base = slice * 64 + threadIdx.x % 128 / 32 * 16;
    int column = base + thread % 4 * 4, channel = base + channel_of(thread);
    float bias[2] = {p.bias[channel], p.bias[channel + 2]};
    follow();
    for (int i = threadIdx.x; blockIdx.x == 0 && i < p.cout / 8; i += 256)
        *(uint4*)(p.out + (long long)p.at.zero * p.cout + i * 8) = make_uint4(0, 0, 0, 0);
    barrier_wait(weights_full, 0);
    for (int index = lane; index < p.tiles; index += lanes) {
        Tile tile = tile_at(p, index);
        int pitch = (2 * tile.side + 6) * 8;
        unsigned from = lines + slot * SLOT_BYTES;
        barrier_wait(full + 8 * slot, round);
        for (int pair = group; pair < tile.lines / 2; pair += 2) {
            if (tile.side == 64)
                line_pair<64>(p, tile, weights, from, pair, pitch, bias, column);
            else if (tile.side == 32)
                line_pair<32>(p, tile, weights, from, pair, pitch, bias, column);
            else
                line_pair<16>(p, tile, weights, from, pair, pitch, bias, column);
        }
        if (thread == 0) barrier_arrive(empty + 8 * slot);
        if (++slot == RING) slot = 0, round ^= 1;
    }
}

extern "C" __global__ void __launch_bounds__(288, 2) stem_conv(const __grid_constant__ Arguments p) {
    extern __shared__ char dynamic[];
    __shared__ unsigned long long barriers[2 * RING + 1];
    unsigned weights = (shared_address(dynamic) + 1023) & ~1023u, lines = weights + WEIGHT_BYTES;
    unsigned full = shared_address(barriers), empty = full + 8 * RING, weights_full = empty + 8 * RING;
    int slices = p.cout / 64, slice = blockIdx.x % slices;
    int lane = blockIdx.x / slices, lanes = gridDim.x / slices;
    if (threadIdx.x == 0) {
        for (int i = 0; i < RING; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 8);
        }
        barrier_init(weights_full, 1);
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= 256) {
        if (threadIdx.x > 256) return;
        barrier_expect(weights_full, WEIGHT_BYTES);
        for (int i = 0; i < 4; i++)
            copy_bulk(weights + i * 8192, p.weights + (long long)(i * p.cout_pad + slice * 64) * 64, 8192,
                      weights_full);
        follow();
        fetch(p, lines, full, empty, lane, lanes);
    } else {
        multiply(p, weights, lines, full, empty, weights_full, slice, lane, lanes);
    }
}
