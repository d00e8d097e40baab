// What one tile of patch_sm90.cu covers: 128 output pixels in 16 lines of 8, and the input rows that
// they read.
#pragma once

// TALL: 8 wide, 16 high, of one block. PAIR: two patches of 8×8 of any blocks, line by line in turn,
// so that lines keep one distance. ROWS: 128 consecutive GEMM rows in the order of tables.cu, whatever
// their shape and stride.
enum { TALL, PAIR, ROWS };

constexpr int TILE = 128, HALO_WIDTH = 10;
constexpr int TALL_ROWS = 18 * HALO_WIDTH, PAIR_ROWS = 20 * HALO_WIDTH;

struct Patch {
    int block, y, x;  // rank of its block among those of its resolution; -1: there is no such patch
};

struct Tile {
    int kind, first;  // first: of ROWS, the first GEMM row
    bool high;
    Patch patches[2];  // of TALL the first alone
};

INLINE Patch patch_of(int index, int side, int height, int patches) {
    int across = side / 8, each = across * (side / height);
    if (index >= patches) return {-1, 0, 0};
    int within = index % each;
    return {index / each, within / across * height, within % across * 8};
}

INLINE Tile tile_at(const Arguments& p, int index) {
    Tile tile;
    tile.high = index < p.high_tiles;
    tile.kind = tile.high ? p.high_kind : p.low_kind;
    int within = tile.high ? index : index - p.high_tiles;
    int side = tile.high ? p.at.block : p.at.block / 2;
    int blocks = tile.high ? p.n_high : p.n_blocks - p.n_high;
    tile.first = (tile.high ? 0 : p.first_row) + within * TILE;
    if (tile.kind == TALL) {
        tile.patches[0] = patch_of(within, side, 16, blocks * (side / 8) * (side / 16));
    } else if (tile.kind == PAIR) {
        int patches = blocks * (side / 8) * (side / 8);
        tile.patches[0] = patch_of(2 * within, side, 8, patches);
        tile.patches[1] = patch_of(2 * within + 1, side, 8, patches);
    }
    return tile;
}

// Stored row of pixel (0, 0) of a block, at a scale where high blocks have sides of `block`.
INLINE int block_row(const Arguments& p, const Tile& tile, int rank, int block) {
    if (tile.high) return rank * block * block;
    return p.n_high * block * block + rank * (block / 2) * (block / 2);
}

// The patch of a TALL or PAIR tile that a line belongs to, moved down to that line.
INLINE Patch line_of(const Tile& tile, int line) {
    Patch patch = tile.kind == PAIR && line % 2 ? tile.patches[1] : tile.patches[0];
    patch.y += tile.kind == PAIR ? line / 2 : line;
    return patch;
}

// Input row of staged row `r` of a TALL or PAIR tile, which is stored with its halo of one pixel.
INLINE int halo_row(const Arguments& p, const Tile& tile, int r) {
    Patch patch = line_of(tile, r / HALO_WIDTH);
    if (patch.block < 0) return p.at.zero;
    int y = patch.y - 1, x = patch.x + r % HALO_WIDTH - 1;
    int side = tile.high ? p.at.block : p.at.block / 2;
    if ((unsigned)y < side && (unsigned)x < side)
        return block_row(p, tile, patch.block, p.at.block) + y * side + x;
    int cell = p.cells[tile.high ? patch.block : p.n_high + patch.block];
    return neighbour_row(p.at, p.slot, p.gh, p.gw, cell, tile.high, y, x);
}

// Bytes from the first staged row of a tile to what a tap reads.
INLINE int tap_offset(const Tile& tile, int tap) {
    int lines = tile.kind == PAIR ? 2 * (tap / 3) : tap / 3;
    return (lines * HALO_WIDTH + tap % 3) * 16;
}

// Row of the second input that output pixel `n` of a tile reads through the 1×1 convolution.
INLINE int second_row(const Arguments& p, const Tile& tile, int n) {
    if (tile.kind == ROWS) return tile.first + n < p.pitch ? p.table2[tile.first + n] : 0;
    Patch patch = line_of(tile, n / 8);
    if (patch.block < 0) return 0;
    int side = tile.high ? p.block2 : p.block2 / 2;
    int y = patch.y * p.stride2, x = (patch.x + n % 8) * p.stride2;
    return block_row(p, tile, patch.block, p.block2) + y * side + x;
}
