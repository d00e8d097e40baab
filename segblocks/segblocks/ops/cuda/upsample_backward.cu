// upsample_backward: gradient of the enlarged pixels (P', C) -> gradient of the pixels (P, C), by
//   gathering; see upsample.cu.
//
// Compile-time constants beside those of dtypes.cuh and bilinear.cuh:
//   SB_SCALE  2: scale 2 and low blocks of two rows at least; 0: anything
#include "bilinear.cuh"
#include "frame.cuh"

struct Params {
    const scalar* in;
    scalar* out;
    const int* slot;
    const int* cells;
    Place place;  // of the smaller tensor
    int scale;
    Frame high, low;  // of the pixels that neighbours read through either picture
};

template <bool HIGH> INLINE const scalar* gradient_at(const Params& p, int s, int y, int x, int v) {
    const int scale = SB_SCALE ? SB_SCALE : p.scale, row = side_of<HIGH>(p.place) * scale;
    const index_t first = first_pixel<HIGH>(p.place, HIGH ? s : p.place.n_high - 1 - s);
    return p.in + (first * scale * scale + y * row + x) * p.place.channels + v * VECTOR;
}

#if SB_SCALE == 2

// Along one axis, the outputs of one resolution that read a pixel, which may be of the other: of
// the block beside it those from `first` on, and the one beyond that block's edge.
struct Line {
    int first;
    real w[6];
    int beyond;
    real weight;  // of the one beyond, and of the whole line
};

template <bool HIGH>
INLINE Line line(bool high, int at, const Place& p, int cell, int cells) {
    const int side = side_of<HIGH>(p), own = HIGH && !high ? at / 2 : at;
    const Reach r = reach(own, HIGH && !high ? side / 2 : side, cell, cells);
    const bool twice = !HIGH && high;  // two copies of the pixel, one after the other
    Line line;
    line.first = 2 * own * (twice ? 2 : 1) - 1;
    line.beyond = r.beyond;
    line.w[0] = r.w[0];
    line.w[1] = r.w[1];
    line.w[2] = twice ? real(1) : r.w[2];
    line.w[3] = twice ? real(1) : r.w[3];
    line.w[4] = twice ? r.w[2] : real(0);
    line.w[5] = twice ? r.w[3] : real(0);
    line.weight = HIGH && !high ? real(0.5) : real(1);
    return line;
}

// What the neighbour across a row edge (dy), a column edge (dx) or a corner reads of pixel (y, x).
template <bool HIGH>
INLINE void add_neighbour(real (&sum)[VECTOR], const Params& p, const Cell& cell, int s, int dy,
                          int dx, int y, int x, int v) {
    const bool high = s >= 0;
    const Line ly = line<HIGH>(high, y, p.place, cell.y, p.place.gh);
    const Line lx = line<HIGH>(high, x, p.place, cell.x, p.place.gw);
    if ((dy && !ly.beyond) || (dx && !lx.beyond)) return;  // read at the other resolution only
    const int out = high ? 2 * p.place.block : p.place.block;
    const int oy = dy < 0 ? out - 1 : dy > 0 ? 0 : ly.first;
    const int ox = dx < 0 ? out - 1 : dx > 0 ? 0 : lx.first;
    const scalar* at =
        high ? gradient_at<true>(p, s, oy, ox, v) : gradient_at<false>(p, s, oy, ox, v);
    const real weight = ly.weight * lx.weight;
    if (dy && dx)
        add(sum, load(at), weight * real(0.0625));
    else if (dy)
        gather_line(sum, at, (index_t)p.place.channels, lx.w, weight * real(0.25));
    else
        gather_line(sum, at, (index_t)out * p.place.channels, ly.w, weight * real(0.25));
}

