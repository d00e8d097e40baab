// split: image (N, C, Gh*b, Gw*b) with any strides -> pixels (P, C).
//   High blocks are copied; a low pixel is the mean of its 2×2 image pixels.
// split_backward: pixels (P, C) -> image; every image pixel is written once.
//
//   *_rows    image whose channels are adjacent (channels_last)
//   *_planes  up to four channels in planes with adjacent columns (contiguous images)
//   *_tile    any strides; transposed through shared memory
//
// Compile-time constants beside those of dtypes.cuh:
//   SB_COPY    as in image.cuh
//   SB_PLANES  channels of the _planes kernel
#include "image.cuh"

// Low pixels per thread, so that narrow accesses keep as many bytes in flight as wide ones.
constexpr int NARROW = sizeof(vec) == 16 ? 1 : sizeof(vec) == 8 ? 2 : 4;

extern "C" __global__ void __launch_bounds__(256) split_rows(const Params p) {
    const Work w = my_work(p.place);
    if (w.high) return copy_high<false>(p, w);
    const int h = p.place.block / 2, total = h * h * p.place.vectors;
    const index_t image = origin(p, cell_of(p.place, __ldg(p.cells + w.k)), 2 * h);
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
    const int first = w.chunk * NARROW * (int)blockDim.x + threadIdx.x;
    real sum[NARROW][VECTOR];
#pragma unroll
    for (int i = 0; i < NARROW; i++) {
        const int t = first + i * (int)blockDim.x;
        if (t >= total) continue;
        const Position at = position(t, p.place.by_vectors, p.by_half);
        const scalar* in = p.in + image + 2 * at.y * sy + 2 * at.x * sx + at.v * VECTOR;
        const vec a = load(in), b = load(in + sx), c = load(in + sy), d = load(in + sy + sx);
        unpack(a, sum[i]);
        add(sum[i], b, 1);
        add(sum[i], c, 1);
        add(sum[i], d, 1);
    }
    scalar* out = p.out + first_pixel<false>(p.place, w.k) * p.place.channels;
#pragma unroll
    for (int i = 0; i < NARROW; i++) {
        const int t = first + i * (int)blockDim.x;
        if (t >= total) continue;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) sum[i][j] *= real(0.25);
        store(out + (index_t)t * VECTOR, pack(sum[i]));
    }
}

extern "C" __global__ void __launch_bounds__(256) split_backward_rows(const Params p) {
    const Work w = my_work(p.place);
    if (w.high) return copy_high<true>(p, w);
    const int h = p.place.block / 2, total = h * h * p.place.vectors;
    const index_t image = origin(p, cell_of(p.place, __ldg(p.cells + w.k)), 2 * h);
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
    const scalar* in = p.in + first_pixel<false>(p.place, w.k) * p.place.channels;
#pragma unroll
    for (int i = 0; i < NARROW; i++) {
        const int t = (w.chunk * NARROW + i) * (int)blockDim.x + threadIdx.x;
        if (t >= total) return;
        const vec g = scaled(load(in + (index_t)t * VECTOR), real(0.25));
        const Position at = position(t, p.place.by_vectors, p.by_half);
        scalar* out = p.out + image + 2 * at.y * sy + 2 * at.x * sx + at.v * VECTOR;
        store(out, g);
        store(out + sx, g);
        store(out + sy, g);
        store(out + sy + sx, g);
    }
}

