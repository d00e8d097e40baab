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
// multiply, each a tile of its own, three warps fetch pixels, one warp fetches weights.
//
// Pixels wait in a ring of slots. Two tiles of a kind are taken at a time, one by each warpgroup, and
// the slots of the two take turns: slot by slot, or where a tile has fewer slots than the ring tile by
// tile, so that one warpgroup multiplies while the other stores. Either way a warpgroup is never two
// rounds of the ring from the slot it waits for, where the parity of a barrier would say nothing.
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
    int stages, ring, plane;
};

// Shared memory: the weights, then the ring of pixel slots. A slot holds eight planes of `plane` bytes,
// one for each eight channels; a plane 16 bytes for each pixel.
struct Shared {
    unsigned weights, pixels, full, empty, weights_full, weights_empty;
};

// This thread block's share of the work.
struct Share {
    int slice, part, lane, lanes, first_chunk, last_chunk, main_chunks, stages;
    INLINE int stage_of(int chunk) const {
        return TAPS * min(chunk, main_chunks) + max(chunk - main_chunks, 0);
    }
    INLINE int slots(int kind) const {
        return kind == ROWS ? stages : last_chunk - first_chunk;
    }
};

// The tiles of one resolution that a thread block takes two by two.
struct Region {
    int first, end, kind, slots;
    bool by_tile;  // whether slots take turns tile by tile
};

INLINE Region region_at(const Arguments& p, const Share& share, int low) {
    Region region;
    region.first = (low ? p.tiling.high_tiles : 0) + share.lane;
    region.end = low ? p.tiling.tiles : p.tiling.high_tiles;
    region.kind = low ? p.tiling.low_kind : p.tiling.high_kind;
    region.slots = share.slots(region.kind);
    region.by_tile = region.slots < p.ring;
    return region;
}

// A position in a ring of `size` slots, with the parity of the round.
struct Cursor {
    int at, round;
    INLINE void advance(int size, int by = 1) {
        at += by;
        if (at >= size) at -= size, round ^= 1;
    }
};

// -- the fetching warps ------------------------------------------------------------------------------

// A thread copies eight channels (its place among eight threads) of every 12th row of a tile.
constexpr int FETCHERS = 96, STEP = FETCHERS / 8;
constexpr int HALO_COPIES = (PAIR_ROWS + STEP - 1) / STEP, TILE_COPIES = (TILE + STEP - 1) / STEP;

// Fill the next slot of the ring with 64 channels of the rows of x.
template <int COPIES>
INLINE void fill(const Arguments& p, const Shared& s, Cursor& slot, const scalar* x, int width,
                 int count, const int (&rows)[COPIES]) {
    int thread = threadIdx.x - 256, eight = thread % 8;
    barrier_wait(s.empty + 8 * slot.at, slot.round ^ 1);
    unsigned to = s.pixels + (slot.at * 8 + eight) * p.plane + thread / 8 * 16;
    x += eight * 8;
    asm volatile("" : "+r"(width));  // else all products with it are kept, in memory
#pragma unroll
    for (int i = 0; i < COPIES; i++)
        if (thread / 8 + STEP * i < count)
            copy_async(to + i * STEP * 16, x + (long long)rows[i] * width);
    copy_async_arrive(s.full + 8 * slot.at);
    slot.advance(p.ring);
}

// Rows of the second input that the output pixels of a tile read through the 1×1 convolution.
INLINE void second_rows(const Arguments& p, const Tile& tile, int index, int (&rows)[TILE_COPIES]) {
    Patch patches[2];
    const int4* from = (const int4*)(p.patches + (long long)index * TILE_PITCH + PATCHES_AT);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int4 v = tile.kind == ROWS ? make_int4(0, 0, 0, 0) : __ldg(from + i);
        patches[i] = {v.x, v.y, v.z, v.w};
    }
    int side = tile.high ? p.block2 : p.block2 / 2, start = tile.high ? 0 : p.n_high * p.block2 * p.block2;
#pragma unroll
    for (int i = 0; i < TILE_COPIES; i++) {
        int n = (threadIdx.x - 256) / 8 + STEP * i, m = tile.first + n;
        Patch patch = line_of(tile.kind, patches, n / 8, 0);
        int y = patch.y * p.stride2, x = (patch.x + n % 8) * p.stride2;
        if (tile.kind == ROWS)
            rows[i] = m < p.pitch ? __ldg(p.table2 + m) : 0;
        else
            rows[i] = patch.block < 0 ? 0 : start + (patch.block * side + y) * side + x;
    }
}

