// combine (combine.cu) for few channels, where no vector of channels fits an access: a thread block
// takes a strip of rows of one stored block, by way of shared memory.
//
//   combine_planes  image whose columns are adjacent (contiguous)
//   combine_narrow  image whose channels, columns and pixels are adjacent (channels_last)
//
// Compile-time constants: those of dtypes.cuh (SB_VECTOR is 1), image.cuh and bilinear.cuh.
#define SB_FOLLOWS
#include "image.cuh"
#include "bilinear.cuh"
#include "follow.cuh"

typedef Raw<2 * (int)sizeof(scalar)>::type pair_t;  // two columns of a plane

INLINE pair_t pair_of(scalar a, scalar b) {
    union {
        scalar s[2];
        pair_t v;
    } both;
    both.s[0] = a;
    both.s[1] = b;
    return both.v;
}

// One value of the half-resolution picture around a block, at most one pixel outside.
INLINE real half_resolution(const Params& p, const Cell& cell, int y, int x, int c) {
    const int h = p.place.block / 2;
    const Near ny = near(y, h, cell.y, p.place.gh), nx = near(x, h, cell.x, p.place.gw);
    const int s = slot_at(p.place, p.slot, cell.n, ny.cell, nx.cell);
    const scalar* at = p.in + picture_offset<false>(p.place, s, ny.at, nx.at) + c;
    real value[1];
    if (s < 0) {
        unpack(load(at), value);
    } else {
        clear(value);
        add_quarters(value, at, p.place.block, p.place.channels, real(0.25));
    }
    return value[0];
}

// Source rows first - 1 .. first + rows of low block k, with a pixel on either side.
INLINE void load_strip(const Params& p, const Work& w, const Cell& cell, int first, int rows,
                       real* data) {
    const int h = p.place.block / 2, c = p.place.channels, across = h * c, wide = across + 2 * c;
    const scalar* own = p.in + first_pixel<false>(p.place, w.k) * c;
    const int start = max(first - 1, 0), lines = min(first + rows + 1, h) - start;
#pragma unroll 4
    for (int e = threadIdx.x; e < lines * across; e += blockDim.x) {
        const int line = quotient(quotient(e, p.place.by_vectors), p.by_half);
        data[(start - first + 1) * wide + (2 * line + 1) * c + e] =
            to_real(fetch(own + start * across + e));
    }
    for (int e = threadIdx.x; e < 2 * (rows + 2) * c; e += blockDim.x) {
        const int line = quotient(e / 2, p.place.by_vectors), channel = e / 2 - line * c;
        data[line * wide + (e % 2 ? wide - c : 0) + channel] =
            half_resolution(p, cell, first - 1 + line, e % 2 ? h : -1, channel);
    }
    if (first > 0 && first + rows < h) return;
    for (int e = threadIdx.x; e < across; e += blockDim.x) {
        const int x = quotient(e, p.place.by_vectors);
        if (first == 0) data[c + e] = half_resolution(p, cell, -1, x, e - x * c);
        if (first + rows == h)
            data[(rows + 1) * wide + c + e] = half_resolution(p, cell, h, x, e - x * c);
    }
}

// Calls put(y, x, c, a, b) for outputs (y, x) and (y, x + 1) of channel c; y counts within the strip.
template <class Put>
INLINE void enlarge_strip(const Params& p, int rows, const real* data, const Put& put) {
    const int h = p.place.block / 2, c = p.place.channels, wide = (h + 2) * c;
    for (int e = threadIdx.x; e < rows * c * h; e += blockDim.x) {
        const int line = quotient(e, p.by_half), x = e - line * h;
        const int y = quotient(line, p.place.by_vectors), channel = line - y * c;
        const real* at = data + y * wide + x * c + channel;
        real a[3], b[3];  // left and right output of each source row
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const real left = at[i * wide], own = at[i * wide + c], right = at[i * wide + 2 * c];
            a[i] = real(0.25) * left + real(0.75) * own;
            b[i] = real(0.75) * own + real(0.25) * right;
        }
        put(2 * y, 2 * x, channel, to_scalar(real(0.25) * a[0] + real(0.75) * a[1]),
            to_scalar(real(0.25) * b[0] + real(0.75) * b[1]));
        put(2 * y + 1, 2 * x, channel, to_scalar(real(0.75) * a[1] + real(0.25) * a[2]),
            to_scalar(real(0.75) * b[1] + real(0.25) * b[2]));
    }
}

