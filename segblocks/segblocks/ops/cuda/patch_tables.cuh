// The tables of tiles (patch_tables.cu): what a thread block of THREADS fills in.
#pragma once
#include "tables.cuh"
#include "patch_tiles.cuh"

struct TileEntry {
    int* table;
    Extended at;
    Tiling tiling;
};

// A block that a tile takes pixels from, and where the tile begins in it.
struct Source {
    int block, cell, y, x;  // block: its rank among those of its resolution; -1: there is no such block
    bool high;
};

// A place in a block.
struct TilePlace {
    int source, y, x;
};

// The `i`-th block of a tile: one for each patch, of WOVEN eight. `end`: as Tile::first, of its kind.
INLINE Source source_at(const Blocks& b, const TileEntry& e, const Tile& tile, int end, int i) {
    int height = tile.kind == TALL ? 16 : tile.kind == WOVEN ? 4 : 8, width = tile.kind == WOVEN ? 4 : 8;
    int row = tile.first + i * height * width;
    if (row >= end) return {-1, 0, 0, 0, false};
    bool high = row < e.at.high_rows;
    int side = high ? e.at.block : e.at.block / 2, across = side / width;
    int patch = (row - (high ? 0 : e.at.high_rows)) / (height * width), each = across * (side / height);
    int block = patch / each, inside = patch % each;
    int cell = b.cells[high ? block : b.n_high + block];
    return {block, cell, inside / across * height, inside % across * width, high};
}

// Pixel `x` of line `line` of a tile, counted from where its sources begin; lines from -size on.
INLINE TilePlace place_at(const Tile& tile, int line, int x) {
    if (tile.kind == WOVEN) return {x, line >> 2, line & 3};
    return {(line + tile.size) % tile.size, (line + tile.size) / tile.size - 1, x};
}

INLINE int input_row(const Blocks& b, const TileEntry& e, const Tile& tile, const Source* sources, int r) {
    TilePlace place = tile.kind == WOVEN ? TilePlace{r % 8, r / 48 - 1, r / 8 % 6 - 1}
                                         : place_at(tile, r / 10 - tile.size, r % 10 - 1);
    Source source = sources[place.source];
    if (source.block < 0) return e.at.zero;
    return neighbour_row(e.at, b.slot, b.gh, b.gw, source.cell, source.block, source.high,
                         source.y + place.y, source.x + place.x);
}

INLINE int output_row(const TileEntry& e, const Source* sources, TilePlace place) {
    Source source = sources[place.source];
    if (source.block < 0) return e.at.zero;
    int side = source.high ? e.at.block : e.at.block / 2;
    int row = (source.block * side + source.y + place.y) * side + source.x + place.x;
    return source.high ? row : e.at.high_rows + row;
}

// Only averages along the edge of a block are ever read.
INLINE int average_row(const TileEntry& e, const Source* sources, TilePlace place) {
    Source source = sources[place.source];
    int half = e.at.block / 2, y = (source.y + place.y) / 2, x = (source.x + place.x) / 2;
    if (!source.high || source.block < 0) return -1;
    if (y > 0 && y < half - 1 && x > 0 && x < half - 1) return -1;
    return e.at.rows + (source.block * half + y) * half + x;
}

// Tile `index` of an entry, by all THREADS threads.
template <int THREADS> INLINE void fill_tile(const Blocks& b, const TileEntry& e, int index) {
    __shared__ Source sources[8];
    int thread = threadIdx.x;
    if (index >= e.tiling.tiles) return;
    Tile tile = tile_at(e.tiling, index);
    if (tile.kind == ROWS) return;
    int end = index < e.tiling.high_tiles ? e.tiling.first_row : e.at.rows;
    if (thread < 8) sources[thread] = source_at(b, e, tile, end, thread);
    __syncthreads();
    int pixels = pixels_of(tile);
    int inputs = tile.kind == TALL    ? TALL_ROWS
                 : tile.kind == WOVEN ? WOVEN_ROWS
                                      : PATCH_ROWS * tile.size;
    int* to = e.table + (long long)index * TILE_PITCH;
    for (int r = thread; r < inputs; r += THREADS) to[r] = input_row(b, e, tile, sources, r);
    to += OUTPUT_AT;
    for (int n = thread; n < pixels; n += THREADS)
        to[n] = output_row(e, sources, place_at(tile, n / 8, n % 8));
    for (int n = thread; n < pixels / 4; n += THREADS) {
        int line = upper_line(tile.size, n / 8 * 2 + n % 2);
        to[pixels + n] = average_row(e, sources, place_at(tile, line, n % 8 / 2 * 2));
    }
}
