// 3×3 convolution over both resolutions in one launch, on Hopper's warpgroup matrix units.
//
// The product is turned round: output channels are its rows (64 a warpgroup), pixels its columns
// (128 a tile). Pixels are fetched once with their halo into shared memory, and all nine taps read
// them there, each at another offset: without swizzle, eight neighbouring pixels are 128 consecutive
// bytes wherever they start. Blocks too small for that, and stride 2, fetch the pixels of each tap
// through a neighbour table (ROWS tiles, see patch_tiles.cuh).
//
// A thread block stays on its multiprocessor and takes one tile after the other. Its 64 output
// channels never change, nor does its part of the inner dimension, so that the weights of both are
// fetched once (RESIDENT) where they fit; else they stream by, once for two tiles. Two warpgroups
// multiply, each a tile of its own, four warps fetch pixels, one warp fetches weights.
//
//   x        (extended rows, cin)      input; see tables.cu for extended buffers
//   weights  (stages, cout_pad, 64)    packed by `pack_patch_weights`: a stage is one tap of 64 input
//                                      channels, taps innermost; then one stage for each 64 channels
//                                      of the second input
//   bias     (cout_pad) float32
//   x2       (.., cin2) second input through a 1×1 convolution; table2 (pitch) int32: its row for
//            each GEMM row (ROWS tiles); its high blocks have sides of block2, read every stride2
//   table    (9, pitch) int32          row of x that a tap reads, per GEMM row (ROWS tiles)
//   own      (pitch) int32             output row of each GEMM row (ROWS tiles)
//   patches  (tiles, TILE_PITCH) int32 from patch_tables.cu (TALL and PAIR tiles)
//   addend   (rows, cout)              added before the ReLU (ADD)
//   post     (2, cout_pad) float32     the result becomes relu(result * post[0] + post[1]) (POST)
//   out      (extended rows, cout)     with the averages that low neighbours will read
//   work     (tiles, cout/64, parts, 64*128) float32, count (tiles, cout/64) int32 zeros: for parts > 1
//
// cin, cin2 and cout are multiples of 64. parts: how many thread blocks share the inner dimension;
// part i takes chunks (64 channels each, of x then of x2) from chunk_of[i] up to chunk_of[i + 1].
#include "dtypes.cuh"
#include "wgmma.cuh"
#include "pipeline.cuh"
#include "neighbours.cuh"
#include "patch_tiles.cuh"

constexpr int TAPS = 9, STAGE_BYTES = 64 * 64 * 2, MAX_PARTS = 8, MAX_STAGES = 32, MAX_RING = 8;

struct Arguments {
    const scalar* x;
    const scalar* weights;
    const float* bias;
    const scalar* x2;
    const int* table2;
    const int* table;
    const int* own;
    const int* patches;
    const scalar* addend;
    const float* post;
    scalar* out;
    float* work;
    int* count;
    Extended at;  // of the output, and of x where a tile is TALL or PAIR
    Tiling tiling;
    int pitch, n_high, cin, cin2, cout, cout_pad, block2, stride2;
    int parts, chunk_of[MAX_PARTS + 1];
    int resident, stages, ring, plane;
};

// With its patches; a bare `tile_at` knows the kind alone.
INLINE Tile whole_tile(const Arguments& p, int index) {
    Tile tile = tile_at(p.tiling, index);
    if (tile.kind == ROWS) return tile;
    const int4* from = (const int4*)(p.patches + (long long)index * TILE_PITCH + PATCHES_AT);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int4 v = __ldg(from + i);
        tile.patches[i] = {v.x, v.y, v.z, v.w};
    }
    return tile;
}

// Shared memory after the weights: the ring of pixel slots, then the rows to fetch. A slot holds
// eight planes of `plane` bytes, one for each eight channels; a plane 16 bytes for each pixel.
struct Shared {
    unsigned weights, pixels;
    int* rows;
    unsigned full, empty, weights_full, weights_empty;
};

