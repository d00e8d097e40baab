// 3×3 convolution over both resolutions in one launch, on Hopper's warpgroup matrix units.
//
// The product is turned round: output channels are its rows (64 a warpgroup), pixels its columns
// (128 a tile, or with TRIPLES 192 for some). Pixels are fetched once with their halo into shared memory,
// and all nine taps read them there, each at another offset: without swizzle, eight neighbouring pixels
// are 128 consecutive bytes wherever they start. patch_tiles.cuh has the kinds of tiles.
//
// A thread block stays on its multiprocessor and takes one tile after the other. Its 64 output
// channels never change, nor does its part of the inner dimension, so that the weights of both are
// fetched once (RESIDENT) where they fit; else they stream by, once for the tiles that are taken at a
// time. Two warpgroups multiply, seven warps fetch pixels, one warp fetches weights.
//
// Pixels wait in a ring of slots. Two tiles of a kind are taken at a time, one by each warpgroup, and
// the slots of the two take turns: slot by slot, or where a tile has fewer slots than the ring tile by
// tile, so that one warpgroup multiplies while the other stores. The last of an odd number of tiles,
// and any WOVEN one, is shared: each warpgroup takes half its lines, from the same slots. However that
// goes, a warpgroup is never two rounds of the ring from the slot it waits for, where the parity of a
// barrier would say nothing.
//
//   x        (extended rows, cin)      input; see tables.cu for extended buffers
//   weights  (stages, cout_pad, 64)    packed by `pack_patch_weights`: a stage is one tap of 64 input
//                                      channels, taps innermost, column by column; then one stage for
//                                      each 64 channels of the second input
//   bias     (cout_pad) float32
//   x2       (extended rows, width2)   second input through a 1×1 convolution, at stride2 times the
//                                      output's scale, read every stride2: the 64 · chunks2 channels
//                                      from step2 for each 64 output channels on (a residual is its own
//                                      64 channels through the identity)
//   table    (9, pitch) int32          row of x that a tap reads, per GEMM row (ROWS tiles)
//   own      (pitch) int32             output row of each GEMM row (ROWS tiles)
//   patches  (tiles, TILE_PITCH) int32 from patch_tables.cu (all tiles but ROWS)
//   post     (2, cout_pad) float32     the result becomes relu(result * post[0] + post[1]) (POST)
//   out      (extended rows, cout)     with the averages that low neighbours will read
//   work     (tiles, cout/64, parts, 64*128, or with TRIPLES 64*192) float32 and
//   count    (tiles, cout/64, 2) int32 zeros, for parts > 1; the halves of a shared tile are counted apart
//
// cin and cout are multiples of 64. parts: how many thread blocks share the inner dimension;
// part i takes chunks (64 channels each, of x then of x2) from chunk_of[i] up to chunk_of[i + 1].
#include "dtypes.cuh"
#include "wgmma.cuh"
#include "pipeline.cuh"
#include "neighbours.cuh"
#include "patch_tiles.cuh"
#include "follow.cuh"

constexpr int STAGE_BYTES = 64 * 64 * 2, OUTPUT_BYTES = PATCH * (SB_TRIPLES ? 3 : 2) * 5;
constexpr int MAX_PARTS = 8, MAX_STAGES = 32, MAX_RING = 8;

struct Arguments {
    const scalar* x;
    const scalar* weights;
    const float* bias;
    const scalar* x2;
    const int* table;
    const int* own;
    const int* patches;
    const float* post;
    scalar* out;
    float* work;
    int* count;
    Extended at;  // of the output, and of x where a tile is not ROWS
    Tiling tiling;
    int pitch, cin, cout, cout_pad, width2, step2, stride2;
    int parts, chunk_of[MAX_PARTS + 1];
    int stages, ring, plane;
};

// Shared memory: the weights, then the ring of pixel slots, then for each slot the output rows of the
// tile that ends with it. A slot holds eight planes of `plane` bytes, one for each eight channels; a
// plane 16 bytes for each pixel.
struct Shared {
    unsigned weights, pixels, rows, full, empty, weights_full, weights_empty;
};

