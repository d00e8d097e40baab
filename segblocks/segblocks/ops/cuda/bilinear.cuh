// Bilinear enlargement of the full- and the half-resolution picture (align_corners=False).
//
// At scale s, output row o of a block reads source rows t and t + 1 with weights 1 - f and f, where
// s*t + s/2 <= o < s*(t+1) + s/2. So the s×s outputs of one "tap cell" (t, u), -1 <= t, u < side,
// share four source pixels. f is computed from integers, exactly.
//
// Compile-time constant: SB_LEGACY  1: every block alone, clamped at its own edge.
#pragma once
#include "common.cuh"

// A block row (or column) of the grid and a position in it.
struct Near {
    int cell, at;
    bool inside;  // false: beyond the image (or the block, if legacy) and clamped
};

// `at` lies at most one block outside its own.
INLINE Near near(int at, int side, int cell, int cells) {
    if (at < 0) {
        if (SB_LEGACY || cell == 0) return {cell, 0, false};
        return {cell - 1, at + side, true};
    }
    if (at >= side) {
        if (SB_LEGACY || cell == cells - 1) return {cell, side - 1, false};
        return {cell + 1, at - side, true};
    }
    return {cell, at, true};
}

// Where the picture of one resolution keeps pixel (y, x), given the slot of its block.
template <bool HIGH>
INLINE index_t picture_offset(const Place& p, int s, int y, int x) {
    const int b = p.block, h = b / 2;
    if (s >= 0) {
        const int at = HIGH ? y * b + x : 2 * (y * b + x);  // else the first of four
        return (first_pixel<true>(p, s) + at) * p.channels;
    }
    const int at = HIGH ? y / 2 * h + x / 2 : y * h + x;
    return (first_pixel<false>(p, p.n_high - 1 - s) + at) * p.channels;
}

// The four source pixels of tap cell (t, u) of stored block k, which lies at `cell`.
template <bool HIGH>
INLINE void read_taps(real (&tap)[4][VECTOR], const Place& p, const int* slot, const scalar* pixels,
                      const Cell& cell, int k, int t, int u, int v) {
    const int side = side_of<HIGH>(p);
    if (t >= 0 && u >= 0 && t + 1 < side && u + 1 < side) {
        const scalar* at =
            pixels + (first_pixel<HIGH>(p, k) + t * side + u) * p.channels + v * VECTOR;
        const index_t row = (index_t)side * p.channels;
        const vec a = load(at), b = load(at + p.channels);
        const vec c = load(at + row), d = load(at + row + p.channels);
        unpack(a, tap[0]);
        unpack(b, tap[1]);
        unpack(c, tap[2]);
        unpack(d, tap[3]);
        return;
    }
    // At an edge: first all slots, then all pixels, so that the waits do not add up.
    const Near y[2] = {near(t, side, cell.y, p.gh), near(t + 1, side, cell.y, p.gh)};
    const Near x[2] = {near(u, side, cell.x, p.gw), near(u + 1, side, cell.x, p.gw)};
    int slots[4];
    const scalar* at[4];
    vec held[4];
#pragma unroll
    for (int i = 0; i < 4; i++) slots[i] = slot_at(p, slot, cell.n, y[i / 2].cell, x[i % 2].cell);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        at[i] = pixels + picture_offset<HIGH>(p, slots[i], y[i / 2].at, x[i % 2].at) + v * VECTOR;
        held[i] = load(at[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (!HIGH && slots[i] >= 0) {
            clear(tap[i]);
            add_quarters(tap[i], at[i], p.block, p.channels, real(0.25));
        } else {
            unpack(held[i], tap[i]);
        }
    }
}

// Weight of source row t + 1 in output row s*t + s/2 + i.
INLINE real fraction(int i, int scale) { return real(2 * i + 1 - scale % 2) / real(2 * scale); }

// Columns first: the upper and the lower source row at column weight fx, then their mix at fy.
INLINE void mix_columns(real (&upper)[VECTOR], real (&lower)[VECTOR], const real (&tap)[4][VECTOR],
                        real fx) {
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
        upper[j] = (1 - fx) * tap[0][j] + fx * tap[1][j];
        lower[j] = (1 - fx) * tap[2][j] + fx * tap[3][j];
    }
}

INLINE vec mix_rows(const real (&upper)[VECTOR], const real (&lower)[VECTOR], real fy) {
    real out[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; j++) out[j] = (1 - fy) * upper[j] + fy * lower[j];
    return pack(out);
}

// Weight with which output row `o` (counted from the block's first) reads rows first..last of the
// source; rows beyond the image count for the row they are clamped to.
INLINE real row_weight(int o, int scale, int first, int last, int side, bool start, bool end) {
    const int t = (o + scale - scale / 2) / scale - 1;  // o >= -scale
    const real f = fraction(o - scale * t - scale / 2, scale);
    const int upper = start ? max(t, 0) : t, lower = end ? min(t + 1, side - 1) : t + 1;
    return (upper >= first && upper <= last ? 1 - f : 0) +
           (lower >= first && lower <= last ? f : 0);
}