// This thread block's share of the work.
struct Share {
    int slice, part, lane, lanes, first_chunk, last_chunk, main_chunks, stages;
    int turn;  // chunks after which it is the other warpgroup's turn to be given pixels
    INLINE int taps(int chunk) const { return chunk < main_chunks ? TAPS : 1; }
    INLINE int stage_of(int chunk) const {
        return TAPS * min(chunk, main_chunks) + max(chunk - main_chunks, 0);
    }
};

// A position in a ring of `size` slots, with the parity of the round.
struct Cursor {
    int at, round;
    INLINE void advance(int size) {
        if (++at == size) at = 0, round ^= 1;
    }
};

// Fill the next slot of the ring with 64 channels of `count` rows of x.
template <class Rows>
INLINE void fill(const Arguments& p, const Shared& s, Cursor& slot, const scalar* x, int width,
                 int count, Rows row_of) {
    int thread = threadIdx.x - 256, eight = thread % 8;
    barrier_wait(s.empty + 8 * slot.at, slot.round ^ 1);
    unsigned to = s.pixels + (slot.at * 8 + eight) * p.plane;
    for (int r = thread / 8; r < count; r += 16)
        copy_async(to + r * 16, x + (long long)row_of(r) * width + eight * 8);
    copy_async_arrive(s.full + 8 * slot.at);
    slot.advance(p.ring);
}

// Look up the input rows of a tile.
INLINE void look_up(const Arguments& p, const Tile& tile, int index, int* rows) {
    int thread = threadIdx.x - 256;
    sync_threads(3, 128);  // everyone has read the rows of the tile before
    if (tile.kind == ROWS) {
        int m = tile.first + thread;
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++)
            rows[tap * TILE + thread] = m < p.pitch ? p.table[tap * p.pitch + m] : p.at.zero;
    } else {
        const int* from = p.patches + (long long)index * TILE_PITCH;
        for (int r = thread; r < PAIR_ROWS; r += 128) rows[r] = __ldg(from + r);
    }
    sync_threads(3, 128);
}

// Row of the second input that output pixel `n` of a tile reads through the 1×1 convolution.
INLINE int second_row(const Arguments& p, const Tile& tile, int n) {
    if (tile.kind == ROWS) return tile.first + n < p.pitch ? p.table2[tile.first + n] : 0;
    int side = tile.high ? p.block2 : p.block2 / 2;
    Patch patch = line_of(tile, n / 8, 0);
    if (patch.block < 0) return 0;
    int start = tile.high ? 0 : p.n_high * p.block2 * p.block2;
    return start + (patch.block * side + patch.y * p.stride2) * side + (patch.x + n % 8) * p.stride2;
}

INLINE void fetch_pixels(const Arguments& p, const Shared& s, const Share& share) {
    Cursor slot = {0, 0};
    for (int index = share.lane; index < p.tiling.tiles; index += 2 * share.lanes) {
        for (int begin = share.first_chunk; begin < share.last_chunk; begin += share.turn) {
            for (int group = 0; group < 2; group++) {
                int mine = index + group * share.lanes;
                if (mine >= p.tiling.tiles) break;
                Tile tile = whole_tile(p, mine);
                int* rows = s.rows + (p.resident ? 0 : group * TAPS * TILE);
                if (begin == share.first_chunk) look_up(p, tile, mine, rows);
                for (int chunk = begin; chunk < begin + share.turn; chunk++) {
                    const scalar* x = p.x + chunk * 64;
                    if (chunk >= share.main_chunks) {
                        fill(p, s, slot, p.x2 + (chunk - share.main_chunks) * 64, p.cin2, TILE,
                             [&](int r) { return second_row(p, tile, r); });
                    } else if (tile.kind == ROWS) {
                        for (int tap = 0; tap < TAPS; tap++)
                            fill(p, s, slot, x, p.cin, TILE,
                                 [&](int r) { return rows[tap * TILE + r]; });
                    } else {
                        fill(p, s, slot, x, p.cin, tile.kind == TALL ? TALL_ROWS : PAIR_ROWS,
                             [&](int r) { return rows[r]; });
                    }
                }
            }
        }
    }
}

