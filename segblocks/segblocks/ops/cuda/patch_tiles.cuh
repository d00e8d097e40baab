// The tiles of patch_sm90.cu: 128 output pixels each, in 16 lines of 8.
#pragma once

// How a tile's pixels lie in shared memory, so that the lines of a tap are always the same distance
// apart and eight pixels of a line are side by side:
//   TALL  a patch 8 wide and 16 high of one block, with its halo
//   PAIR  two patches of 8×8 of any blocks with their halos, line by line in turn
//   WOVEN eight low blocks of 4×4 with their halos, pixel by pixel in turn: a line of eight is one
//         place of all eight blocks
//   ROWS  128 consecutive GEMM rows in the order of tables.cu, of any shape and stride; once for each tap
enum { TALL, PAIR, WOVEN, ROWS };

constexpr int TILE = 128;
constexpr int TALL_ROWS = 18 * 10, PAIR_ROWS = 20 * 10, WOVEN_ROWS = 6 * 6 * 8;

// What patch_tables.cu prepares for each tile but ROWS: the input rows of its pixels in the order
// above; then, where a tile has them, the output rows of its 128 pixels (else the row of zeros) and
// the rows of the 32 averages that it makes (else -1).
constexpr int OUTPUT_AT = WOVEN_ROWS, AVERAGES_AT = OUTPUT_AT + TILE;
constexpr int TILE_PITCH = AVERAGES_AT + 32;

// How one convolution is cut into tiles; low blocks' tiles follow those of high blocks.
struct Tiling {
    int high_tiles, tiles, high_kind, low_kind, first_row;
};

struct Tile {
    int kind, first;  // first: of ROWS, the first GEMM row
    bool high;
};

INLINE Tile tile_at(const Tiling& tiling, int index) {
    Tile tile;
    tile.high = index < tiling.high_tiles;
    tile.kind = tile.high ? tiling.high_kind : tiling.low_kind;
    tile.first = tile.high ? index * TILE : tiling.first_row + (index - tiling.high_tiles) * TILE;
    return tile;
}

// The two lines whose 2×2 quads make the averages 2i and 2i + 1 of eight; group: which eight.
INLINE int upper_line(int kind, int group, int i) {  // of TALL and PAIR
    return 4 * group + (kind == TALL ? 2 * i : i);
}
INLINE int lines_apart(int kind) { return kind == TALL ? 1 : 2; }
