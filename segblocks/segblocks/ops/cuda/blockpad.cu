// blockpad: pixels (P, C) -> padded (P', C), blocks in the same order, each side + pads.
//   A high block reads the full-resolution picture, a low block the half-resolution one, at any
//   distance. Beyond the image: `fill`, or the nearest pixel of the image (replicate). Negative pads
//   crop.
// blockpad_backward: gradient of padded -> gradient of the pixels, by gathering.
//
// For any pads; blockpad_near.cu has the common ones.
//
// Compile-time constants: those of dtypes.cuh.
#include "blockpad.cuh"

struct Params {
    const scalar* in;
    scalar* out;
    const int* slot;
    const int* cells;
    double fill;
    Place place;
    int left, right, top, bottom, replicate;
    Divider by_row_high, by_row_low;    // vectors per block row of the output
    Divider by_block, by_half;          // sides of a high and of a low block
};

template <bool HIGH> INLINE const Divider& by_side(const Params& p) {
    return HIGH ? p.by_block : p.by_half;
}

// What the picture of the block's own resolution holds at (y, x), counted from the block's corner.
template <bool HIGH> INLINE vec look_up(const Params& p, const Cell& cell, int y, int x, int v) {
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

template <bool HIGH> INLINE void pad(const Params& p, const Work& w) {
    const int side = side_of<HIGH>(p.place), across = side * p.place.vectors;
    const Divider& by_row = HIGH ? p.by_row_high : p.by_row_low;
    const int row = by_row.divisor, total = (side + p.top + p.bottom) * row;
    const int first = w.chunk * p.place.items * (int)blockDim.x + threadIdx.x;
    const scalar* own = p.in + first_pixel<HIGH>(p.place, w.k) * p.place.channels;
    scalar* out = p.out + first_padded<HIGH>(p, w.k) * p.place.channels;
    vec held[ITEMS];
    unsigned inner = 0, halo = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int t = first + i * (int)blockDim.x;
        if (i >= p.place.items || t >= total) continue;
        const int line = quotient(t, by_row), y = line - p.top;
        const int r = t - line * row - p.left * p.place.vectors;
        if ((unsigned)y < (unsigned)side && (unsigned)r < (unsigned)across) {
            inner |= 1u << i;
            held[i] = load(own + (index_t)(y * across + r) * VECTOR);
        } else {
            halo |= 1u << i;
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (inner >> i & 1) store(out + (index_t)(first + i * (int)blockDim.x) * VECTOR, held[i]);
    if (!halo) return;
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
#pragma unroll 1
    for (int i = 0; i < ITEMS; i++) {
        if (!(halo >> i & 1)) continue;
        const int t = first + i * (int)blockDim.x;
        const int line = quotient(t, by_row), r = t - line * row;
        const int x = quotient(r, p.place.by_vectors), v = r - x * p.place.vectors;
        store(out + (index_t)t * VECTOR, look_up<HIGH>(p, cell, line - p.top, x - p.left, v));
    }
}

extern "C" __global__ void __launch_bounds__(256) blockpad(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        pad<true>(p, w);
    else
        pad<false>(p, w);
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

// What the padded blocks of both resolutions read of pixel (y, x) of a block.
template <bool HIGH>
INLINE vec gradient(const Params& p, const Cell& cell, int y, int x, int v) {
    real sum[VECTOR];
    clear(sum);
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
                const index_t start = high ? first_padded<true>(p, s)
                                           : first_padded<false>(p, p.place.n_high - 1 - s);
                const scalar* block = p.in + start * p.place.channels + v * VECTOR;
                for (int py = max(ys.first, corner_y); py <= last_y; py++)
                    for (int px = max(xs.first, corner_x); px <= last_x; px++) {
                        const int at = (py - corner_y) * width + px - corner_x;
                        add(sum, load(block + (index_t)at * p.place.channels), weight);
                    }
            }
        }
    }
    return pack(sum);
}

template <bool HIGH> INLINE void pad_backward(const Params& p, const Work& w) {
    const int side = side_of<HIGH>(p.place), across = side * p.place.vectors;
    const Divider& by_row = HIGH ? p.by_row_high : p.by_row_low;
    const int total = side * across, first = w.chunk * p.place.items * (int)blockDim.x + threadIdx.x;
    const int height = side + p.top + p.bottom;
    const int wide = (side + p.left + p.right) * p.place.vectors;
    // Pixels this far from the block's edge are read by their own block alone.
    const int margin_y = max(0, max(p.top, p.bottom)) * (HIGH ? 2 : 1);
    const int margin_x = max(0, max(p.left, p.right)) * (HIGH ? 2 : 1) * p.place.vectors;
    const scalar* own = p.in + first_padded<HIGH>(p, w.k) * p.place.channels;
    scalar* out = p.out + first_pixel<HIGH>(p.place, w.k) * p.place.channels;
    vec held[ITEMS];
    unsigned inner = 0, shared = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int t = first + i * (int)blockDim.x;
        if (i >= p.place.items || t >= total) continue;
        const int y = quotient(t, by_row), r = t - y * across;
        if (y >= margin_y && y < side - margin_y && r >= margin_x && r < across - margin_x) {
            inner |= 1u << i;
            const int line = y + p.top, e = r + p.left * p.place.vectors;
            held[i] = vec();  // cropped away
            if ((unsigned)line < (unsigned)height && (unsigned)e < (unsigned)wide)
                held[i] = load(own + ((index_t)line * wide + e) * VECTOR);
        } else {
            shared |= 1u << i;
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (inner >> i & 1) store(out + (index_t)(first + i * (int)blockDim.x) * VECTOR, held[i]);
    if (!shared) return;
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
#pragma unroll 1
    for (int i = 0; i < ITEMS; i++) {
        if (!(shared >> i & 1)) continue;
        const int t = first + i * (int)blockDim.x;
        const Position at = position(t, p.place.by_vectors, by_side<HIGH>(p));
        store(out + (index_t)t * VECTOR, gradient<HIGH>(p, cell, at.y, at.x, at.v));
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) blockpad_backward(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        pad_backward<true>(p, w);
    else
        pad_backward<false>(p, w);
}