INLINE void fetch_weights(const Arguments& p, const Shared& s, const Share& share) {
    if (threadIdx.x % 32) return;
    const scalar* from =
        p.weights + ((long long)share.stage_of(share.first_chunk) * p.cout_pad + share.slice * 64) * 64;
    Cursor slot = {0, 0};
    bool again = false;
    for (int index = share.lane; index < p.tiling.tiles; index += 2 * share.lanes) {
        for (int i = 0; i < share.stages; i++) {
            if (again) barrier_wait(s.weights_empty + 8 * slot.at, slot.round ^ 1);
            barrier_expect(s.weights_full + 8 * slot.at, STAGE_BYTES);
            copy_bulk(s.weights + slot.at * STAGE_BYTES, from + (long long)i * p.cout_pad * 64,
                      STAGE_BYTES, s.weights_full + 8 * slot.at);
            slot.advance(p.stages);
            again = again || slot.at == 0;
        }
        if (p.resident) return;
    }
}

// Matrix descriptor of pixels: no swizzle, groups of eight pixels `group` bytes apart.
INLINE unsigned long long pixel_descriptor(unsigned address, int plane, int group) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | (unsigned long long)(plane >> 4) << 16 |
           (unsigned long long)(group >> 4) << 32;
}

#include "patch_epilogue.cuh"

// One multiplying warpgroup: every second tile of the thread block.
INLINE void multiply(const Arguments& p, const Shared& s, const Share& share, int* arrived) {
    int group = threadIdx.x / 128;
    bool leader = threadIdx.x % 32 == 0;
    Cursor slot = {0, 0}, weight = {0, 0};
    // Pixels for the other warpgroup. Both pass every slot, so that neither is ever two rounds ahead,
    // where parities would repeat.
    auto skip = [&](int kind, int begin) {
        for (int chunk = begin; chunk < begin + share.turn; chunk++) {
            int slots = kind == ROWS ? share.taps(chunk) : 1;
            for (int i = 0; i < slots; i++) {
                barrier_wait(s.full + 8 * slot.at, slot.round);
                if (leader) barrier_arrive(s.empty + 8 * slot.at);
                slot.advance(p.ring);
            }
        }
    };
    auto pass_by = [&](int kind) {  // all that the other warpgroup's last tile needs
        for (int begin = share.first_chunk; begin < share.last_chunk; begin += share.turn) {
            skip(kind, begin);
            for (int i = share.taps(begin); i > 0 && !p.resident; i--) {
                barrier_wait(s.weights_full + 8 * weight.at, weight.round);
                if (leader) barrier_arrive(s.weights_empty + 8 * weight.at);
                weight.advance(p.stages);
            }
        }
    };
    for (int index = share.lane; index < p.tiling.tiles; index += 2 * share.lanes) {
        int mine = index + group * share.lanes, other = index + (1 - group) * share.lanes;
        if (mine >= p.tiling.tiles) {  // no tile is left for this warpgroup
            pass_by(tile_at(p.tiling, index).kind);
            return;
        }
        Tile tile = tile_at(p.tiling, mine);
        Rows rows = rows_of(p, tile, mine);
        int other_kind = other < p.tiling.tiles ? tile_at(p.tiling, other).kind : -1;
        float acc[64];
        if (p.resident) weight = {0, 0};
        int spent_pixels = -1, spent_weights = -1, started = 0;
        for (int begin = share.first_chunk; begin < share.last_chunk; begin += share.turn) {
            if (group) skip(other_kind, begin);
            for (int chunk = begin; chunk < begin + share.turn; chunk++) {
                bool each = tile.kind == ROWS || chunk >= share.main_chunks;  // a slot for each tap
                int taps = share.taps(chunk), stride = each ? 128 : HALO_WIDTH * 16;
                for (int tap = 0; tap < taps; tap++) {
                    if (each || tap == 0) {
                        barrier_wait(s.full + 8 * slot.at, slot.round);
                        fence_proxy();  // cp.async wrote through the generic proxy
                    }
                    barrier_wait(s.weights_full + 8 * weight.at, weight.round);
                    unsigned a = s.weights + weight.at * STAGE_BYTES;
                    unsigned b = s.pixels + slot.at * 8 * p.plane;
                    if (!each) b += tap_offset(tile, tap);
                    wgmma_fence();
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        Wgmma<128>::run(acc, tile_descriptor(a + 32 * i),
                                        pixel_descriptor(b + 2 * i * p.plane, p.plane, stride),
                                        started || i);
                    wgmma_commit();
                    wgmma_wait<1>();
                    // The products before these have finished: what they read may be overwritten.
                    if (leader && spent_pixels >= 0) barrier_arrive(s.empty + 8 * spent_pixels);
                    if (leader && spent_weights >= 0)
                        barrier_arrive(s.weights_empty + 8 * spent_weights);
                    bool last = each || tap == taps - 1;
                    spent_pixels = last ? slot.at : -1;
                    spent_weights = p.resident ? -1 : weight.at;
                    if (last) slot.advance(p.ring);
                    weight.advance(p.stages);
                    started = 1;
                }
            }
            if (!group && other_kind >= 0) skip(other_kind, begin);
        }
        wgmma_wait<0>();
        if (leader && spent_pixels >= 0) barrier_arrive(s.empty + 8 * spent_pixels);
        if (leader && spent_weights >= 0) barrier_arrive(s.weights_empty + 8 * spent_weights);
        if (p.parts == 1 || add_parts(p, acc, mine, share, group, arrived + group))
            finish(p, acc, tile, rows, share.slice);
    }
}

