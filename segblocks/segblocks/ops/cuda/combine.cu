// combine: pixels (P, C) -> image (N, C, Gh*b, Gw*b) with any strides.
//   High blocks are copied; a low block is the bilinear ×2 of the half-resolution picture.
// combine_backward: gradient of the image -> gradient of the pixels, by gathering.
//
//   *_rows  image whose channels are adjacent (channels_last)
//   *_tile  any strides; transposed through shared memory
//
// Compile-time constants: those of dtypes.cuh, image.cuh and bilinear.cuh.
#define SB_FOLLOWS
#include "image.cuh"
#include "bilinear.cuh"
#include "follow.cuh"

extern "C" __global__ void __launch_bounds__(256) combine_rows(const Params p) {
    follow();
    const Work w = my_work(p.place);
    if (w.high) return copy_high<true>(p, w);
    const int b = p.place.block, taps = b / 2 + 1;
    const int id = w.chunk * (int)blockDim.x + threadIdx.x;
    if (id >= taps * taps * p.place.vectors) return;
    const Cell cell = cell_of(p.place, fetch(p.cells + w.k));
    const Position at = position(id, p.place.by_vectors, p.by_taps);
    real tap[4][VECTOR], upper[VECTOR], lower[VECTOR];
    read_taps<false>(tap, p.place, p.slot, p.in, cell, w.k, at.y - 1, at.x - 1, at.v);
    const int y = 2 * at.y - 1, x = 2 * at.x - 1;  // first of the four outputs
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
    scalar* out = p.out + origin(p, cell, b) + at.v * VECTOR + y * sy + x * sx;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        mix_columns(upper, lower, tap, fraction(j, 2));
        const bool inside = (unsigned)(x + j) < (unsigned)b;
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (inside && (unsigned)(y + i) < (unsigned)b)
                store(out + i * sy + j * sx, mix_rows(upper, lower, fraction(i, 2)));
    }
}

extern "C" __global__ void __launch_bounds__(256) combine_tile(const Params p) {
    follow();
    const Work w = my_work(p.place);
    const int b = p.place.block;
    const Tile t = my_tile(p, w, b);
    const Cell cell = cell_of(p.place, fetch(p.cells + w.k));
    for_vectors(p, t, [&](int q, int c) {
        if (w.high) {
            const index_t at = first_pixel<true>(p.place, w.k) + t.first + q;
            set_tile_vector(p, t, q, c, load(p.in + at * p.place.channels + t.channel + c));
            return;
        }
        const int y = quotient(t.first + q, p.by_block), x = t.first + q - y * b;
        real tap[4][VECTOR], upper[VECTOR], lower[VECTOR];
        read_taps<false>(tap, p.place, p.slot, p.in, cell, w.k, (y + 1) / 2 - 1, (x + 1) / 2 - 1,
                         (t.channel + c) / VECTOR);
        mix_columns(upper, lower, tap, x % 2 ? real(0.25) : real(0.75));
        set_tile_vector(p, t, q, c, mix_rows(upper, lower, y % 2 ? real(0.25) : real(0.75)));
    });
    __syncthreads();
    if (t.lane >= t.pixels) return;
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x, sc = (index_t)p.stride_c;
    const int q = t.first + t.lane, y = quotient(q, p.by_block);
    scalar* out = p.out + origin(p, cell, b) + y * sy + (q - y * b) * sx + t.channel * sc;
#pragma unroll 4
    for (int c = t.group; c < t.channels; c += t.groups)
        out[c * sc] = t.data[t.lane * p.tile_stride + c];
}

// Adds the gradient that a pixel at the edge of its block gets from low neighbours: across a row
// edge, a column edge and the corner they share. `at` is the first of the 4×4 image pixels.
INLINE void add_neighbours(real (&sum)[VECTOR], const Params& p, const Cell& cell, const scalar* at,
                           const Reach& y, const Reach& x, const bool (&low)[3]) {
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
    const int i = y.beyond < 0 ? 0 : 3, j = x.beyond < 0 ? 0 : 3;
    if (low[0]) gather_line(sum, at + i * sy, sx, x.w, real(0.25));
    if (low[1]) gather_line(sum, at + j * sx, sy, y.w, real(0.25));
    if (low[2]) add(sum, load(at + i * sy + j * sx), real(0.0625));
}

INLINE bool is_low(const Params& p, const Cell& cell, int dy, int dx) {
    return slot_at(p.place, p.slot, cell.n, cell.y + dy, cell.x + dx) < 0;
}

