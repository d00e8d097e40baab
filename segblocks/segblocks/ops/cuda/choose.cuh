// Choosing blocks by score and giving every block its place, by one thread block.
#pragma once
#include "dtypes.cuh"

// Sum of `value` over the threads before this one; `total` over all of them.
INLINE int scan(int value, int& total) {
    __shared__ int sums[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int through = value;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, through, step);
        if (lane >= step) through += other;
    }
    __syncthreads();  // the last call's readers are done
    if (lane == 31) sums[warp] = through;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) {
        if (i < warp) before += sums[i];
        total += sums[i];
    }
    return before + through - value;
}

#if SB_DTYPE == 3
typedef unsigned long long order_t;
#else
typedef unsigned int order_t;
#endif
constexpr int KEY_BITS = 8 * sizeof(order_t);

// Unsigned integers in the order of the scores; -0 equals 0, NaN is the least.
INLINE order_t key_of(real score) {
    const real x = score + real(0);
#if SB_DTYPE == 3
    const order_t bits = (order_t)__double_as_longlong(x);
#else
    const order_t bits = __float_as_uint(x);
#endif
    const order_t sign = order_t(1) << (KEY_BITS - 1);
    return x != x ? 0 : bits & sign ? ~bits : bits | sign;
}

// slot and cells of a grid whose cells `is_high` knows; see build_slots.
template <class IsHigh>
INLINE void place_blocks(const IsHigh& is_high, int cells_in_all, int* slot, int* cells) {
    const int each = (cells_in_all + (int)blockDim.x - 1) / (int)blockDim.x;
    const int first = min((int)threadIdx.x * each, cells_in_all);
    const int last = min(first + each, cells_in_all);
    int count = 0, n_high;
    for (int i = first; i < last; i++) count += is_high(i);
    int high = scan(count, n_high), low = first - high;
    for (int i = first; i < last; i++) {
        if (is_high(i)) {
            slot[i] = high;
            cells[high++] = i;
        } else {
            slot[i] = -1 - low;
            cells[n_high + low++] = i;
        }
    }
}

enum { MOST_CELLS = 4096 };  // that choose_blocks holds in shared memory

struct Choice {
    unsigned char* grid;
    int* slot;
    int* cells;
    int cells_in_all, per_image, count;
};

// Per image the `count` cells with the highest keys, the earlier cell first among equals; then the
// place of every block. key(i) is asked once per cell.
template <class Key> INLINE void choose_blocks(const Choice& c, const Key& key) {
    __shared__ order_t keys[MOST_CELLS];
    __shared__ unsigned char high[MOST_CELLS];
    const int threads = blockDim.x, total = c.cells_in_all;
    for (int i = threadIdx.x; i < total; i += threads) keys[i] = key(i);
    __syncthreads();
    int lanes = 1;  // that share the comparisons of one cell
    while (lanes < 32 && total * lanes * 2 <= threads) lanes *= 2;
    const int part = threadIdx.x % lanes;
    for (int start = 0; start < total; start += threads / lanes) {
        const int cell = start + (int)threadIdx.x / lanes;
        int before = 0;
        if (cell < total) {
            const int image = cell / c.per_image * c.per_image;
            const order_t own = keys[cell];
            for (int i = image + part; i < image + c.per_image; i += lanes)
                before += keys[i] > own || (keys[i] == own && i < cell);
        }
        for (int step = 1; step < lanes; step *= 2)
            before += __shfl_xor_sync(0xffffffffu, before, step);
        if (cell < total && part == 0) {
            high[cell] = before < c.count;
            c.grid[cell] = before < c.count;
        }
    }
    __syncthreads();
    place_blocks([&](int i) { return (int)high[i]; }, total, c.slot, c.cells);
}
