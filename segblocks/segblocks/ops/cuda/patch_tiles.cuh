// The tiles of patch_sm90.cu: 128 output pixels each, in 16 lines of 8.
#pragma once

// TALL: 8 wide, 16 high, of one block. PAIR: two patches of 8×8 of any blocks, line by line in turn,
// so that lines keep one distance. ROWS: 128 consecutive GEMM rows in the order of tables.cu, whatever
// their shape and stride.
enum { TALL, PAIR, ROWS };

constexpr int TILE = 128, HALO_WIDTH = 10;
constexpr int TALL_ROWS = 18 * HALO_WIDTH, PAIR_ROWS = 20 * HALO_WIDTH;

// What patch_tables.cu prepares for each TALL or PAIR tile, beginning with the input rows of its pixels
// and their halo, line by line. Then: the output rows of its 128 pixels; the rows of the averages that
// it makes (see `average_row`); its two patches (of TALL the first alone). Where there is no such
// pixel, an output row is that of zeros and an average's -1.
constexpr int OUTPUT_AT = PAIR_ROWS, AVERAGES_AT = OUTPUT_AT + TILE, PATCHES_AT = AVERAGES_AT + 32;
constexpr int TILE_PITCH = PATCHES_AT + 8;

struct Patch {
    int block, y, x, first;  // rank of the block in its resolution (-1: none), place, first output row
};

struct Tile {
    int kind, first;  // first: of ROWS, the first GEMM row
    bool high;
};

// How one convolution is cut into tiles; low blocks' tiles follow those of high blocks.
struct Tiling {
    int high_tiles, tiles, high_kind, low_kind, first_row;
};

INLINE Tile tile_at(const Tiling& tiling, int index) {
    Tile tile;
    tile.high = index < tiling.high_tiles;
    tile.kind = tile.high ? tiling.high_kind : tiling.low_kind;
    tile.first = tile.high ? index * TILE : tiling.first_row + (index - tiling.high_tiles) * TILE;
    return tile;
}

// The patch of a TALL or PAIR tile that a line belongs to, moved down to that line.
INLINE Patch line_of(int kind, const Patch (&patches)[2], int line, int side) {
    Patch patch = kind == PAIR && line % 2 ? patches[1] : patches[0];
    int down = kind == PAIR ? line / 2 : line;
    patch.y += down;
    patch.first += down * side;
    return patch;
}
