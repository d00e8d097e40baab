// upsample: pixels (P, C) at block side b -> pixels (P', C) at block side b*scale; bilinear, high
//   blocks on the full-resolution picture, low blocks on the half-resolution one.
// upsample_backward: gradient of the enlarged pixels -> gradient of the pixels, by gathering.
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
    Divider by_high, by_low;  // tap cells, or source pixels, per block row
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

template <bool HIGH> INLINE void reduce(const Params& p, const Work& w) {
    const int scale = scale_of(p), side = side_of<HIGH>(p.place), channels = p.place.channels;
    const int t = w.chunk * (int)blockDim.x + threadIdx.x;
    if (t >= side * side * p.place.vectors) return;
    const Position at = position(t, p.place.by_vectors, HIGH ? p.by_high : p.by_low);
    const int y = at.y, x = at.x;
    real sum[VECTOR];
    clear(sum);
    // Pixels this near to the edge can be read by neighbours, through either picture.
    const int margin = HIGH && !SB_LEGACY ? 2 : 1;
    if (SB_SCALE == 2 && min(y, x) >= margin && max(y, x) < side - margin) {
        const index_t row = (index_t)2 * side * channels;
        gather_window(sum,
                      p.in + first_output<HIGH>(p, w.k) * channels + (2 * y - 1) * row +
                          (index_t)(2 * x - 1) * channels + at.v * VECTOR,
                      row, (index_t)channels);
    } else {
        const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
        const auto read_high = [&](int s, int oy, int ox) {
            const index_t at_output = first_output<true>(p, s) + oy * p.place.block * scale + ox;
            return load(p.in + at_output * channels + at.v * VECTOR);
        };
        const auto read_low = [&](int s, int oy, int ox) {
            const index_t at_output = first_output<false>(p, p.place.n_high - 1 - s) +
                                      oy * (p.place.block / 2) * scale + ox;
            return load(p.in + at_output * channels + at.v * VECTOR);
        };
        if (HIGH) {
            gather<true>(sum, p.place, p.slot, cell, scale, y, y, x, x, 1, read_high);
            if (!SB_LEGACY)
                gather<false>(sum, p.place, p.slot, cell, scale, y / 2, y / 2, x / 2, x / 2,
                              real(0.25), read_low);
        } else {
            gather<false>(sum, p.place, p.slot, cell, scale, y, y, x, x, 1, read_low);
            if (!SB_LEGACY)
                gather<true>(sum, p.place, p.slot, cell, scale, 2 * y, 2 * y + 1, 2 * x, 2 * x + 1,
                             1, read_high);
        }
    }
    store(p.out + first_pixel<HIGH>(p.place, w.k) * channels + (index_t)t * VECTOR, pack(sum));
}

extern "C" __global__ void __launch_bounds__(256, 3) upsample_backward(const Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        reduce<true>(p, w);
    else
        reduce<false>(p, w);
}