INLINE void halo_rows(const Arguments& p, int index, int (&rows)[HALO_COPIES]) {
    const int* from = p.patches + (long long)index * TILE_PITCH + (threadIdx.x - 256) / 8;
#pragma unroll
    for (int i = 0; i < HALO_COPIES; i++)
        rows[i] = index < p.tiling.tiles ? __ldg(from + STEP * i) : 0;
}

INLINE void tap_rows(const Arguments& p, const Tile& tile, int tap, int (&rows)[TILE_COPIES]) {
    int m = tile.first + (threadIdx.x - 256) / 8;
    const int* from = p.table + tap * p.pitch + m;
#pragma unroll
    for (int i = 0; i < TILE_COPIES; i++)
        rows[i] = m + STEP * i < p.pitch ? __ldg(from + STEP * i) : p.at.zero;
}

INLINE void fetch_second(const Arguments& p, const Shared& s, Cursor& slot, int chunk, int index) {
    int rows[TILE_COPIES];
    second_rows(p, tile_at(p.tiling, index), index, rows);
    fill(p, s, slot, p.x2 + (chunk - p.cin / 64) * 64, p.cin2, TILE, rows);
}

// The slots of one tile from chunk `from` up to `to`; `rows` from halo_rows.
INLINE void fetch_halos(const Arguments& p, const Shared& s, Cursor& slot, int kind, int from, int to,
                        int index, const int (&rows)[HALO_COPIES]) {
    int count = kind == TALL ? TALL_ROWS : PAIR_ROWS, main = min(to, p.cin / 64);
    for (int chunk = from; chunk < main; chunk++)
        fill(p, s, slot, p.x + chunk * 64, p.cin, count, rows);
    for (int chunk = max(from, main); chunk < to; chunk++) fetch_second(p, s, slot, chunk, index);
}

INLINE void fetch_patches(const Arguments& p, const Shared& s, const Share& share, Cursor& slot,
                          const Region& region) {
    for (int index = region.first; index < region.end; index += 2 * share.lanes) {
        int other = index + share.lanes, first[HALO_COPIES], second[HALO_COPIES];
        halo_rows(p, index, first);
        halo_rows(p, other, second);
        int step = region.by_tile ? region.slots : 1;
        for (int from = share.first_chunk; from < share.last_chunk; from += step) {
            fetch_halos(p, s, slot, region.kind, from, from + step, index, first);
            if (other < region.end)
                fetch_halos(p, s, slot, region.kind, from, from + step, other, second);
        }
    }
}

INLINE void fetch_rows(const Arguments& p, const Shared& s, const Share& share, Cursor& slot,
                       const Region& region) {
    for (int index = region.first; index < region.end; index += 2 * share.lanes) {
        int other = index + share.lanes;
        Tile tile = tile_at(p.tiling, index), second = tile_at(p.tiling, other);
        int rows[2][TILE_COPIES], next[2][TILE_COPIES];
        tap_rows(p, tile, 0, next[0]);
        tap_rows(p, second, 0, next[1]);
        for (int chunk = share.first_chunk; chunk < share.last_chunk; chunk++) {
            if (chunk >= share.main_chunks) {
                fetch_second(p, s, slot, chunk, index);
                if (other < region.end) fetch_second(p, s, slot, chunk, other);
                continue;
            }
            for (int tap = 0; tap < TAPS; tap++) {
#pragma unroll
                for (int i = 0; i < TILE_COPIES; i++)
                    rows[0][i] = next[0][i], rows[1][i] = next[1][i];
                int after = tap == TAPS - 1 ? 0 : tap + 1;
                tap_rows(p, tile, after, next[0]);
                tap_rows(p, second, after, next[1]);
                fill(p, s, slot, p.x + chunk * 64, p.cin, TILE, rows[0]);
                if (other < region.end) fill(p, s, slot, p.x + chunk * 64, p.cin, TILE, rows[1]);
            }
        }
    }
}

INLINE void fetch_pixels(const Arguments& p, const Shared& s, const Share& share) {
    Cursor slot = {0, 0};
    for (int low = 0; low < 2; low++) {
        Region region = region_at(p, share, low);
        if (region.kind == ROWS)
            fetch_rows(p, s, share, slot, region);
        else
            fetch_patches(p, s, share, slot, region);
    }
}

