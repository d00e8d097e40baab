// Neighbour tables (tables.cu): what one thread fills in.
#pragma once
#include "neighbours.cuh"
#include "gemm_rows.cuh"

// Where the blocks of a grid are: slot (N, gh, gw) and cells (N*gh*gw) as from build_slots.
struct Blocks {
    const int* slot;
    const int* cells;
    int gh, gw, n_high, n_blocks;
};

struct TableEntry {
    int* table;
    int block, stride, pitch, centre;
};

// Column m of a table.
INLINE void fill_column(const Blocks& b, const TableEntry& entry, int m) {
    if (m >= entry.pitch) return;
    int block = entry.block, half = block / 2, out = block / entry.stride;
    int high_rows = b.n_high * block * block;
    int rows = high_rows + (b.n_blocks - b.n_high) * half * half;
    int zero = rows + b.n_high * half * half;
    int out_high_rows = b.n_high * out * out, side = out / 2;
    int out_rows = out_high_rows + (b.n_blocks - b.n_high) * side * side;
    if (m >= out_rows) {
        for (int tap = 0; tap < (entry.centre ? 1 : 9); tap++)
            entry.table[tap * entry.pitch + m] = zero;
        return;
    }
    // A quad of a high block, or a pixel of a low one: both are `side` in a line.
    bool high = m < out_high_rows;
    auto [rank, y, x] = spot_at(high ? m / 4 : m - out_high_rows, side, shift_of(side));
    if (high) y = 2 * y + m % 4 / 2, x = 2 * x + m % 2;
    int cell = b.cells[high ? rank : b.n_high + rank];
    Extended at = {block, high_rows, rows, zero};
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
        if (entry.centre && tap != 4) continue;
        entry.table[(entry.centre ? 0 : tap) * entry.pitch + m] =
            neighbour_row(at, b.slot, b.gh, b.gw, cell, rank, high, y * entry.stride + tap / 3 - 1,
                          x * entry.stride + tap % 3 - 1);
    }
}
