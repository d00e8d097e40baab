// blockpad and its gradient (blockpad.cu) where every padded pixel lies in the block itself or in
// one of its eight neighbours, and the image ends in `fill`: the paddings of convolutions.
//   blockpad_near           pads of 0 to half a block's low side
//   blockpad_near_backward  as well, opposite pads together: then a pixel is read by at most the
//                           blocks across one row edge, one column edge and the corner they share
//
// Compile-time constants: those of dtypes.cuh, and
//   SB_EACH        vectors of the halo that a thread of blockpad_near brings
//   SB_NORMALISED  1: blockpad_near pads what a batch norm, and a ReLU where `relu` is set, make of the
//                  pixels, rounded as if it had been stored; `table` is as in affine.cuh
#include "blockpad.cuh"
#include "frame.cuh"
#if SB_NORMALISED
#include "affine.cuh"
#endif

struct Params {
    const scalar* in;
    scalar* out;
    const int* slot;
    const int* cells;
#if SB_NORMALISED
    const float* table;
#endif
    double fill;
    Place place;
    int left, right, top, bottom;
    // Of a padded block: the halo. Of a stored block (backward): what the halos of others read.
    Frame high, low;
#if SB_NORMALISED
    int relu;
#endif
};

#if SB_NORMALISED
// Vector v of the channels of a pixel.
struct Prologue {
    const Params& p;
    Affine affine;
    int v;

    INLINE Prologue(const Params& params, int first) : p(params) { prepare(first); }

    INLINE void prepare(int vector) {
        v = vector;
        affine.read(p.table, p.place.channels, v * VECTOR);
    }

    INLINE vec of(vec stored) const {
        real x[VECTOR];
        unpack(stored, x);
        affine.apply(x);
        if (p.relu) rectify(x);
        return pack(x);
    }

    INLINE vec operator()(const scalar* at) const { return of(load(at)); }
};

INLINE int vector_of(const Params& p, Spot at) {
    return at.r - quotient(at.r, p.place.by_vectors) * p.place.vectors;
}
#endif

// Where a vector of the halo of a padded block comes from.
struct Source {
    int slot, y, x, v;  // pixel (y, x) of the block with this slot
    bool exists;        // else it lies beyond the image
};

template <bool HIGH> INLINE Source source_of(const Params& p, const Cell& cell, Spot at) {
    const int side = side_of<HIGH>(p.place);
    const int column = quotient(at.r, p.place.by_vectors), v = at.r - column * p.place.vectors;
    const int y = at.y - p.top, x = column - p.left;
    const int dy = y < 0 ? -1 : y >= side, dx = x < 0 ? -1 : x >= side;
    const int cy = cell.y + dy, cx = cell.x + dx;
    const bool exists = (unsigned)cy < (unsigned)p.place.gh && (unsigned)cx < (unsigned)p.place.gw;
    const int slot = exists ? slot_at(p.place, p.slot, cell.n, cy, cx) : 0;
    return {slot, y - dy * side, x - dx * side, v, exists};
}

template <bool HIGH> INLINE vec halo_at(const Params& p, const Source& from) {
    if (!from.exists) return filled(p.fill);
#if SB_NORMALISED
    const Prologue read(p, from.v);
#else
    const Load read;
#endif
    return picture_at<HIGH>(p.place, p.in, from.slot, from.y, from.x, from.v, read);
}

template <bool HIGH> INLINE void pad(const Params& p, const Work& w) {
    const Frame& f = HIGH ? p.high : p.low;
    const int row = f.by_row.divisor;
    scalar* out = p.out + first_padded<HIGH>(p, w.k) * p.place.channels;
    if (w.chunk >= f.chunks) {
        const scalar* own = p.in + first_pixel<HIGH>(p.place, w.k) * p.place.channels;
        const auto from = [&](int t, Spot) { return own + (index_t)t * VECTOR; };
        const auto to = [&](int, Spot at) { return out + ((index_t)at.y * row + at.r) * VECTOR; };
#if SB_NORMALISED
        const int first = (w.chunk - f.chunks) * (int)blockDim.x * p.place.items + threadIdx.x;
        Prologue prologue(p, vector_of(p, inside(f, first)));
        copy_inside(f, w.chunk, p.place.items, from, to, [&](vec v, Spot at) {
            const int vector = vector_of(p, at);  // mostly the same for all of a thread
            if (vector != prologue.v) prologue.prepare(vector);
            return prologue.of(v);
        });
#else
        copy_inside(f, w.chunk, p.place.items, from, to);
#endif
        return;
    }
    expect_slots(p.slot, w.k);
    const int first = w.chunk * (int)blockDim.x * SB_EACH + threadIdx.x;
    if (first >= f.size) return;
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
    Source from[SB_EACH];  // all slots are on their way before the first one is waited for
    vec held[SB_EACH];
#pragma unroll
    for (int i = 0; i < SB_EACH; i++)
        from[i] = source_of<HIGH>(p, cell, on_frame(f, min(first + i * (int)blockDim.x, f.size - 1)));
#pragma unroll
    for (int i = 0; i < SB_EACH; i++) held[i] = halo_at<HIGH>(p, from[i]);
#pragma unroll
    for (int i = 0; i < SB_EACH; i++) {
        const int t = first + i * (int)blockDim.x;
        const Spot at = on_frame(f, t);
        if (t < f.size) store(out + ((index_t)at.y * row + at.r) * VECTOR, held[i]);
    }
}