extern "C" __global__ void __launch_bounds__(416, 1) patch_conv(const __grid_constant__ Arguments p) {
    extern __shared__ char dynamic[];
    __shared__ unsigned long long barriers[2 * MAX_STAGES + 2 * MAX_RING];
    __shared__ int arrived[2];
    unsigned memory = (shared_address(dynamic) + 1023) & ~1023u;
    Shared s;
    s.weights = memory;
    s.pixels = memory + p.stages * STAGE_BYTES;
    s.rows = (int*)(dynamic + (s.pixels + p.ring * 8 * p.plane - shared_address(dynamic)));
    s.full = shared_address(barriers);
    s.empty = s.full + 8 * MAX_RING;
    s.weights_full = s.empty + 8 * MAX_RING;
    s.weights_empty = s.weights_full + 8 * MAX_STAGES;

    int slices = p.cout / 64, units = slices * p.parts, unit = blockIdx.x % units;
    Share share;
    share.slice = unit % slices;
    share.part = unit / slices;
    share.lane = blockIdx.x / units;
    share.lanes = gridDim.x / units;
    share.first_chunk = p.chunk_of[share.part];
    share.last_chunk = p.chunk_of[share.part + 1];
    share.main_chunks = p.cin / 64;
    share.turn = p.resident ? share.last_chunk - share.first_chunk : 1;
    share.stages = share.stage_of(share.last_chunk) - share.stage_of(share.first_chunk);

    if (threadIdx.x == 0) {
        for (int i = 0; i < p.ring; i++) {
            barrier_init(s.full + 8 * i, 128);
            barrier_init(s.empty + 8 * i, 8);
        }
        for (int i = 0; i < p.stages; i++) {
            barrier_init(s.weights_full + 8 * i, 1);
            barrier_init(s.weights_empty + 8 * i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (blockIdx.x == 0 && threadIdx.x < p.cout / 8)
        *(uint4*)(p.out + (long long)p.at.zero * p.cout + threadIdx.x * 8) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    if (threadIdx.x >= 384)
        fetch_weights(p, s, share);
    else if (threadIdx.x >= 256)
        fetch_pixels(p, s, share);
    else
        multiply(p, s, share, arrived);
}
