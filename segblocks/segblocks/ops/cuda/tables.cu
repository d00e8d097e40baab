// Neighbour tables of every scale of a network, in one launch.
//
//   slot   (N, gh, gw) int32, cells (N*gh*gw) int32: as from build_slots
//   table  (9, pitch) int32 for each entry: for GEMM row m of the output and tap t of a 3×3 window
//          with padding 1, the row of the extended input buffer that is read; only the middle tap,
//          (1, pitch), where `centre` is set.
//
// GEMM rows: high blocks pixel quad by pixel quad (2×2, row by row), then low blocks pixel by pixel.
// An extended buffer holds the stored pixels, then the 2×2 averages of the high blocks (what a low
// block reads of a high neighbour), then one row of zeros, which stands for all beyond the image
// and for the rows between the last pixel and `pitch`.

#define INLINE __device__ __forceinline__
#include "tables.cuh"
#include "follow.cuh"

struct Sizes {
    int block, stride, pitch, centre;
};

// All addresses come first: a launch that is repeated changes nothing else.
struct Arguments {
    const int* slot;
    const int* cells;
    int* tables[16];
    int gh, gw, n_high, n_blocks;
    Sizes sizes[16];
};

extern "C" __global__ void __launch_bounds__(256) build_tables(const __grid_constant__ Arguments p) {
    follow();
    Sizes sizes = p.sizes[blockIdx.y];
    Blocks blocks = {p.slot, p.cells, p.gh, p.gw, p.n_high, p.n_blocks};
    TableEntry entry = {p.tables[blockIdx.y], sizes.block, sizes.stride, sizes.pitch, sizes.centre};
    fill_column(blocks, entry, blockIdx.x * 256 + threadIdx.x);
}