extern "C" __global__ void __launch_bounds__(256) blockpad_near(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        pad<true>(p, w);
    else
        pad<false>(p, w);
}

// What the padded blocks of both resolutions read of pixel (y, x) of a block; `own` is its gradient
// from the block itself. A neighbour (dy, dx) is across the nearby row edge, column edge or corner.
template <bool HIGH>
INLINE vec gradient(const Params& p, const Cell& cell, const scalar* own, int y, int x, int dy,
                    int dx, int v) {
    constexpr int MOST = HIGH ? 1 : 4;  // a high block reads four copies of a low pixel
    const int b = p.place.block;
    int slots[3];
    unsigned here = 0, on = 0;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        const int ny = i == 1 ? 0 : dy, nx = i == 0 ? 0 : dx;
        const bool exists = (i == 1 || dy) && (i == 0 || dx) &&
                            (unsigned)(cell.y + ny) < (unsigned)p.place.gh &&
                            (unsigned)(cell.x + nx) < (unsigned)p.place.gw;
        here |= (unsigned)exists << i;
        slots[i] = exists ? slot_at(p.place, p.slot, cell.n, cell.y + ny, cell.x + nx) : 0;
    }
    const vec center = load(own);
    vec held[3][MOST];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        if (!(here >> i & 1)) continue;
        const bool high = slots[i] >= 0;
        const int side = high ? b : b / 2;
        const int height = side + p.top + p.bottom, width = side + p.left + p.right;
        // The first pixel of the neighbour's picture that shows this one, in its padded block.
        const int py = (HIGH && !high ? y / 2 : !HIGH && high ? 2 * y : y) -
                       (i == 1 ? 0 : dy) * side + p.top;
        const int px = (HIGH && !high ? x / 2 : !HIGH && high ? 2 * x : x) -
                       (i == 0 ? 0 : dx) * side + p.left;
        const index_t start = high ? first_padded<true>(p, slots[i])
                                   : first_padded<false>(p, p.place.n_high - 1 - slots[i]);
        const scalar* at =
            p.in + (start + py * width + px) * (index_t)p.place.channels + v * VECTOR;
#pragma unroll
        for (int j = 0; j < MOST; j++) {
            const bool read = (j == 0 || high) && (unsigned)(py + j / 2) < (unsigned)height &&
                              (unsigned)(px + j % 2) < (unsigned)width;
            on |= (unsigned)read << (MOST * i + j);
            if (read)
                held[i][j] = load(at + (index_t)(j / 2 * width + j % 2) * p.place.channels);
        }
    }
    real sum[VECTOR];
    unpack(center, sum);
#pragma unroll
    for (int i = 0; i < 3; i++)
#pragma unroll
        for (int j = 0; j < MOST; j++)
            if (on >> (MOST * i + j) & 1)
                add(sum, held[i][j], HIGH && slots[i] < 0 ? real(0.25) : real(1));
    return pack(sum);
}

template <bool HIGH> INLINE void pad_backward(const Params& p, const Work& w) {
    const Frame& f = HIGH ? p.high : p.low;
    const int side = side_of<HIGH>(p.place), row = side * p.place.vectors;
    const int wide = (side + p.left + p.right) * p.place.vectors;
    const scalar* own = p.in + (first_padded<HIGH>(p, w.k) * p.place.vectors +
                                (index_t)(p.top * wide + p.left * p.place.vectors)) * VECTOR;
    scalar* out = p.out + first_pixel<HIGH>(p.place, w.k) * p.place.channels;
    if (w.chunk >= f.chunks) {
        copy_inside(
            f, w.chunk, p.place.items,
            [&](int, Spot at) { return own + ((index_t)at.y * wide + at.r) * VECTOR; },
            [&](int, Spot at) { return out + (index_t)(at.y * row + at.r) * VECTOR; });
        return;
    }
    expect_slots(p.slot, w.k);
    const int t = w.chunk * (int)blockDim.x + threadIdx.x;
    if (t >= f.size) return;
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
    const Spot at = on_frame(f, t);
    const int x = quotient(at.r, p.place.by_vectors), v = at.r - x * p.place.vectors;
    const int dy = at.y < f.rows_before ? -1 : at.y >= f.rows_before + f.rows;
    const int dx = at.r < f.vectors_before ? -1 : at.r >= f.vectors_before + f.vectors;
    store(out + (index_t)(at.y * row + at.r) * VECTOR,
          gradient<HIGH>(p, cell, own + ((index_t)at.y * wide + at.r) * VECTOR, at.y, x, dy, dx, v));
}

extern "C" __global__ void __launch_bounds__(128, 6) blockpad_near_backward(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        pad_backward<true>(p, w);
    else
        pad_backward<false>(p, w);
}
