// What a forward pass on a grid begins with, in one launch: the image as padded blocks (stem.cu),
// neighbour tables (tables.cu) and the tables of tiles (patch_tables.cu). None of them needs another,
// and each alone would leave most of the device idle.
//
//   split    as of split_padded; blocks, columns, tiles: as of build_tables and build_patches
//   first    thread block with which each of these begins: tiles of an entry, then columns of an entry,
//            then the image; entries that there are not have no thread blocks
#define SB_FOLLOWS
#include "padded.cuh"
#include "patch_tables.cuh"
#include "follow.cuh"

constexpr int MOST_TILES = 6, MOST_COLUMNS = 12;

struct Arguments {
    Split split;
    Blocks blocks;
    TileEntry tiles[MOST_TILES];
    TableEntry columns[MOST_COLUMNS];
    int first[MOST_TILES + MOST_COLUMNS + 1], padding;
};

extern "C" __global__ void __launch_bounds__(256) begin(const __grid_constant__ Arguments p) {
    follow();
    const int id = blockIdx.x, of_tables = p.first[MOST_TILES + MOST_COLUMNS];
    if (id >= of_tables) return split_two(p.split, id - of_tables);
    int part = 0;
    for (int i = 1; i < MOST_TILES + MOST_COLUMNS; i++) part += id >= p.first[i];
    const int within = id - p.first[part];
    if (part < MOST_TILES)
        fill_tile<256>(p.blocks, p.tiles[part], within);
    else
        fill_column(p.blocks, p.columns[part - MOST_TILES], within * 256 + threadIdx.x);
}