template <bool HIGH, bool EDGE>
INLINE void gather_pixel(real (&sum)[VECTOR], const Params& p, int k, int y, int x, int v) {
    const int side = side_of<HIGH>(p.place), c = p.place.channels;
    const index_t row = (index_t)2 * side * c;
    const int rank = HIGH ? k : p.place.n_high - 1 - k;
    const scalar* first = gradient_at<HIGH>(p, rank, 2 * y - 1, 2 * x - 1, v);
    if (!EDGE) return gather_window(sum, first, row, (index_t)c);
    const Cell cell = cell_of(p.place, __ldg(p.cells + k));
    // The neighbours that may read it; a low block's halo reaches two rows into a high one.
    const int reached = HIGH ? y / 2 : y, across = HIGH ? x / 2 : x, half = p.place.block / 2;
    const int dy = reach(reached, half, cell.y, p.place.gh).beyond;
    const int dx = reach(across, half, cell.x, p.place.gw).beyond;
    int slots[3] = {0, 0, 0};
    if (dy) slots[0] = slot_at(p.place, p.slot, cell.n, cell.y + dy, cell.x);
    if (dx) slots[1] = slot_at(p.place, p.slot, cell.n, cell.y, cell.x + dx);
    if (dy && dx) slots[2] = slot_at(p.place, p.slot, cell.n, cell.y + dy, cell.x + dx);
    gather_own(sum, first, row, (index_t)c, reach(y, side, cell.y, p.place.gh),
               reach(x, side, cell.x, p.place.gw));
    if (dy) add_neighbour<HIGH>(sum, p, cell, slots[0], dy, 0, y, x, v);
    if (dx) add_neighbour<HIGH>(sum, p, cell, slots[1], 0, dx, y, x, v);
    if (dy && dx) add_neighbour<HIGH>(sum, p, cell, slots[2], dy, dx, y, x, v);
}

#else

template <bool HIGH, bool EDGE>
INLINE void gather_pixel(real (&sum)[VECTOR], const Params& p, int k, int y, int x, int v) {
    const Cell cell = cell_of(p.place, __ldg(p.cells + k));
    const auto high = [&](int s, int oy, int ox) { return load(gradient_at<true>(p, s, oy, ox, v)); };
    const auto low = [&](int s, int oy, int ox) { return load(gradient_at<false>(p, s, oy, ox, v)); };
    const int scale = p.scale;
    if (HIGH) {
        gather<true>(sum, p.place, p.slot, cell, scale, y, y, x, x, 1, high);
        if (!SB_LEGACY)
            gather<false>(sum, p.place, p.slot, cell, scale, y / 2, y / 2, x / 2, x / 2, real(0.25),
                          low);
    } else {
        gather<false>(sum, p.place, p.slot, cell, scale, y, y, x, x, 1, low);
        if (!SB_LEGACY)
            gather<true>(sum, p.place, p.slot, cell, scale, 2 * y, 2 * y + 1, 2 * x, 2 * x + 1, 1,
                         high);
    }
}

#endif

template <bool HIGH, bool EDGE> INLINE void reduce(const Params& p, const Work& w, const Spot& at) {
    const int x = quotient(at.r, p.place.by_vectors), v = at.r - x * p.place.vectors;
    const int row = side_of<HIGH>(p.place) * p.place.vectors;
    real sum[VECTOR];
    clear(sum);
    gather_pixel<HIGH, EDGE>(sum, p, w.k, at.y, x, v);
    scalar* out = p.out + first_pixel<HIGH>(p.place, w.k) * p.place.channels;
    store(out + (index_t)(at.y * row + at.r) * VECTOR, pack(sum));
}

template <bool HIGH> INLINE void reduce_block(const Params& p, const Work& w) {
    const Frame& f = HIGH ? p.high : p.low;
    if (w.chunk < f.chunks) {
        const int t = w.chunk * (int)blockDim.x + threadIdx.x;
        if (t < f.size) reduce<HIGH, true>(p, w, on_frame(f, t));
    } else {
        const int t = (w.chunk - f.chunks) * (int)blockDim.x + threadIdx.x;
        if (t < f.rows * f.vectors) reduce<HIGH, false>(p, w, inside(f, t));
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) upsample_backward(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        reduce_block<true>(p, w);
    else
        reduce_block<false>(p, w);
}