// A thread has one pixel of the half-resolution picture, its gradient being that of 4×4 image
// pixels, of which only those in low blocks count. In a high block it hands a quarter of that, if
// any, to each of four pixels, beside their own gradient.
template <bool HIGH, bool EDGE> INLINE void gradient(const Params& p, const Work& w, const Spot& at) {
    const int b = p.place.block, h = b / 2, y = at.y;
    const int x = quotient(at.r, p.place.by_vectors), v = at.r - x * p.place.vectors;
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
    const Cell cell = cell_of(p.place, fetch(p.cells + w.k));
    const scalar* in = p.in + origin(p, cell, b) + 2 * y * sy + 2 * x * sx + v * VECTOR;
    const scalar* first = in - sy - sx;
    scalar* out = p.out + first_pixel<HIGH>(p.place, w.k) * p.place.channels + v * VECTOR;
    real sum[VECTOR];
    clear(sum);
    vec own[4];
    if (HIGH) {
#pragma unroll
        for (int i = 0; i < 4; i++) own[i] = load(in + i / 2 * sy + i % 2 * sx);
    }
    if (EDGE) {
        const Reach ry = reach(y, h, cell.y, p.place.gh), rx = reach(x, h, cell.x, p.place.gw);
        const bool low[3] = {ry.beyond && is_low(p, cell, ry.beyond, 0),
                             rx.beyond && is_low(p, cell, 0, rx.beyond),
                             ry.beyond && rx.beyond && is_low(p, cell, ry.beyond, rx.beyond)};
        if (!HIGH) gather_own(sum, first, sy, sx, ry, rx);
        add_neighbours(sum, p, cell, first, ry, rx, low);
    } else if (!HIGH) {
        gather_window(sum, first, sy, sx);
    }
    if (HIGH) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (EDGE) {
                real total[VECTOR];
                unpack(own[i], total);
#pragma unroll
                for (int j = 0; j < VECTOR; j++) total[j] += real(0.25) * sum[j];
                own[i] = pack(total);
            }
            const int pixel = (2 * y + i / 2) * b + 2 * x + i % 2;
            store(out + (index_t)pixel * p.place.channels, own[i]);
        }
    } else {
        store(out + (index_t)(y * h + x) * p.place.channels, pack(sum));
    }
}

template <bool HIGH> INLINE void gradients(const Params& p, const Work& w) {
    const Frame& f = p.frame;
    if (w.chunk < f.chunks) {
        const int t = w.chunk * (int)blockDim.x + threadIdx.x;
        if (t < f.size) gradient<HIGH, true>(p, w, on_frame(f, t));
    } else {
        const int t = (w.chunk - f.chunks) * (int)blockDim.x + threadIdx.x;
        if (t < f.rows * f.vectors) gradient<HIGH, false>(p, w, inside(f, t));
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) combine_backward_rows(const Params p) {
    const Work w = my_work(p.place);
    if (w.high && SB_LEGACY) return copy_high<false>(p, w);
    if (w.high)
        gradients<true>(p, w);
    else
        gradients<false>(p, w);
}

extern "C" __global__ void __launch_bounds__(256, 3) combine_backward_tile(const Params p) {
    const Work w = my_work(p.place);
    const int b = p.place.block, step = w.high ? 1 : 2;
    const Tile t = my_tile(p, w, b / step);
    if (t.lane < t.pixels) {
        const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
        const index_t sc = (index_t)p.stride_c;
        const Cell cell = cell_of(p.place, fetch(p.cells + w.k));
        const int q = t.first + t.lane, y = quotient(q, w.high ? p.by_block : p.by_half);
        const int x = q - y * t.side, half_y = y * step / 2, half_x = x * step / 2;
        const Window window_of = window(p.place, p.slot, cell, !w.high, half_y, half_x);
        const real weight = w.high ? real(0.25) : real(1);
        const scalar* in = p.in + origin(p, cell, b) + t.channel * sc;
        const scalar* corner = in + (2 * half_y - 1) * sy + (2 * half_x - 1) * sx;
        for (int c = t.group; c < t.channels; c += t.groups) {
            real sum = w.high ? to_real(fetch(in + y * sy + x * sx + c * sc)) : real(0);
            if (window_of.mask) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const bool on = window_of.mask >> (3 * region(i / 4) + region(i % 4)) & 1;
                    const real g =
                        on ? to_real(fetch(corner + (i / 4) * sy + (i % 4) * sx + c * sc)) : real(0);
                    sum += weight * window_of.wy[i / 4] * window_of.wx[i % 4] * g;
                }
            }
            t.data[t.lane * p.tile_stride + c] = to_scalar(sum);
        }
    }
    __syncthreads();
    store_tile(p, t);
}
