// What the tiles of patch_sm90.cu read and where they write, for every scale of a network in one launch.
//
//   slot   (N, gh, gw) int32, cells (N*gh*gw) int32: as from build_slots
//   table  (tiles, TILE_PITCH) int32 for each entry, see patch_tiles.cuh; rows of ROWS tiles stay
//          unwritten

#define INLINE __device__ __forceinline__
#include "neighbours.cuh"
#include "patch_tiles.cuh"

struct Entry {
    int* table;
    Extended at;
    Tiling tiling;
    int padding;
};

struct Arguments {
    const int* slot;
    const int* cells;
    int gh, gw, n_high, n_blocks;
    Entry entries[4];
};

INLINE Patch patch_of(const Arguments& p, const Entry& e, bool high, int height, int index) {
    int side = high ? e.at.block : e.at.block / 2, across = side / 8, each = across * (side / height);
    int block = index / each, within = index % each;
    if (block >= (high ? p.n_high : p.n_blocks - p.n_high)) return {-1, 0, 0, -1};
    int y = within / across * height, x = within % across * 8;
    return {block, y, x, (high ? 0 : e.at.high_rows) + (block * side + y) * side + x};
}

// Row of an average of the high blocks; only averages along the edge of a block are ever read. Eight
// averages come from four lines: of TALL, of two and two lines, of PAIR, of two lines of each patch.
INLINE int average_row(const Entry& e, const Tile& tile, const Patch (&patches)[2],
                       int index) {
    int line = index / 8 * 4, column = index % 8, half = e.at.block / 2;
    Patch patch = line_of(tile.kind, patches, line + column % 2 * (tile.kind == PAIR ? 1 : 2), 0);
    if (!tile.high || patch.block < 0) return -1;
    int y = patch.y / 2, x = patch.x / 2 + column / 2;
    if (y > 0 && y < half - 1 && x > 0 && x < half - 1) return -1;
    return e.at.rows + (patch.block * half + y) * half + x;
}

INLINE int input_row(const Arguments& p, const Entry& e, const Tile& tile,
                     const Patch (&patches)[2], int r) {
    Patch patch = line_of(tile.kind, patches, r / HALO_WIDTH, 0);
    if (patch.block < 0) return e.at.zero;
    int cell = p.cells[tile.high ? patch.block : p.n_high + patch.block];
    return neighbour_row(e.at, p.slot, p.gh, p.gw, cell, tile.high, patch.y - 1,
                         patch.x + r % HALO_WIDTH - 1);
}

INLINE int output_row(const Entry& e, const Tile& tile, const Patch (&patches)[2], int n) {
    Patch patch = line_of(tile.kind, patches, n / 8, tile.high ? e.at.block : e.at.block / 2);
    return patch.block < 0 ? e.at.zero : patch.first + n % 8;
}

INLINE int patch_value(const Patch& patch, int which) {
    return which == 0 ? patch.block : which == 1 ? patch.y : which == 2 ? patch.x : patch.first;
}

extern "C" __global__ void __launch_bounds__(TILE_PITCH)
    build_patches(const __grid_constant__ Arguments p) {
    const Entry& e = p.entries[blockIdx.y];
    int index = blockIdx.x, r = threadIdx.x;
    if (index >= e.tiling.tiles) return;
    Tile tile = tile_at(e.tiling, index);
    if (tile.kind == ROWS) return;
    int within = tile.high ? index : index - e.tiling.high_tiles;
    bool pair = tile.kind == PAIR;
    Patch patches[2];
    for (int i = 0; i < 2; i++)
        patches[i] = patch_of(p, e, tile.high, pair ? 8 : 16, pair ? 2 * within + i : within);
    int value;
    if (r < OUTPUT_AT)
        value = pair || r < TALL_ROWS ? input_row(p, e, tile, patches, r) : e.at.zero;
    else if (r < AVERAGES_AT)
        value = output_row(e, tile, patches, r - OUTPUT_AT);
    else if (r < PATCHES_AT)
        value = average_row(e, tile, patches, r - AVERAGES_AT);
    else
        value = patch_value(r < PATCHES_AT + 4 ? patches[0] : patches[1], r % 4);
    e.table[(long long)index * TILE_PITCH + r] = value;
}
