// What the tiles of patch_sm90.cu read and where they write, for every scale of a network in one launch.
//
//   slot   (N, gh, gw) int32, cells (N*gh*gw) int32: as from build_slots
//   table  (tiles, TILE_PITCH) int32 for each entry, see patch_tiles.cuh; what belongs to ROWS tiles
//          stays unwritten

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

// A place in a block: its rank among those of its resolution (-1: there is no such block).
struct Place {
    int block, y, x;
};

// Pixel `x` of line `line` of a tile; lines count from -1 where halos are asked for.
INLINE Place place_at(const Arguments& p, const Entry& e, const Tile& tile, int within, int line, int x) {
    int side = tile.high ? e.at.block : e.at.block / 2;
    Place place;
    if (tile.kind == WIDE) {
        int q = line & 3;
        place = {within * 8 + q * 2 + (x >> 2), line >> 2, x & 3};
    } else {
        bool pair = tile.kind == PAIR;
        int height = pair ? 8 : 16, across = side / 8, each = across * (side / height);
        int patch = pair ? 2 * within + (line & 1) : within, inside = patch % each;
        place = {patch / each, inside / across * height + (pair ? line >> 1 : line), inside % across * 8 + x};
    }
    if (place.block >= (tile.high ? p.n_high : p.n_blocks - p.n_high)) place.block = -1;
    return place;
}

INLINE int input_row(const Arguments& p, const Entry& e, const Tile& tile, int within, int r) {
    Place place;
    if (tile.kind == WIDE) {  // for each column of taps six lines of each block
        int copy = r / WIDE_ROWS, line = r % WIDE_ROWS / 8;
        place = place_at(p, e, tile, within, line - 4, r % 8);
        place.x += copy - 1;
    } else {
        int line = r / 10, before = tile.kind == PAIR ? 2 : 1;
        place = place_at(p, e, tile, within, line - before, r % 10 - 1);
    }
    if (place.block < 0) return e.at.zero;
    int cell = p.cells[tile.high ? place.block : p.n_high + place.block];
    return neighbour_row(e.at, p.slot, p.gh, p.gw, cell, tile.high, place.y, place.x);
}

INLINE int output_row(const Entry& e, const Tile& tile, Place place) {
    int side = tile.high ? e.at.block : e.at.block / 2;
    if (place.block < 0) return e.at.zero;
    return (tile.high ? 0 : e.at.high_rows) + (place.block * side + place.y) * side + place.x;
}

// Only averages along the edge of a block are ever read.
INLINE int average_row(const Entry& e, const Tile& tile, Place place) {
    int half = e.at.block / 2, y = place.y / 2, x = place.x / 2;
    if (!tile.high || place.block < 0) return -1;
    if (y > 0 && y < half - 1 && x > 0 && x < half - 1) return -1;
    return e.at.rows + (place.block * half + y) * half + x;
}

extern "C" __global__ void __launch_bounds__(TILE_PITCH)
    build_patches(const __grid_constant__ Arguments p) {
    const Entry& e = p.entries[blockIdx.y];
    int index = blockIdx.x, r = threadIdx.x;
    if (index >= e.tiling.tiles) return;
    Tile tile = tile_at(e.tiling, index);
    int within = tile.high ? index : index - e.tiling.high_tiles, value;
    int inputs = tile.kind == TALL ? TALL_ROWS : tile.kind == PAIR ? PAIR_ROWS : 3 * WIDE_ROWS;
    if (tile.kind == ROWS || (r >= inputs && r < OUTPUT_AT)) return;
    if (r < inputs) {
        value = input_row(p, e, tile, within, r);
    } else if (r < AVERAGES_AT) {
        int n = r - OUTPUT_AT;
        value = output_row(e, tile, place_at(p, e, tile, within, n / 8, n % 8));
    } else {
        int n = r - AVERAGES_AT, line = upper_line(tile.kind, n / 8, n % 2);
        value = average_row(e, tile, place_at(p, e, tile, within, line, n % 8 / 2 * 2));
    }
    e.table[(long long)index * TILE_PITCH + r] = value;
}
