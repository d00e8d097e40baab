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
#include "neighbours.cuh"
#include "follow.cuh"

struct Entry {
    int* table;
    int block, stride, pitch, centre;
};

struct Arguments {
    const int* slot;
    const int* cells;
    int gh, gw, n_high, n_blocks;
    Entry entries[8];
};

extern "C" __global__ void __launch_bounds__(256) build_tables(const __grid_constant__ Arguments p) {
    follow();
    Entry entry = p.entries[blockIdx.y];
    int m = blockIdx.x * 256 + threadIdx.x;
    if (m >= entry.pitch) return;
    int block = entry.block, half = block / 2, out = block / entry.stride;
    int high_rows = p.n_high * block * block;
    int rows = high_rows + (p.n_blocks - p.n_high) * half * half;
    int zero = rows + p.n_high * half * half;
    int out_high_rows = p.n_high * out * out;
    int out_rows = out_high_rows + (p.n_blocks - p.n_high) * (out / 2) * (out / 2);
    if (m >= out_rows) {
        for (int tap = 0; tap < (entry.centre ? 1 : 9); tap++)
            entry.table[tap * entry.pitch + m] = zero;
        return;
    }
    bool high = m < out_high_rows;
    int rank, y, x;
    if (high) {
        int quad = m / 4, out_half = out / 2;
        rank = quad / (out_half * out_half);
        y = quad / out_half % out_half * 2 + m % 4 / 2;
        x = quad % out_half * 2 + m % 2;
    } else {
        int within = m - out_high_rows, out_side = out / 2;
        rank = within / (out_side * out_side);
        y = within / out_side % out_side;
        x = within % out_side;
    }
    int cell = p.cells[high ? rank : p.n_high + rank];
    Extended at = {block, high_rows, rows, zero};
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
        if (entry.centre && tap != 4) continue;
        entry.table[(entry.centre ? 0 : tap) * entry.pitch + m] =
            neighbour_row(at, p.slot, p.gh, p.gw, cell, rank, high, y * entry.stride + tap / 3 - 1,
                          x * entry.stride + tap % 3 - 1);
    }
}