INLINE void fetch_weights(const Arguments& p, const Shared& s, const Share& share) {
    if (threadIdx.x % 32) return;
    const scalar* from =
        p.weights + ((long long)share.stage_of(share.first_chunk) * p.cout_pad + share.slice * 64) * 64;
    Cursor slot = {0, 0};
    bool again = false;
    for (int low = 0; low < 2; low++) {
        Region region = region_at(p, share, low);
        for (int index = region.first; index < region.end; index += 2 * share.lanes) {
            for (int i = 0; i < share.stages; i++) {
                if (again) barrier_wait(s.weights_empty + 8 * slot.at, slot.round ^ 1);
                barrier_expect(s.weights_full + 8 * slot.at, STAGE_BYTES);
                copy_bulk(s.weights + slot.at * STAGE_BYTES, from + (long long)i * p.cout_pad * 64,
                          STAGE_BYTES, s.weights_full + 8 * slot.at);
                slot.advance(p.stages);
                again = again || slot.at == 0;
            }
            if (SB_RESIDENT) return;
        }
    }
}

// -- the multiplying warpgroups ----------------------------------------------------------------------

// Matrix descriptors, lower halves: an address in units of 16 bytes and the distance of what is eight
// channels on. Pixels are not swizzled, weights are as in `tile_descriptor`.
INLINE unsigned weight_descriptor(const Shared& s, int stage) {
    return (s.weights + stage * STAGE_BYTES) >> 4 | 1u << 16;
}
INLINE unsigned pixel_descriptor(const Arguments& p, const Shared& s, int slot) {
    return (s.pixels + slot * 8 * p.plane) >> 4 | (unsigned)(p.plane >> 4) << 16;
}
// The products of 64 channels of one tap; `line` is the distance of lines of eight pixels, in bytes.
INLINE void multiply_tap(float (&acc)[64], unsigned a, unsigned b, int line, int plane) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned long long left = 0x4000004000000000ull | (a + 2 * i);
        unsigned long long right = (unsigned long long)(line >> 4) << 32 | (b + i * (plane >> 3));
        Wgmma<128>::run(acc, left, right, 1);
    }
}

#include "patch_epilogue.cuh"

// One multiplying warpgroup: every second tile of the thread block.
struct Multiplier {
    const Arguments& p;
    const Shared& s;
    const Share& share;
    int group;
    bool leader;
    Cursor slot, weight;
    int held_slot, held_weight;  // what the products in flight read; -1: nothing
    bool fresh;                  // whether weights may still be on their way

    INLINE void release() {
        if (leader && held_slot >= 0) barrier_arrive(s.empty + 8 * held_slot);
        if (!SB_RESIDENT && leader && held_weight >= 0)
            barrier_arrive(s.weights_empty + 8 * held_weight);
        held_slot = held_weight = -1;
    }
    INLINE void wait_for_pixels() {
        barrier_wait(s.full + 8 * slot.at, slot.round);
        fence_proxy();  // cp.async wrote through the generic proxy
    }
    INLINE void wait_for_weights() {
        if (!SB_RESIDENT || fresh) barrier_wait(s.weights_full + 8 * weight.at, weight.round);
    }
    // All but the products just issued have finished: what those read may be overwritten.
    INLINE void retire(int slot_read, int weight_read) {
        wgmma_commit();
        wgmma_wait<1>();
        release();
        held_slot = slot_read;
        held_weight = weight_read;
    }

