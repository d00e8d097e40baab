// The tables of tiles (patch_tables.cu): what a thread block of THREADS fills in.
#pragma once
#include "tables.cuh"
#include "patch_tiles.cuh"

struct TileEntry {
    int* table;
    Extended at;
    Tiling tiling;
    int padding;
};

// A block that a tile takes pixels from, and where the tile begins in it.
struct Source {
    int block, cell, y, x;  // block: its rank among those of its resolution; -1: there is no such block
};

// A place in a block.
struct TilePlace {
    int source, y, x;
};

// The `i`-th block of a tile: of TALL and PAIR one for each patch, of WOVEN eight.
INLINE Source source_at(const Blocks& b, const TileEntry& e, const Tile& tile, int within, int i) {
    int side = tile.high ? e.at.block : e.at.block / 2;
    Source source = {within * 8 + i, 0, 0, 0};
    if (tile.kind != WOVEN) {
        bool pair = tile.kind == PAIR;
        int height = pair ? 8 : 16, across = side / 8, each = across * (side / height);
        int patch = pair ? 2 * within + i : within, inside = patch % each;
        source = {patch / each, 0, inside / across * height, inside % across * 8};
    }
    if (source.block >= (tile.high ? b.n_high : b.n_blocks - b.n_high)) source.block = -1;
    if (source.block >= 0) source.cell = b.cells[tile.high ? source.block : b.n_high + source.block];
    return source;
}

// Pixel `x` of line `line` of a tile, counted from where its sources begin.
INLINE TilePlace place_at(const Tile& tile, int line, int x) {
    if (tile.kind == WOVEN) return {x, line >> 2, line & 3};
    if (tile.kind == PAIR) return {line & 1, line >> 1, x};
    return {0, line, x};
}

INLINE int input_row(const Blocks& b, const TileEntry& e, const Tile& tile, const Source* sources, int r) {
    TilePlace place = tile.kind == WOVEN
                          ? TilePlace{r % 8, r / 48 - 1, r / 8 % 6 - 1}
                          : place_at(tile, r / 10 - (tile.kind == PAIR ? 2 : 1), r % 10 - 1);
    Source source = sources[place.source];
    if (source.block < 0) return e.at.zero;
    return neighbour_row(e.at, b.slot, b.gh, b.gw, source.cell, source.block, tile.high,
                         source.y + place.y, source.x + place.x);
}

INLINE int output_row(const TileEntry& e, const Tile& tile, const Source* sources, TilePlace place) {
    Source source = sources[place.source];
    int side = tile.high ? e.at.block : e.at.block / 2;
    if (source.block < 0) return e.at.zero;
    int row = (source.block * side + source.y + place.y) * side + source.x + place.x;
    return tile.high ? row : e.at.high_rows + row;
}

// Only averages along the edge of a block are ever read.
INLINE int average_row(const TileEntry& e, const Tile& tile, const Source* sources, TilePlace place) {
    Source source = sources[place.source];
    int half = e.at.block / 2, y = (source.y + place.y) / 2, x = (source.x + place.x) / 2;
    if (!tile.high || source.block < 0) return -1;
    if (y > 0 && y < half - 1 && x > 0 && x < half - 1) return -1;
    return e.at.rows + (source.block * half + y) * half + x;
}

INLINE int value_at(const Blocks& b, const TileEntry& e, const Tile& tile, const Source* sources, int r) {
    if (r < OUTPUT_AT) return input_row(b, e, tile, sources, r);
    if (r < AVERAGES_AT) {
        int n = r - OUTPUT_AT;
        return output_row(e, tile, sources, place_at(tile, n / 8, n % 8));
    }
    int n = r - AVERAGES_AT, line = upper_line(tile.kind, n / 8, n % 2);
    return average_row(e, tile, sources, place_at(tile, line, n % 8 / 2 * 2));
}

// Tile `index` of an entry, by all THREADS threads.
template <int THREADS> INLINE void fill_tile(const Blocks& b, const TileEntry& e, int index) {
    __shared__ Source sources[8];
    int thread = threadIdx.x;
    if (index >= e.tiling.tiles) return;
    Tile tile = tile_at(e.tiling, index);
    if (tile.kind == ROWS) return;
    if (thread < 8)
        sources[thread] =
            source_at(b, e, tile, tile.high ? index : index - e.tiling.high_tiles, thread);
    __syncthreads();
    int inputs = tile.kind == TALL ? TALL_ROWS : tile.kind == PAIR ? PAIR_ROWS : WOVEN_ROWS;
    int* to = e.table + (long long)index * TILE_PITCH;
    for (int r = thread; r < inputs; r += THREADS) to[r] = value_at(b, e, tile, sources, r);
    if (thread < TILE_PITCH - OUTPUT_AT)
        to[OUTPUT_AT + thread] = value_at(b, e, tile, sources, OUTPUT_AT + thread);
}