// This thread block's share of the work.
struct Share {
    int slice, part, lane, lanes, first_chunk, last_chunk, main_chunks, stages;
    INLINE int stage_of(int chunk) const {
        return 9 * min(chunk, main_chunks) + max(chunk - main_chunks, 0);
    }
};

// How a kind of tile waits in the ring: pixels of a slot; slots for 64 channels; pixels from one line
// of eight to the next, from where one tap reads to where the tap below does and the tap to its right.
struct Staging {
    int count, slots, line, down, right;
};

INLINE Staging staging_of(int kind, int size = 2) {
    if (kind == TALL) return {TALL_ROWS, 1, 10, 10, 1};
    if (kind == PATCHES) return {PATCH_ROWS * size, 1, 10, 10 * size, 1};
    if (kind == WOVEN) return {WOVEN_ROWS, 1, 8, 48, 8};
    return {TILE, 9, 8, 0, 0};
}

// The tiles of one resolution that a thread block takes; the first region may have those of both.
struct Region {
    int first, end, kind, slots;  // slots: of one tile
    int step;                     // from the tiles that are taken at a time to the next
    bool by_tile;                 // whether slots of two tiles take turns tile by tile
    Staging staging;              // of a tile that is none of three patches
    // Of a tile of the region; only the numbers of pixels and the distance down depend on it.
    INLINE Staging staging_at(const Tile& tile) const {
        return SB_TRIPLES && kind == PATCHES ? staging_of(PATCHES, tile.size) : staging;
    }
    // Whether the tile is shared by the warpgroups, not one of two.
    INLINE bool shares(int index, int lanes) const {
        return kind == WOVEN || index + lanes >= end;
    }
};

// A WOVEN tile has lines of two columns of halos between those of a row of its blocks and the next.
// They are multiplied too, so that the lines of half a tile are the same distance apart.
constexpr int WOVEN_LINES = 10, WOVEN_GAP = 2;