    // A slot with the halo of a tile: nine taps. `lines`: staged pixels from one line to the next.
    INLINE void halo_slot(float (&acc)[64], int lines) {
        wait_for_pixels();
        unsigned b = pixel_descriptor(p, s, slot.at);
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) {
            wait_for_weights();
            multiply_tap(acc, weight_descriptor(s, weight.at), b + tap / 3 * lines + tap % 3,
                         HALO_WIDTH * 16, p.plane);
            if (!SB_RESIDENT || tap == TAPS - 1)
                retire(tap == TAPS - 1 ? slot.at : -1, weight.at);
            weight.advance(p.stages);
        }
        slot.advance(p.ring);
    }
    // A slot with the pixels of one tap.
    INLINE void tap_slot(float (&acc)[64]) {
        wait_for_pixels();
        wait_for_weights();
        multiply_tap(acc, weight_descriptor(s, weight.at), pixel_descriptor(p, s, slot.at), 128,
                     p.plane);
        retire(slot.at, weight.at);
        weight.advance(p.stages);
        slot.advance(p.ring);
    }
    INLINE void sum(float (&acc)[64], const Region& region, bool alone) {
        int skipped = alone ? 0 : region.by_tile ? region.slots : 1;
#pragma unroll
        for (int i = 0; i < 64; i++) acc[i] = 0;
        int halos = region.kind == ROWS ? 0 : min(share.main_chunks, share.last_chunk) - share.first_chunk;
        halos = max(halos, 0);
        if (region.by_tile && group) slot.advance(p.ring, skipped);
        for (int i = 0; i < halos; i++) {
            if (!region.by_tile && group) slot.advance(p.ring, skipped);
            halo_slot(acc, region.kind == PAIR ? 2 * HALO_WIDTH : HALO_WIDTH);
            if (!region.by_tile && !group) slot.advance(p.ring, skipped);
        }
        for (int i = halos; i < region.slots; i++) {
            if (!region.by_tile && group) slot.advance(p.ring, skipped);
            tap_slot(acc);
            if (!region.by_tile && !group) slot.advance(p.ring, skipped);
        }
        if (region.by_tile && !group) slot.advance(p.ring, skipped);
        wgmma_wait<0>();
        release();
        fresh = false;
    }
    // Without a tile of its own, a warpgroup lets the weights of the other's stream by.
    INLINE void stand_by() {
        for (int i = 0; i < share.stages && !SB_RESIDENT; i++) {
            barrier_wait(s.weights_full + 8 * weight.at, weight.round);
            if (leader) barrier_arrive(s.weights_empty + 8 * weight.at);
            weight.advance(p.stages);
        }
    }
};

INLINE void multiply(const Arguments& p, const Shared& s, const Share& share, int* arrived) {
    int group = threadIdx.x / 128;
    Multiplier multiplier = {p, s, share, group, threadIdx.x % 32 == 0, {0, 0}, {0, 0}, -1, -1, true};
    for (int low = 0; low < 2; low++) {
        Region region = region_at(p, share, low);
        // After a tile without a companion a warpgroup may be behind: both start a region together.
        if (low && p.tiling.high_tiles) {
            sync_threads(4, 256);
            int tiles = max(0, (p.tiling.high_tiles - share.lane + share.lanes - 1) / share.lanes);
            if (group && tiles % 2) {
                int passed = share.slots(p.tiling.high_kind);
                for (int i = 0; i < passed; i++) multiplier.slot.advance(p.ring);
            }
        }
        for (int index = region.first; index < region.end; index += 2 * share.lanes) {
            int mine = index + group * share.lanes, other = index + (1 - group) * share.lanes;
            if (mine >= region.end) {
                multiplier.stand_by();
                continue;
            }
            Tile tile = tile_at(p.tiling, mine);
            Rows rows = rows_of(p, tile, mine);
            float acc[64];
            if (SB_RESIDENT) multiplier.weight = {0, 0};
            multiplier.sum(acc, region, other >= region.end);
            if (p.parts == 1 || add_parts(p, acc, mine, share, group, arrived + group))
                finish(p, acc, tile, rows, share.slice);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) patch_conv(const __grid_constant__ Arguments p) {
    extern __shared__ char dynamic[];
    __shared__ unsigned long long barriers[2 * MAX_STAGES + 2 * MAX_RING];
    __shared__ int arrived[2];
    Shared s;
    s.weights = (shared_address(dynamic) + 1023) & ~1023u;
    s.pixels = s.weights + p.stages * STAGE_BYTES;
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
    share.stages = share.stage_of(share.last_chunk) - share.stage_of(share.first_chunk);

    if (threadIdx.x == 0) {
        for (int i = 0; i < p.ring; i++) {
            barrier_init(s.full + 8 * i, FETCHERS);
            barrier_init(s.empty + 8 * i, 4);
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
    if (threadIdx.x >= 256 + FETCHERS)
        fetch_weights(p, s, share);
    else if (threadIdx.x >= 256)
        fetch_pixels(p, s, share);
    else
        multiply(p, s, share, arrived);
}