extern "C" __global__ void __launch_bounds__(256) combine_planes(const Params p) {
    follow();
    const Work w = my_work(p.place);
    const int b = p.place.block, c = p.place.channels, first = w.chunk * p.strip;
    const int rows = min(p.strip, b - first);
    const Cell cell = cell_of(p.place, fetch(p.cells + w.k));
    const index_t sy = (index_t)p.stride_y, sc = (index_t)p.stride_c;
    scalar* out = p.out + origin(p, cell, b) + first * sy;
    if (!w.high) {
        real* data = reinterpret_cast<real*>(shared_bytes);
        load_strip(p, w, cell, first / 2, rows / 2, data);
        __syncthreads();
        enlarge_strip(p, rows / 2, data, [&](int y, int x, int channel, scalar left, scalar right) {
            *reinterpret_cast<pair_t*>(out + y * sy + channel * sc + x) = pair_of(left, right);
        });
        return;
    }
    const scalar* in = p.in + (first_pixel<true>(p.place, w.k) + first * b) * c;
    copy_t* copies = reinterpret_cast<copy_t*>(shared_bytes);
#pragma unroll 4
    for (int t = threadIdx.x; t < rows * (int)p.by_row.divisor; t += blockDim.x)
        copies[t] = fetch(reinterpret_cast<const copy_t*>(in) + t);
    __syncthreads();
    const scalar* data = reinterpret_cast<const scalar*>(shared_bytes);
#pragma unroll 4
    for (int e = threadIdx.x; e < rows * c * (b / 2); e += blockDim.x) {
        const int line = quotient(e, p.by_half), x = 2 * (e - line * (b / 2));
        const int y = quotient(line, p.place.by_vectors), channel = line - y * c;
        const scalar* at = data + (y * b + x) * c + channel;
        *reinterpret_cast<pair_t*>(out + y * sy + channel * sc + x) = pair_of(at[0], at[c]);
    }
}

extern "C" __global__ void __launch_bounds__(256) combine_narrow(const Params p) {
    follow();
    const Work w = my_work(p.place);
    if (w.high) return copy_high<true>(p, w);
    const int b = p.place.block, c = p.place.channels, first = w.chunk * p.strip;
    const int rows = min(p.strip, b - first), row = p.by_row.divisor;
    const Cell cell = cell_of(p.place, fetch(p.cells + w.k));
    const index_t sy = (index_t)p.stride_y;
    // The image's rows first, for their alignment.
    scalar* strip = reinterpret_cast<scalar*>(shared_bytes);
    real* data = reinterpret_cast<real*>(shared_bytes + p.strip * row * SB_COPY);
    load_strip(p, w, cell, first / 2, rows / 2, data);
    __syncthreads();
    enlarge_strip(p, rows / 2, data, [&](int y, int x, int channel, scalar left, scalar right) {
        strip[(y * b + x) * c + channel] = left;
        strip[(y * b + x + 1) * c + channel] = right;
    });
    __syncthreads();
    scalar* out = p.out + origin(p, cell, b) + first * sy;
    const copy_t* copies = reinterpret_cast<const copy_t*>(shared_bytes);
#pragma unroll 4
    for (int t = threadIdx.x; t < rows * row; t += blockDim.x) {
        const int y = quotient(t, p.by_row);
        *reinterpret_cast<copy_t*>(out + y * sy + (index_t)(t - y * row) * COPY) = copies[t];
    }
}
