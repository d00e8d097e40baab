// Where blocks are stored, and which of them a thread block works on.
//
// Pixel buffer (P, C), C fastest: n_high blocks of block×block pixels row by row, then the low
// blocks at half the side. slot (N, Gh, Gw): rank of a high block, or -1 - rank of a low one.
// cells (N*Gh*Gw): flat cell of each stored block, in storage order.
#pragma once
#include "dtypes.cuh"

// Unsigned division by a run-time constant: exact for dividends below 2^31.
struct Divider {
    unsigned divisor, multiplier, shift;
};

INLINE int quotient(unsigned n, const Divider& d) {
    return (int)((__umulhi(n, d.multiplier) + n) >> d.shift);
}

struct Place {
    int n_high, gh, gw;
    int block;                    // side of a high block in pixels
    int channels, vectors;        // vectors = channels / VECTOR
    int chunks_high, chunks_low;  // thread blocks that share one stored block
    int items;                    // vectors per thread, at most ITEMS
    Divider by_gw, by_gh, by_vectors, by_chunks_high, by_chunks_low;
};

// Independent accesses in flight per thread; small tensors use fewer, and more threads instead.
enum { ITEMS = 4 };

struct Work {
    bool high;
    int k;      // stored block, in storage order
    int chunk;  // which part of it
};

INLINE Work my_work(const Place& p) {
    unsigned id = blockIdx.x;
    const unsigned n = (unsigned)p.n_high * p.chunks_high;
    if (id < n) {
        const int k = quotient(id, p.by_chunks_high);
        return {true, k, (int)(id - (unsigned)k * p.chunks_high)};
    }
    id -= n;
    const int r = quotient(id, p.by_chunks_low);
    return {false, p.n_high + r, (int)(id - (unsigned)r * p.chunks_low)};
}

template <bool HIGH> INLINE int side_of(const Place& p) { return HIGH ? p.block : p.block / 2; }

// First pixel of stored block k, whose resolution is known.
template <bool HIGH> INLINE index_t first_pixel(const Place& p, int k) {
    const index_t area = (index_t)p.block * p.block;
    return HIGH ? k * area : p.n_high * area + (k - p.n_high) * (area / 4);
}

struct Cell {
    int n, y, x;
};

INLINE Cell cell_of(const Place& p, int flat) {
    const int row = quotient(flat, p.by_gw), n = quotient(row, p.by_gh);
    return {n, row - n * p.gh, flat - row * p.gw};
}

// Brings part of `slot` to L2 while the cell of stored block k is still on its way: between them the
// thread blocks ask for all of it.
INLINE void expect_slots(const int* slot, int k) {
#ifdef __CUDA_ARCH__
    if (threadIdx.x == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(slot + k));
#endif
}

INLINE int slot_at(const Place& p, const int* slot, int n, int y, int x) {
    return fetch(slot + ((index_t)n * p.gh + y) * p.gw + x);
}

// Position t of a stored block in vectors: row, column and vector of the channel axis.
struct Position {
    int y, x, v;
};

INLINE Position position(int t, const Divider& by_vectors, const Divider& by_width) {
    const int pixel = quotient(t, by_vectors), y = quotient(pixel, by_width);
    return {y, pixel - y * (int)by_width.divisor, t - pixel * (int)by_vectors.divisor};
}

// Reads a stored vector as it is.
struct Load {
    INLINE vec operator()(const scalar* at) const { return load(at); }
};

// A pixel of the half-resolution picture where a high block lies: the mean of its four.
template <class Read = Load>
INLINE void add_quarters(real (&sum)[VECTOR], const scalar* at, int block, int channels, real weight,
                         const Read& read = Read()) {
    const index_t row = (index_t)block * channels;
    add(sum, read(at), weight);
    add(sum, read(at + channels), weight);
    add(sum, read(at + row), weight);
    add(sum, read(at + row + channels), weight);
}

INLINE void clear(real (&x)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = 0;
}
