// Where a pixel round a block is stored: the halo as a row number of an extended buffer.
#pragma once

// An extended buffer at one scale: stored pixels of the high blocks (sides of `block` pixels), of the
// low blocks (half that), then the 2×2 averages of the high blocks, then one row of zeros.
struct Extended {
    int block, high_rows, rows, zero;
};

// What a block reads at pixel (y, x) of its own resolution, up to one block outside it. The block lies
// at `cell` and has that rank among those of its resolution.
INLINE int neighbour_row(const Extended& e, const int* slot, int gh, int gw, int cell, int rank,
                         bool high, int y, int x) {
    int half = e.block / 2, side = high ? e.block : half;
    if ((unsigned)y < side && (unsigned)x < side)
        return (high ? 0 : e.high_rows) + (rank * side + y) * side + x;
    int step_y = y < 0 ? -1 : y >= side, step_x = x < 0 ? -1 : x >= side;
    int cell_y = cell / gw % gh + step_y, cell_x = cell % gw + step_x;
    if ((unsigned)cell_y >= gh || (unsigned)cell_x >= gw) return e.zero;
    y -= step_y * side;
    x -= step_x * side;
    int place = slot[cell + step_y * gw + step_x];
    if (place < 0) {  // a high block repeats the pixels of a low neighbour 2×2
        if (high) y /= 2, x /= 2;
        return e.high_rows + ((-1 - place) * half + y) * half + x;
    }
    if (high) return (place * e.block + y) * e.block + x;
    return e.rows + (place * half + y) * half + x;
}
