// blockpad: pixels (P, C) -> padded (P', C), blocks in the same order, each side + pads.
//   A high block reads the full-resolution picture, a low block the half-resolution one, at any
//   distance. Beyond the image: `fill`, or the nearest pixel of the image (replicate). Negative pads
//   crop.
// blockpad_backward: gradient of padded -> gradient of the pixels, by gathering.
//
// For any pads; blockpad_near.cu has the common ones.
//
// Compile-time constants: those of dtypes.cuh.
#include "lookup.cuh"

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

// What the padded blocks of both resolutions read of pixel (y, x) of a block.
template <bool HIGH>
INLINE vec gradient(const Params& p, const Cell& cell, int y, int x, int v) {
    real sum[VECTOR];
    clear(sum);
    for_each_reader<HIGH>(p, cell, y, x, [&](bool high, int s, int row, int column, real weight) {
        const int width = (high ? p.place.block : p.place.block / 2) + p.left + p.right;
        const index_t start =
            high ? first_padded<true>(p, s) : first_padded<false>(p, p.place.n_high - 1 - s);
        const scalar* at = p.in + (start + row * width + column) * p.place.channels;
        add(sum, load(at + v * VECTOR), weight);
    });
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