#if SB_PLANES
// A thread reads a run of VECTOR columns of every plane; a warp interleaves its runs in shared
// memory and writes one stretch of the pixel buffer.
template <bool HIGH> INLINE void planes(const Params& p, const Work& w, vec* shared) {
    constexpr int RUN = HIGH ? VECTOR : VECTOR / 2;  // stored pixels per thread
    typedef typename Raw<RUN * (int)sizeof(scalar)>::type run_t;
    const int b = p.place.block, runs = b / VECTOR;
    const int total = (HIGH ? b : b / 2) * runs;
    const int first = w.chunk * (int)blockDim.x + (threadIdx.x & ~31u);  // of this warp
    const int t = first + (threadIdx.x & 31);
    run_t* mine = reinterpret_cast<run_t*>(shared) + (threadIdx.x & ~31u) * SB_PLANES;
    if (t < total) {
        const int y = quotient(t, p.by_run), x = (t - y * runs) * VECTOR;
        const index_t sy = (index_t)p.stride_y, sc = (index_t)p.stride_c;
        const scalar* in = p.in + origin(p, cell_of(p.place, __ldg(p.cells + w.k)), b) +
                           (HIGH ? y : 2 * y) * sy + x;
        vec row[SB_PLANES], next[SB_PLANES];
#pragma unroll
        for (int c = 0; c < SB_PLANES; c++) {
            row[c] = load(in + c * sc);
            if (!HIGH) next[c] = load(in + c * sc + sy);
        }
        union {
            scalar s[RUN * SB_PLANES];
            run_t v[SB_PLANES];
        } out;
#pragma unroll
        for (int c = 0; c < SB_PLANES; c++) {
            Lanes lanes;
            lanes.v = row[c];
            real a[VECTOR], d[VECTOR];
            if (!HIGH) {
                unpack(row[c], a);
                unpack(next[c], d);
            }
#pragma unroll
            for (int j = 0; j < RUN; j++)
                out.s[j * SB_PLANES + c] =
                    HIGH ? lanes.s[j]
                         : to_scalar((a[2 * j] + a[2 * j + 1] + d[2 * j] + d[2 * j + 1]) *
                                     real(0.25));
        }
#pragma unroll
        for (int c = 0; c < SB_PLANES; c++) mine[(threadIdx.x & 31) * SB_PLANES + c] = out.v[c];
    }
    __syncwarp();
    run_t* target = reinterpret_cast<run_t*>(p.out + first_pixel<HIGH>(p.place, w.k) * SB_PLANES);
#pragma unroll
    for (int j = 0; j < SB_PLANES; j++) {
        const int e = j * 32 + (threadIdx.x & 31);
        if (first * SB_PLANES + e < total * SB_PLANES) target[first * SB_PLANES + e] = mine[e];
    }
}

extern "C" __global__ void __launch_bounds__(256) split_planes(const Params p) {
    __shared__ vec shared[256 * SB_PLANES];
    const Work w = my_work(p.place);
    if (w.high)
        planes<true>(p, w, shared);
    else
        planes<false>(p, w, shared);
}
#endif

extern "C" __global__ void __launch_bounds__(256) split_tile(const Params p) {
    const Work w = my_work(p.place);
    const int b = p.place.block, step = w.high ? 1 : 2;
    const Tile t = my_tile(p, w, b / step);
    if (t.lane < t.pixels) {
        const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x;
        const index_t sc = (index_t)p.stride_c;
        const int q = t.first + t.lane, y = quotient(q, w.high ? p.by_block : p.by_half);
        const scalar* in = p.in + origin(p, cell_of(p.place, __ldg(p.cells + w.k)), b) +
                           step * y * sy + step * (q - y * t.side) * sx + t.channel * sc;
#pragma unroll 4
        for (int c = t.group; c < t.channels; c += t.groups) {
            const scalar* at = in + c * sc;
            scalar value = __ldg(at);
            if (!w.high)
                value = to_scalar((to_real(value) + to_real(__ldg(at + sx)) +
                                   to_real(__ldg(at + sy)) + to_real(__ldg(at + sy + sx))) *
                                  real(0.25));
            t.data[t.lane * p.tile_stride + c] = value;
        }
    }
    __syncthreads();
    store_tile(p, t);
}

extern "C" __global__ void __launch_bounds__(256) split_backward_tile(const Params p) {
    const Work w = my_work(p.place);
    const int b = p.place.block, step = w.high ? 1 : 2;
    const Tile t = my_tile(p, w, b / step);
    for_vectors(p, t, [&](int q, int c) {
        const vec v = load(p.in + t.stored + (index_t)q * p.place.channels + c);
        set_tile_vector(p, t, q, c, w.high ? v : scaled(v, real(0.25)));
    });
    __syncthreads();
    if (t.lane >= t.pixels) return;
    const index_t sy = (index_t)p.stride_y, sx = (index_t)p.stride_x, sc = (index_t)p.stride_c;
    const int q = t.first + t.lane, y = quotient(q, w.high ? p.by_block : p.by_half);
    scalar* out = p.out + origin(p, cell_of(p.place, __ldg(p.cells + w.k)), b) + step * y * sy +
                  step * (q - y * t.side) * sx + t.channel * sc;
#pragma unroll 4
    for (int c = t.group; c < t.channels; c += t.groups) {
        scalar* at = out + c * sc;
        const scalar value = t.data[t.lane * p.tile_stride + c];
        *at = value;
        if (w.high) continue;
        at[sx] = value;
        at[sy] = value;
        at[sy + sx] = value;
    }
}