INLINE Region region_at(const Arguments& p, const Share& share, int low) {
    Region region;
    // Tile i goes to thread block i modulo their number, so that those with one more high tile are
    // the last to get one more low tile.
    int before = low ? p.tiling.high_tiles : 0;
    region.first = before + (share.lane + share.lanes - before % share.lanes) % share.lanes;
    region.end = low ? p.tiling.tiles : p.tiling.high_tiles;
    region.kind = low ? p.tiling.low_kind : p.tiling.high_kind;
    region.staging = staging_of(region.kind);
    int main = max(0, min(share.main_chunks, share.last_chunk) - share.first_chunk);
    region.slots = main * (region.staging.slots - 1) + share.last_chunk - share.first_chunk;
    region.by_tile = region.slots < p.ring;
    region.step = region.kind == WOVEN ? share.lanes : 2 * share.lanes;
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

// A thread copies eight channels (its place among eight threads) of every 28th pixel of a slot.
constexpr int FETCHERS = 224, STEP = FETCHERS / 8, COPIES = (MOST_ROWS + STEP - 1) / STEP;

// The slots of a region in the order in which they are filled.
struct Sequence {
    int index, group, chunk, part;  // tile of the first warpgroup, warpgroup, chunk, slot of the chunk

    INLINE bool step_slot(const Share& share, const Region& region) {  // false: that was the last
        int slots = chunk < share.main_chunks ? region.staging.slots : 1;
        if (++part == slots) part = 0, chunk++;
        if (chunk < share.last_chunk) return true;
        chunk = share.first_chunk;
        return false;
    }
    INLINE bool step_group(const Share& share, const Region& region) {
        group = group == 0 && !region.shares(index, share.lanes);
        return group;
    }
    INLINE void step(const Share& share, const Region& region) {
        bool more = region.by_tile ? step_slot(share, region) || step_group(share, region)
                                   : step_group(share, region) || step_slot(share, region);
        if (!more) index += region.step;
    }
    INLINE int tile(const Share& share) const { return index + group * share.lanes; }
};

// Rows of the input that this thread's pixels of a slot come from; AHEAD of the wait for other kernels.
template <bool AHEAD>
INLINE void look_up(const Arguments& p, const Share& share, const Region& region, const Sequence& at,
                    int (&rows)[COPIES]) {
    int index = at.tile(share), own = (threadIdx.x - 256) / 8;
    bool second = at.chunk >= share.main_chunks;
    Tile tile = tile_at(p.tiling, index);
    const int* from = p.patches + (long long)index * TILE_PITCH + own;
    int limit = TILE_PITCH;
    if (tile.kind == ROWS) {
        int tap = at.part % 3 * 3 + at.part / 3;
        from = (second ? p.own : p.table + tap * p.pitch) + tile.first + own;
        limit = p.pitch - tile.first;
    } else {
        from += second ? OUTPUT_AT : 0;
    }
    limit = min(limit, second ? pixels_of(tile) : region.staging_at(tile).count);
#pragma unroll
    for (int i = 0; i < COPIES; i++)
        rows[i] = own + STEP * i >= limit ? p.at.zero
                  : AHEAD                 ? read_ahead(from + STEP * i)
                                          : from[STEP * i];
    if (!second || p.stride2 == 1) return;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {  // where the second input lies under an output row
        bool high = rows[i] < p.at.high_rows;
        int side = high ? p.at.block : p.at.block / 2, start = high ? 0 : p.at.high_rows;
        int row = rows[i] < p.at.rows ? rows[i] - start : 0;
        int x = side & (side - 1) ? row % side : row & (side - 1);
        rows[i] = p.stride2 * (p.stride2 * (start + row - x) + x);
    }
}

INLINE void fill(const Arguments& p, const Shared& s, const Share& share, const Region& region,
                 const Sequence& at, Cursor& slot, const int (&rows)[COPIES]) {
    int thread = threadIdx.x - 256, eight = thread % 8, own = thread / 8;
    bool second = at.chunk >= share.main_chunks;
    int index = at.tile(share), width = second ? p.width2 : p.cin;
    Tile tile = tile_at(p.tiling, index);
    int count = second ? pixels_of(tile) : region.staging_at(tile).count;
    const scalar* x = second ? p.x2 + share.slice * p.step2 + (at.chunk - share.main_chunks) * 64
                             : p.x + at.chunk * 64;
    x += eight * 8;
    barrier_wait(s.empty + 8 * slot.at, slot.round ^ 1);
    unsigned to = s.pixels + (slot.at * 8 + eight) * p.plane;
    bool gaps = second && region.kind == WOVEN;  // the same between the lines of a second input
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        int pixel = own + STEP * i, place = gaps ? pixel + pixel / 32 * (WOVEN_GAP * 8) : pixel;
        if (pixel < count) copy_async(to + place * 16, x + (long long)rows[i] * width);
    }
    int parts = second ? 1 : region.staging.slots;
    if (at.chunk == share.last_chunk - 1 && at.part == parts - 1 && thread < OUTPUT_BYTES / 16) {
        int m = tile.first + thread * 4;
        bool by_rows = region.kind == ROWS;
        const int* from = by_rows ? p.own + m
                                  : p.patches + (long long)index * TILE_PITCH + OUTPUT_AT + thread * 4;
        if (!by_rows || (thread < TILE / 4 && m < p.pitch))
            copy_async(s.rows + slot.at * OUTPUT_BYTES + thread * 16, from);
    }
    copy_async_arrive(s.full + 8 * slot.at);
    slot.advance(p.ring);
}

INLINE void fetch_pixels(const Arguments& p, const Shared& s, const Share& share) {
    Cursor slot = {0, 0};
    for (int low = 0; low < 2; low++) {
        Region region = region_at(p, share, low);
        Sequence next = {region.first, 0, share.first_chunk, 0};
        int rows[COPIES];
        if (next.index < region.end) look_up<true>(p, share, region, next, rows);
        if (!low) {
            follow();
            for (int i = threadIdx.x - 256; blockIdx.x == 0 && i < p.cout / 8; i += FETCHERS)
                *(uint4*)(p.out + (long long)p.at.zero * p.cout + i * 8) = make_uint4(0, 0, 0, 0);
        }
        // Fetching runs ahead of multiplying, so that it waits for an empty slot, not for rows.
        while (next.index < region.end) {
            fill(p, s, share, region, next, slot, rows);
            next.step(share, region);
            if (next.index < region.end) look_up<false>(p, share, region, next, rows);
        }
    }
}

