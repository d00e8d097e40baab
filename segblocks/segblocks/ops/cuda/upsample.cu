// upsample: pixels (P, C) at block side b -> pixels (P', C) at block side b*scale; bilinear, high
//   blocks on the full-resolution picture, low blocks on the half-resolution one.
//
// Compile-time constants beside those of dtypes.cuh and bilinear.cuh:
//   SB_SCALE  the scale where it is worth a kernel of its own, 0: any
#include "bilinear.cuh"

struct Params {
    const scalar* in;
    scalar* out;
    const int* slot;
    const int* cells;
    Place place;  // of the smaller tensor
    int scale;
    Divider by_high, by_low;  // tap cells per block row
};

constexpr int UNROLL = SB_SCALE ? SB_SCALE : 1;

INLINE int scale_of(const Params& p) { return SB_SCALE ? SB_SCALE : p.scale; }

template <bool HIGH> INLINE index_t first_output(const Params& p, int k) {
    return first_pixel<HIGH>(p.place, k) * scale_of(p) * scale_of(p);
}

template <bool HIGH> INLINE void enlarge(const Params& p, const Work& w) {
    const int scale = scale_of(p), out_side = side_of<HIGH>(p.place) * scale;
    const Divider& by_taps = HIGH ? p.by_high : p.by_low;
    const int taps = by_taps.divisor, id = w.chunk * (int)blockDim.x + threadIdx.x;
    if (id >= taps * taps * p.place.vectors) return;
    const Position at = position(id, p.place.by_vectors, by_taps);
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
    real tap[4][VECTOR], upper[VECTOR], lower[VECTOR];
    read_taps<HIGH>(tap, p.place, p.slot, p.in, cell, w.k, at.y - 1, at.x - 1, at.v);
    const int y = (at.y - 1) * scale + scale / 2, x = (at.x - 1) * scale + scale / 2;
    const int channels = p.place.channels;
    scalar* out = p.out + (first_output<HIGH>(p, w.k) + y * out_side + x) * channels + at.v * VECTOR;
#pragma unroll UNROLL
    for (int j = 0; j < scale; j++) {
        mix_columns(upper, lower, tap, fraction(j, scale));
        const bool inside = (unsigned)(x + j) < (unsigned)out_side;
#pragma unroll UNROLL
        for (int i = 0; i < scale; i++)
            if (inside && (unsigned)(y + i) < (unsigned)out_side)
                store(out + ((index_t)i * out_side + j) * channels,
                      mix_rows(upper, lower, fraction(i, scale)));
    }
}

extern "C" __global__ void __launch_bounds__(256) upsample(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        enlarge<true>(p, w);
    else
        enlarge<false>(p, w);
}
