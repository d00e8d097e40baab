// Kernels with an image on one side and the pixel buffer on the other: parameters, the plain copy
// of high blocks, and tiles for images whose channels are not adjacent.
//
// Compile-time constant: SB_COPY  bytes per access when a high block is copied as it is
#pragma once
#include "common.cuh"
#include "frame.cuh"

typedef Raw<SB_COPY>::type copy_t;
constexpr int COPY = SB_COPY / (int)sizeof(scalar);

struct Params {
    const scalar* in;
    scalar* out;
    const int* slot;
    const int* cells;
    long long stride_n, stride_c, stride_y, stride_x;  // of the image, in elements
    Place place;
    // Copies per block row and per stretch of adjacent elements; runs per block row (_planes).
    Divider by_row, by_run;
    Divider by_block, by_half, by_taps;  // sides of a high and of a low block; half + 1
    // Of the _tile kernels: pixels and channels of a tile, its row length in shared memory.
    int lanes, tile_channels, tile_stride;
    int strip;                    // block rows per thread block (combine_strips.cu)
    Divider by_tiles, by_across;  // channel tiles; vectors across one of them
    Frame frame;                  // of the half-resolution pixels of a block (combine_backward_rows)
};

INLINE index_t origin(const Params& p, Cell c, int b) {
    return (index_t)c.n * (index_t)p.stride_n + (index_t)(c.y * b) * (index_t)p.stride_y +
           (index_t)(c.x * b) * (index_t)p.stride_x;
}

// Copy t of a high block: its offset from the block's first image pixel.
INLINE index_t copy_offset(const Params& p, int t) {
    const int y = quotient(t, p.by_row), r = t - y * (int)p.by_row.divisor;
    const int x = quotient(r, p.by_run), e = r - x * (int)p.by_run.divisor;
    return (index_t)y * (index_t)p.stride_y + (index_t)x * (index_t)p.stride_x + (index_t)e * COPY;
}

template <bool TO_IMAGE> INLINE void copy_high(const Params& p, const Work& w) {
    const int b = p.place.block, total = b * (int)p.by_row.divisor;
    const int first = w.chunk * (int)blockDim.x * p.place.items + threadIdx.x;
    const index_t image = origin(p, cell_of(p.place, fetch(p.cells + w.k)), b);
    const index_t stored = first_pixel<true>(p.place, w.k) * p.place.channels;
    copy_t held[ITEMS];
    index_t target[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int t = first + i * (int)blockDim.x;
        target[i] = -1;
        if (i >= p.place.items || t >= total) continue;
        const index_t there = image + copy_offset(p, t), here = stored + (index_t)t * COPY;
        target[i] = TO_IMAGE ? there : here;
        held[i] = fetch(reinterpret_cast<const copy_t*>(p.in + (TO_IMAGE ? here : there)));
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (target[i] >= 0) *reinterpret_cast<copy_t*>(p.out + target[i]) = held[i];
}

// Tiles of `lanes` pixels × `tile_channels` channels, transposed in shared memory. On the image
// side a thread keeps one pixel and walks the channels, so that neighbouring threads touch
// neighbouring columns; on the other side it moves vectors of channels.
extern __shared__ __align__(16) unsigned char shared_bytes[];

struct Tile {
    int side;               // of the block
    int first, pixels;      // within the block
    int channel, channels;
    int lane, group, groups;
    index_t stored;         // offset of its first element in the pixel buffer
    scalar* data;
};

INLINE Tile my_tile(const Params& p, const Work& w, int side) {
    const int tile = quotient(w.chunk, p.by_tiles);
    Tile t;
    t.side = side;
    t.first = tile * p.lanes;
    t.pixels = min(p.lanes, side * side - t.first);  // none left in a low block's last chunks
    t.channel = (w.chunk - tile * (int)p.by_tiles.divisor) * p.tile_channels;
    t.channels = min(p.tile_channels, p.place.channels - t.channel);
    t.lane = threadIdx.x & (p.lanes - 1);
    t.group = threadIdx.x / p.lanes;
    t.groups = blockDim.x / p.lanes;
    const index_t start =
        w.high ? first_pixel<true>(p.place, w.k) : first_pixel<false>(p.place, w.k);
    t.stored = (start + t.first) * p.place.channels + t.channel;
    t.data = reinterpret_cast<scalar*>(shared_bytes);
    return t;
}

// Calls each(q, c) for every pixel q and first channel c of a vector that this thread moves.
template <class Each> INLINE void for_vectors(const Params& p, const Tile& t, const Each& each) {
    const int across = p.by_across.divisor;
    for (int e = threadIdx.x; e < t.pixels * across; e += blockDim.x) {
        const int q = quotient(e, p.by_across), c = (e - q * across) * VECTOR;
        if (c < t.channels) each(q, c);
    }
}

INLINE vec tile_vector(const Params& p, const Tile& t, int q, int c) {
    Lanes lanes;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) lanes.s[j] = t.data[q * p.tile_stride + c + j];
    return lanes.v;
}

INLINE void set_tile_vector(const Params& p, const Tile& t, int q, int c, vec v) {
    Lanes lanes;
    lanes.v = v;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) t.data[q * p.tile_stride + c + j] = lanes.s[j];
}

INLINE void store_tile(const Params& p, const Tile& t) {
    scalar* out = p.out + t.stored;
    for_vectors(p, t, [&](int q, int c) {
        store(out + (index_t)q * p.place.channels + c, tile_vector(p, t, q, c));
    });
}
