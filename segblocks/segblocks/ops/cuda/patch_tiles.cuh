// The tiles of patch_sm90.cu: 128 output pixels each, in 16 lines of 8, or half as many again.
#pragma once

// How a tile's pixels lie in shared memory, so that the lines of a tap are always the same distance
// apart and eight pixels of a line are side by side:
//   TALL    a patch 8 wide and 16 high of one block, with its halo
//   PATCHES two or three patches of 8×8 of any blocks with their halos, line by line in turn
//   WOVEN   eight low blocks of 4×4 with their halos, pixel by pixel in turn: a line of eight is one
//           place of all eight blocks
//   ROWS    128 consecutive GEMM rows in the order of tables.cu, of any shape and stride; once for each
//           tap
enum { TALL, PATCHES, WOVEN, ROWS };

constexpr int TILE = 128, PATCH = 64;  // pixels
constexpr int TALL_ROWS = 18 * 10, PATCH_ROWS = 10 * 10, WOVEN_ROWS = 6 * 6 * 8;
constexpr int MOST_ROWS = 3 * PATCH_ROWS;  // that a tile stages

// What patch_tables.cu prepares for each tile but ROWS: the input rows of its pixels in the order
// above; from OUTPUT_AT on the output rows of its pixels (the row of zeros where there is none) and
// the rows of the averages that they make, a quarter as many (-1 where there is none).
constexpr int OUTPUT_AT = MOST_ROWS, TILE_PITCH = OUTPUT_AT + 3 * PATCH * 5 / 4;

// How one convolution is cut into tiles. Low blocks' tiles follow those of high blocks; or all tiles are
// PATCHES of both, and high_tiles is their number. The first `triples` tiles have three patches.
struct Tiling {
    int high_tiles, tiles, high_kind, low_kind, first_row, triples;
};

struct Tile {
    int kind, size;  // size: patches that take turns
    int first;       // GEMM row at which it begins, if blocks were whole patches one after the other
};

INLINE Tile tile_at(const Tiling& tiling, int index) {
    bool high = index < tiling.high_tiles;
    Tile tile = {high ? tiling.high_kind : tiling.low_kind, 1, 0};
    tile.first = high ? index * TILE : tiling.first_row + (index - tiling.high_tiles) * TILE;
    if (tile.kind == PATCHES) {
        tile.size = index < tiling.triples ? 3 : 2;
        if (high) tile.first += min(index, tiling.triples) * PATCH;
    }
    return tile;
}

INLINE int pixels_of(const Tile& tile) { return tile.kind == PATCHES ? PATCH * tile.size : TILE; }

// The upper of the two lines of the n-th line of quads, of a tile whose patches take turns.
INLINE constexpr int upper_line(int size, int n) { return n / size * 2 * size + n % size; }