// The transpose, for one source pixel: sums the outputs of blocks of resolution HIGH that read
// source rows y0..y1 and columns x0..x1 (counted from the pixel's own block). read(slot, y, x)
// fetches the gradient at output (y, x) of the block stored at `slot`.
template <bool HIGH, class Read>
INLINE void gather(real (&sum)[VECTOR], const Place& p, const int* slot, const Cell& cell, int scale,
                   int y0, int y1, int x0, int x1, real weight, const Read& read) {
    const int side = side_of<HIGH>(p), out = side * scale;
    const bool top = SB_LEGACY || cell.y == 0, bottom = SB_LEGACY || cell.y == p.gh - 1;
    const bool left = SB_LEGACY || cell.x == 0, right = SB_LEGACY || cell.x == p.gw - 1;
    const int oy0 = scale * (y0 - 1) + scale / 2, oy1 = scale * (y1 + 1) + scale / 2;
    const int ox0 = scale * (x0 - 1) + scale / 2, ox1 = scale * (x1 + 1) + scale / 2;
    for (int dy = top || oy0 >= 0 ? 0 : -1; dy <= (bottom || oy1 <= out ? 0 : 1); dy++) {
        const int from_y = max(oy0, dy * out), to_y = min(oy1, (dy + 1) * out);
        for (int dx = left || ox0 >= 0 ? 0 : -1; dx <= (right || ox1 <= out ? 0 : 1); dx++) {
            const int s = slot_at(p, slot, cell.n, cell.y + dy, cell.x + dx);
            if ((s >= 0) != HIGH) continue;
            const int from_x = max(ox0, dx * out), to_x = min(ox1, (dx + 1) * out);
#pragma unroll 1
            for (int oy = from_y; oy < to_y; oy++) {
                const real wy = weight * row_weight(oy, scale, y0, y1, side, top, bottom);
#pragma unroll 2
                for (int ox = from_x; ox < to_x; ox++)
                    add(sum, read(s, oy - dy * out, ox - dx * out),
                        wy * row_weight(ox, scale, x0, x1, side, left, right));
            }
        }
    }
}

// The 4×4 outputs of scale 2 that read pixel (y, x) of the half-resolution picture, and how.
struct Window {
    real wy[4], wx[4];
    unsigned mask;  // bit 3*r + c: outputs in row region r (first, own two, last), column region c
};

INLINE int region(int i) { return (i + 1) / 2; }

// Only outputs of low blocks count.
INLINE Window window(const Place& p, const int* slot, const Cell& cell, bool own, int y, int x) {
    const int h = p.block / 2;
    Window w;
    w.mask = 0;
    Near rows[3], columns[3];
#pragma unroll
    for (int r = 0; r < 3; r++) {
        rows[r] = r == 1 ? Near{cell.y, y, true} : near(y + r - 1, h, cell.y, p.gh);
        columns[r] = r == 1 ? Near{cell.x, x, true} : near(x + r - 1, h, cell.x, p.gw);
    }
#pragma unroll
    for (int r = 0; r < 9; r++) {
        const Near row = rows[r / 3], column = columns[r % 3];
        bool low = row.inside && column.inside;
        if (low)
            low = row.cell == cell.y && column.cell == cell.x
                      ? own
                      : slot_at(p, slot, cell.n, row.cell, column.cell) < 0;
        w.mask |= (unsigned)low << r;
    }
    // A row that clamps at the border is read with both of its weights.
    w.wy[0] = w.wy[3] = w.wx[0] = w.wx[3] = real(0.25);
    w.wy[1] = rows[0].inside ? real(0.75) : real(1);
    w.wy[2] = rows[2].inside ? real(0.75) : real(1);
    w.wx[1] = columns[0].inside ? real(0.75) : real(1);
    w.wx[2] = columns[2].inside ? real(0.75) : real(1);
    return w;
}

// All sixteen in the pixel's own block; `at` is the first.
INLINE void gather_window(real (&sum)[VECTOR], const scalar* at, index_t row, index_t column) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        vec held[4];
#pragma unroll
        for (int j = 0; j < 4; j++) held[j] = load(at + i * row + j * column);
        const real wy = region(i) == 1 ? real(0.75) : real(0.25);
#pragma unroll
        for (int j = 0; j < 4; j++) add(sum, held[j], wy * (region(j) == 1 ? real(0.75) : real(0.25)));
    }
}

// How the scale-2 outputs 2*at - 1 .. 2*at + 2 read row (or column) `at` of a block, of two rows at
// least: the weights of those in the pixel's own block, and which neighbour has the other, if any.
struct Reach {
    real w[4];
    int beyond;  // -1: the block before, 1: the one after, 0: none
};

INLINE Reach reach(int at, int side, int cell, int cells) {
    const bool first = at == 0, last = at == side - 1;
    const bool clamped = SB_LEGACY || cell == (first ? 0 : cells - 1);
    Reach r;
    r.w[0] = first ? real(0) : real(0.25);
    r.w[1] = first && clamped ? real(1) : real(0.75);  // read with both weights
    r.w[2] = last && clamped ? real(1) : real(0.75);
    r.w[3] = last ? real(0) : real(0.25);
    r.beyond = clamped ? 0 : first ? -1 : last;
    return r;
}

// `at` is the first output of a line of N; those of weight 0 are not read.
template <int N>
INLINE void gather_line(real (&sum)[VECTOR], const scalar* at, index_t step, const real (&w)[N],
                        real weight) {
    vec held[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        held[j] = vec();
        if (w[j] != 0) held[j] = load(at + j * step);
    }
#pragma unroll
    for (int j = 0; j < N; j++) add(sum, held[j], weight * w[j]);
}

// The outputs in the pixel's own block; `at` is the first of the sixteen.
INLINE void gather_own(real (&sum)[VECTOR], const scalar* at, index_t row, index_t column,
                       const Reach& y, const Reach& x) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        vec held[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            held[j] = vec();
            if (y.w[i] != 0 && x.w[j] != 0) held[j] = load(at + i * row + j * column);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) add(sum, held[j], y.w[i] * x.w[j]);
    }
}
