// A block divided into the frame along its edges, which neighbours have a part in, and the inside,
// which they have not. The thread blocks of a stored block take the frame first, one vector per
// thread, then the inside: so no warp does both.
#pragma once
#include "common.cuh"

struct Frame {
    int rows_before, rows;        // lines above the inside, lines of the inside
    int vectors_before, vectors;  // of a line: left of the inside, of the inside
    int full;                     // vectors of the whole lines above and below the inside
    int size;                     // vectors of the frame
    int chunks;                   // thread blocks of the frame
    Divider by_row, by_sides, by_inside;  // vectors of a line: all, beside the inside, of the inside
};

// A line of the block and a vector of the line.
struct Spot {
    int y, r;
};

INLINE Spot on_frame(const Frame& f, int t) {
    if (t < f.full) {
        const int y = quotient(t, f.by_row);
        return {y < f.rows_before ? y : y + f.rows, t - y * (int)f.by_row.divisor};
    }
    t -= f.full;
    const int y = quotient(t, f.by_sides), r = t - y * (int)f.by_sides.divisor;
    return {y + f.rows_before, r < f.vectors_before ? r : r + f.vectors};
}

INLINE Spot inside(const Frame& f, int t) {
    const int y = quotient(t, f.by_inside);
    return {y + f.rows_before, t - y * (int)f.by_inside.divisor + f.vectors_before};
}

struct Unchanged {
    INLINE vec operator()(vec v, Spot) const { return v; }
};

// Copies this thread's vectors of the inside from from(t, spot) to to(t, spot), as change(v, spot).
template <class From, class To, class Change = Unchanged>
INLINE void copy_inside(const Frame& f, int chunk, int items, const From& from, const To& to,
                        const Change& change = Change()) {
    const int first = (chunk - f.chunks) * (int)blockDim.x * items + threadIdx.x;
    const int end = min(f.rows * f.vectors, first + items * (int)blockDim.x);
    vec held[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int t = first + i * (int)blockDim.x;
        if (t < end) held[i] = load(from(t, inside(f, t)));
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int t = first + i * (int)blockDim.x;
        if (t < end) store(to(t, inside(f, t)), change(held[i], inside(f, t)));
    }
}
