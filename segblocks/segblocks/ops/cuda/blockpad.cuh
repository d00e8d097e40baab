// Padded blocks (P', C): blocks in the order of the pixel buffer, each side + pads. `Params` has the
// Place and the pads.
#pragma once
#include "common.cuh"

template <bool HIGH, class Params> INLINE index_t first_padded(const Params& p, int k) {
    const int b = p.place.block, h = b / 2;
    const index_t high = (index_t)(b + p.top + p.bottom) * (b + p.left + p.right);
    const index_t low = (index_t)(h + p.top + p.bottom) * (h + p.left + p.right);
    return HIGH ? k * high : p.place.n_high * high + (k - p.place.n_high) * low;
}

// What the picture of one resolution holds at pixel (y, x) of the block with slot s.
template <bool HIGH, class Read = Load>
INLINE vec picture_at(const Place& p, const scalar* pixels, int s, int y, int x, int v,
                      const Read& read = Read()) {
    const int side = side_of<HIGH>(p), b = p.block, c = p.channels;
    const index_t start = s >= 0 ? first_pixel<true>(p, s) : first_pixel<false>(p, p.n_high - 1 - s);
    const scalar* block = pixels + start * c + v * VECTOR;
    if (!HIGH && s >= 0) {
        real value[VECTOR];
        clear(value);
        add_quarters(value, block + (index_t)(2 * y * b + 2 * x) * c, b, c, real(0.25), read);
        return pack(value);
    }
    const int at = HIGH && s < 0 ? y / 2 * (b / 2) + x / 2 : y * side + x;
    return read(block + (index_t)at * c);
}

INLINE vec filled(double fill) {
    real value[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; j++) value[j] = real(fill);
    return pack(value);
}
