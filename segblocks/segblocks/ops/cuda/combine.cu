// combine: pixels (P, C) -> image (N, C, Gh*b, Gw*b) with any strides.
//   High blocks are copied; a low block is the bilinear ×2 of the half-resolution picture.
// combine_backward: gradient of the image -> gradient of the pixels, by gathering.
//
//   *_rows  image whose channels are adjacent (channels_last)
//   *_tile  any strides; transposed through shared memory
//
// Compile-time constants: those of dtypes.cuh, image.cuh and bilinear.cuh.
#include "image.cuh"
#include "bilinear.cuh"

extern "C" __global__ void __launch_bounds__(256) combine_rows(const Params p) {
    const Work w = my_work(p.place);
    if (w.high) return copy_high<true>(p, w);
    const int b = p.place.block, taps = b / 2 + 1;
    const int id = w.chunk * (int)blockDim.x + threadIdx.x;
    if (id >= taps * taps * p.place.vectors) return;
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
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
    const Work w = my_work(p.place);
    const int b = p.place.block;
    const Tile t = my_tile(p, w, b);
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
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

// The gradient of pixel (y, x) of the half-resolution picture: 4×4 image pixels, of which only
// those in low blocks count. `image` points at the first image pixel of the cell.
INLINE void add_window(real (&sum)[VECTOR], const Params& p, const Cell& cell, const scalar* image,
                       bool own, int y, int x, int v, real weight) {
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
    const scalar* at = image + (2 * y - 1) * sy + (2 * x - 1) * sx + v * VECTOR;
    const Window w = window(p.place, p.slot, cell, own, y, x);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        vec held[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            held[j] = vec();
            if (w.mask >> (3 * region(i) + region(j)) & 1) held[j] = load(at + i * sy + j * sx);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) add(sum, held[j], weight * w.wy[i] * w.wx[j]);
    }
}

// A high pixel gets its own gradient, and a quarter of what its half-resolution pixel gives to low
// neighbours: only those within two pixels of the edge are read by any.
INLINE void gradient_of_high(const Params& p, const Work& w) {
    const int b = p.place.block, total = b * b * p.place.vectors;
    const int first = w.chunk * (int)blockDim.x * p.place.items + threadIdx.x;
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
    const scalar* image = p.in + origin(p, cell, b);
    scalar* out = p.out + first_pixel<true>(p.place, w.k) * p.place.channels;
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
    vec held[ITEMS];
    unsigned inner = 0, edges = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int t = first + i * (int)blockDim.x;
        if (i >= p.place.items || t >= total) continue;
        const Position at = position(t, p.place.by_vectors, p.by_block);
        const bool edge = min(at.y, at.x) < 2 || max(at.y, at.x) >= b - 2;
        edges |= (unsigned)edge << i;
        inner |= (unsigned)!edge << i;
        held[i] = load(image + at.y * sy + at.x * sx + at.v * VECTOR);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (inner >> i & 1) store(out + (index_t)(first + i * (int)blockDim.x) * VECTOR, held[i]);
#pragma unroll 1
    for (int i = 0; i < ITEMS; i++) {
        if (!(edges >> i & 1)) continue;
        const int t = first + i * (int)blockDim.x;
        const Position at = position(t, p.place.by_vectors, p.by_block);
        real sum[VECTOR];
        unpack(load(image + at.y * sy + at.x * sx + at.v * VECTOR), sum);
        add_window(sum, p, cell, image, false, at.y / 2, at.x / 2, at.v, real(0.25));
        store(out + (index_t)t * VECTOR, pack(sum));
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) combine_backward_rows(const Params p) {
    const Work w = my_work(p.place);
    if (w.high && SB_LEGACY) return copy_high<false>(p, w);
    if (w.high) return gradient_of_high(p, w);
    const int h = p.place.block / 2, t = w.chunk * (int)blockDim.x + threadIdx.x;
    if (t >= h * h * p.place.vectors) return;
    const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
    const Position at = position(t, p.place.by_vectors, p.by_half);
    const scalar* image = p.in + origin(p, cell, 2 * h);
    real sum[VECTOR];
    clear(sum);
    if (min(at.y, at.x) > 0 && max(at.y, at.x) < h - 1) {
        const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
        gather_window(sum, image + (2 * at.y - 1) * sy + (2 * at.x - 1) * sx + at.v * VECTOR, sy, sx);
    } else {
        add_window(sum, p, cell, image, true, at.y, at.x, at.v, 1);
    }
    store(p.out + first_pixel<false>(p.place, w.k) * p.place.channels + (index_t)t * VECTOR,
          pack(sum));
}

extern "C" __global__ void __launch_bounds__(256, 3) combine_backward_tile(const Params p) {
    const Work w = my_work(p.place);
    const int b = p.place.block, step = w.high ? 1 : 2;
    const Tile t = my_tile(p, w, b / step);
    if (t.lane < t.pixels) {
        const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
        const index_t sc = (index_t)p.stride_c;
        const Cell cell = cell_of(p.place, __ldg(p.cells + w.k));
        const int q = t.first + t.lane, y = quotient(q, w.high ? p.by_block : p.by_half);
        const int x = q - y * t.side, half_y = y * step / 2, half_x = x * step / 2;
        const Window window_of = window(p.place, p.slot, cell, !w.high, half_y, half_x);
        const real weight = w.high ? real(0.25) : real(1);
        const scalar* in = p.in + origin(p, cell, b) + t.channel * sc;
        const scalar* corner = in + (2 * half_y - 1) * sy + (2 * half_x - 1) * sx;
        for (int c = t.group; c < t.channels; c += t.groups) {
            real sum = w.high ? to_real(__ldg(in + y * sy + x * sx + c * sc)) : real(0);
            if (window_of.mask) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const bool on = window_of.mask >> (3 * region(i / 4) + region(i % 4)) & 1;
                    const real g =
                        on ? to_real(__ldg(corner + (i / 4) * sy + (i % 4) * sx + c * sc)) : real(0);
                    sum += weight * window_of.wy[i / 4] * window_of.wx[i % 4] * g;
                }
            }
            t.data[t.lane * p.tile_stride + c] = to_scalar(sum);
        }
    }
    __syncthreads();
    store_tile(p, t);
}
