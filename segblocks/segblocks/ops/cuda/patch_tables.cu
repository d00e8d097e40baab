// What the tiles of patch_sm90.cu read and where they write, for every scale of a network in one launch.
//
//   slot   (N, gh, gw) int32, cells (N*gh*gw) int32: as from build_slots
//   table  (tiles, TILE_PITCH) int32 for each entry, see patch_tiles.cuh; what belongs to ROWS tiles
//          stays unwritten

#define INLINE __device__ __forceinline__
#include "patch_tables.cuh"
#include "follow.cuh"

struct Arguments {
    Blocks blocks;
    TileEntry entries[4];
};

extern "C" __global__ void __launch_bounds__(192) build_patches(const __grid_constant__ Arguments p) {
    follow();
    fill_tile<192>(p.blocks, p.entries[blockIdx.y], blockIdx.x);
}
