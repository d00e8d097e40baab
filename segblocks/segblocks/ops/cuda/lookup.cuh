// What lies around a block, at any distance, and the transpose: who has a pixel around it. `Params`
// has the Place, the pads, `replicate`, and Dividers by the side of a high and of a low block.
#pragma once
#include "blockpad.cuh"

template <bool HIGH, class Params> INLINE const Divider& by_side(const Params& p) {
    return HIGH ? p.by_block : p.by_half;
}

// What the picture of the block's own resolution holds at (y, x), counted from the block's corner.
// `Params` also has the pixels `in`, `slot` and `fill`.
template <bool HIGH, class Params>
INLINE vec look_up(const Params& p, const Cell& cell, int y, int x, int v) {
    const int side = side_of<HIGH>(p.place);
    const int height = p.place.gh * side, width = p.place.gw * side;
    y += cell.y * side;
    x += cell.x * side;
    const int inner_y = min(max(y, 0), height - 1), inner_x = min(max(x, 0), width - 1);
    if (!p.replicate && (y != inner_y || x != inner_x)) return filled(p.fill);
    const int cy = quotient(inner_y, by_side<HIGH>(p)), cx = quotient(inner_x, by_side<HIGH>(p));
    const int s = slot_at(p.place, p.slot, cell.n, cy, cx);
    return picture_at<HIGH>(p.place, p.in, s, inner_y - cy * side, inner_x - cx * side, v);
}

// Rows (or columns) first..last of a picture, widened to all that are clamped to them.
struct Span {
    int first, last;
    int cell_first, cell_last;  // the grid rows whose padded blocks overlap it
};

INLINE Span span(int first, int last, int side, const Divider& by_side, int cells, int before,
                 int after, bool replicate) {
    if (replicate && first == 0) first = min(0, -before);
    if (replicate && last == cells * side - 1) last += max(0, after);
    Span s = {first, last, quotient(max(0, first - after), by_side), -1};
    if (last + before >= 0) s.cell_last = min(cells - 1, quotient(last + before, by_side));
    return s;
}

// Whether only the pixel's own block reads it: it lies deeper than any halo reaches.
template <bool HIGH, class Params> INLINE bool read_by_own_alone(const Params& p, int y, int x) {
    const int side = side_of<HIGH>(p.place);
    const int margin_y = max(0, max(p.top, p.bottom)) * (HIGH ? 2 : 1);
    const int margin_x = max(0, max(p.left, p.right)) * (HIGH ? 2 : 1);
    return y >= margin_y && y < side - margin_y && x >= margin_x && x < side - margin_x;
}

// Every position of a padded block that holds pixel (y, x) of a block, or a part of it: calls
// read(high, s, row, column, weight) with the resolution and the slot of that block.
template <bool HIGH, class Params, class Read>
INLINE void for_each_reader(const Params& p, const Cell& cell, int y, int x, const Read& read) {
    y += cell.y * side_of<HIGH>(p.place);
    x += cell.x * side_of<HIGH>(p.place);
#pragma unroll 1
    for (int high = 0; high < 2; high++) {
        // The pixel covers one pixel of its own picture, and a quarter or four of the other.
        const int y0 = high && !HIGH ? 2 * y : !high && HIGH ? y / 2 : y;
        const int x0 = high && !HIGH ? 2 * x : !high && HIGH ? x / 2 : x;
        const int more = high && !HIGH;
        const real weight = !high && HIGH ? real(0.25) : real(1);
        const int side = high ? p.place.block : p.place.block / 2, width = side + p.left + p.right;
        const Divider& by_side = high ? p.by_block : p.by_half;
        const Span ys = span(y0, y0 + more, side, by_side, p.place.gh, p.top, p.bottom, p.replicate);
        const Span xs = span(x0, x0 + more, side, by_side, p.place.gw, p.left, p.right, p.replicate);
        for (int cy = ys.cell_first; cy <= ys.cell_last; cy++) {
            const int corner_y = cy * side - p.top;
            const int last_y = min(ys.last, corner_y + side + p.top + p.bottom - 1);
            for (int cx = xs.cell_first; cx <= xs.cell_last; cx++) {
                const int s = slot_at(p.place, p.slot, cell.n, cy, cx);
                if ((s >= 0) != high) continue;
                const int corner_x = cx * side - p.left;
                const int last_x = min(xs.last, corner_x + width - 1);
                for (int py = max(ys.first, corner_y); py <= last_y; py++)
                    for (int px = max(xs.first, corner_x); px <= last_x; px++)
                        read(high, s, py - corner_y, px - corner_x, weight);
            }
        }
    }
}