// Weights never change, so they are fetched while the kernel ahead may still run.
INLINE void fetch_weights(const Arguments& p, const Shared& s, const Share& share) {
    if (threadIdx.x % 32) return;
    const scalar* from =
        p.weights + ((long long)share.stage_of(share.first_chunk) * p.cout_pad + share.slice * 64) * 64;
    Cursor slot = {0, 0};
    bool again = false;
    for (int low = 0; low < 2; low++) {
        Region region = region_at(p, share, low);
        for (int index = region.first; index < region.end; index += region.step) {
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
// The products of 64 channels of one tap; `line`: pixels from one line of eight to the next.
template <int LINES>
INLINE void multiply_tap(float (&acc)[4 * LINES], unsigned a, unsigned b, int line, int plane) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned long long left = 0x4000004000000000ull | (a + 2 * i);
        unsigned long long right = (unsigned long long)line << 32 | (b + i * (plane >> 3));
        Wgmma<8 * LINES>::run(acc, left, right, 1);
    }
}

#include "patch_epilogue.cuh"

// One multiplying warpgroup.
struct Multiplier {
    const Arguments& p;
    const Shared& s;
    const Share& share;
    const Channels& channels;
    int* arrived;
    int group;
    bool leader;
    Cursor slot, weight;
    int held_slot, held_weight;  // what the products in flight read; -1: nothing
    int arrivals;                // for the two warpgroups that a slot's barrier counts
    bool fresh;                  // whether weights may still be on their way

    INLINE void release() {
        if (leader && held_slot >= 0) barrier_arrive(s.empty + 8 * held_slot, arrivals);
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

    // A slot with the pixels of nine taps, or of one, from so many of its lines on.
    template <int SLOT_TAPS, int LINES>
    INLINE void multiply_slot(float (&acc)[4 * LINES], const Staging& staging, int first_line) {
        wait_for_pixels();
        unsigned b = pixel_descriptor(p, s, slot.at) + first_line * staging.line;
#pragma unroll
        for (int i = 0; i < SLOT_TAPS; i++) {
            bool last = i == SLOT_TAPS - 1;
            wait_for_weights();
            multiply_tap<LINES>(acc, weight_descriptor(s, weight.at),
                                b + i % 3 * staging.down + i / 3 * staging.right, staging.line, p.plane);
            if (!SB_RESIDENT || last) retire(last ? slot.at : -1, weight.at);
            weight.advance(p.stages);
        }
        slot.advance(p.ring);
    }
    template <int SLOT_TAPS, int LINES>
    INLINE void multiply_slots(float (&acc)[4 * LINES], int slots, const Staging& staging,
                               int first_line, int skipped) {
        for (int i = 0; i < slots; i++) {
            if (group) slot.advance(p.ring, skipped);
            multiply_slot<SLOT_TAPS, LINES>(acc, staging, first_line);
            if (!group) slot.advance(p.ring, skipped);
        }
    }

    // LINES of a tile of the region, from `first_line` on: all of one of two tiles, or half of one that
    // both share.
    template <int LINES>
    INLINE void sum(float (&acc)[4 * LINES], const Region& region, const Staging& staging,
                    int first_line) {
#pragma unroll
        for (int i = 0; i < 4 * LINES; i++) acc[i] = 0;
        int per_tile = OWN<LINES> && region.by_tile ? region.slots : 0;
        int per_slot = OWN<LINES> && !region.by_tile ? 1 : 0;
        int second = max(0, share.last_chunk - max(share.main_chunks, share.first_chunk));
        int slots = region.slots - second;
        arrivals = OWN<LINES> ? 2 : 1;
        if (SB_RESIDENT) weight = {0, 0};
        if (group) slot.advance(p.ring, per_tile);
        if (LINES % 12 == 0 || region.staging.slots == 1)
            multiply_slots<9, LINES>(acc, slots, staging, first_line, per_slot);
        else if (LINES != WOVEN_LINES)
            multiply_slots<1, LINES>(acc, slots, staging, first_line, per_slot);
        multiply_slots<1, LINES>(acc, second, staging_of(ROWS), first_line, per_slot);
        if (!group) slot.advance(p.ring, per_tile);
        wgmma_wait<0>();
    }
    template <int LINES> INLINE void take(const Region& region, int index) {
        int half = OWN<LINES> ? 0 : group;
        float acc[4 * LINES];
        Tile tile = tile_at(p.tiling, index);
        sum<LINES>(acc, region, region.staging_at(tile),
                   half * (LINES == WOVEN_LINES ? WOVEN_LINES + WOVEN_GAP : LINES));
        unsigned from = s.rows + held_slot * OUTPUT_BYTES;
        fresh = false;
        if constexpr (LINES > 16) {
            store<LINES>(acc, index, half, tile, rows_elsewhere(tile, from));
            let_go();
        } else {
            Rows<STORED<LINES>> rows = rows_of<STORED<LINES>>(p, tile, from, half);
            let_go();
            store<LINES>(acc, index, half, tile, rows);
        }
    }
    INLINE void let_go() {
        __syncwarp();  // the leader arrives for all
        release();
    }
    template <int LINES, class Where>
    INLINE void store(float (&acc)[4 * LINES], int index, int half, const Tile& tile, const Where& rows) {
        if (p.parts == 1 || add_parts<LINES>(p, acc, index, half, share, group, arrived))
            finish<LINES>(p, acc, tile, rows, channels);
    }
};

INLINE void multiply(const Arguments& p, const Shared& s, const Share& share, int* arrived) {
    int group = threadIdx.x / 128;
    Channels channels = channels_of(p, share.slice);
    follow();
    Multiplier multiplier = {p,     s,      share, channels, arrived + group, group, threadIdx.x % 32 == 0,
                             {0, 0}, {0, 0}, -1,    -1,       1,               true};
    for (int low = 0; low < 2; low++) {
        Region region = region_at(p, share, low);
        for (int index = region.first; index < region.end; index += region.step) {
            bool shared = region.shares(index, share.lanes);
            int mine = shared ? index : index + group * share.lanes;
            if (region.kind == WOVEN)
                multiplier.take<WOVEN_LINES>(region, mine);
            else if (SB_TRIPLES && tile_at(p.tiling, mine).size == 3)
                shared ? multiplier.take<12>(region, mine) : multiplier.take<24>(region, mine);
            else
                shared ? multiplier.take<8>(region, mine) : multiplier.take<16>(region, mine);
        }
    }
}

extern "C" __global__ void __launch_bounds__(512, 1) patch_conv(const __grid_constant__ Arguments p) {
    extern __shared__ char dynamic[];
    __shared__ unsigned long long barriers[2 * MAX_STAGES + 2 * MAX_RING];
    __shared__ int arrived[2];
    Shared s;
    s.weights = (shared_address(dynamic) + 1023) & ~1023u;
    s.pixels = s.weights + p.stages * STAGE_BYTES;
    s.rows = s.pixels + p.ring * 8 * p.plane;
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
            barrier_init(s.empty + 8 * i, 8);
        }
        for (int i = 0; i < p.stages; i++) {
            barrier_init(s.weights_full + 8 * i, 1);
            barrier_init(s.weights_empty + 8 * i, 8);
        }
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= 256) {
        set_registers<88, false>();
        if (threadIdx.x >= 256 + FETCHERS)
            fetch_weights(p, s, share);
        else
            fetch_pixels(p, s, share);
    } else {
        set_registers<168, true>();
        multiply(p, s, share, arrived);
    }
}
