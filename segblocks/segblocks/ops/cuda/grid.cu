// build_slots: grid (cells) bytes -> slot (cells) int32, cells (cells) int32. One thread block.
// select_budget: scores (N, G) -> grid (N, G) bytes with exactly `count` ones per image: the highest
//   scores, the earlier cell first among equals, NaN below everything. One warp per score.
// select_budget_large: the same with one thread block per image; cheaper for thousands of scores.
//
// Compile-time constant: SB_DTYPE of the scores (SB_VECTOR is 1).
#include "common.cuh"

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

struct SlotParams {
    const unsigned char* grid;
    int* slot;
    int* cells;
    int total, each;  // cells in all and per thread
};

extern "C" __global__ void __launch_bounds__(1024) build_slots(const SlotParams p) {
    const int first = min((int)threadIdx.x * p.each, p.total), last = min(first + p.each, p.total);
    int count = 0, n_high;
    for (int i = first; i < last; i++) count += p.grid[i] != 0;
    int high = scan(count, n_high), low = first - high;
    for (int i = first; i < last; i++) {
        if (p.grid[i]) {
            p.slot[i] = high;
            p.cells[high++] = i;
        } else {
            p.slot[i] = -1 - low;
            p.cells[n_high + low++] = i;
        }
    }
}

#if SB_DTYPE == 3
typedef unsigned long long order_t;
#else
typedef unsigned int order_t;
#endif
constexpr int KEY_BITS = 8 * sizeof(order_t);

// Unsigned integers in the order of the scores; -0 equals 0, NaN is the least.
INLINE order_t key_of(scalar score) {
    const real x = to_real(score) + real(0);
#if SB_DTYPE == 3
    const order_t bits = (order_t)__double_as_longlong(x);
#else
    const order_t bits = __float_as_uint(x);
#endif
    const order_t sign = order_t(1) << (KEY_BITS - 1);
    return x != x ? 0 : bits & sign ? ~bits : bits | sign;
}

struct BudgetParams {
    const scalar* scores;
    unsigned char* grid;
    int cells, count;
};

// A score is among the highest if fewer than `count` come before it.
extern "C" __global__ void __launch_bounds__(256) select_budget(const BudgetParams p) {
    const int lane = threadIdx.x & 31, cell = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (cell >= p.cells) return;
    const scalar* scores = p.scores + (index_t)blockIdx.y * p.cells;
    const scalar own = __ldg(scores + cell);
    scalar others[4];
    const auto fetch = [&](int start) {
#pragma unroll
        for (int j = 0; j < 4; j++) others[j] = __ldg(scores + min(start + 32 * j + lane, p.cells - 1));
    };
    fetch(0);  // before the wait for `own`
    const order_t key = key_of(own);
    int before = 0;
    for (int start = 0; start < p.cells; start += 128) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = start + 32 * j + lane;
            const order_t other = key_of(others[j]);
            const bool precedes = other > key || (other == key && i < cell);
            before += __popc(__ballot_sync(0xffffffffu, precedes && i < p.cells));
        }
        if (start + 128 < p.cells) fetch(start + 128);
    }
    if (lane == 0) p.grid[(index_t)blockIdx.y * p.cells + cell] = before < p.count;
}

extern "C" __global__ void __launch_bounds__(1024) select_budget_large(const BudgetParams p) {
    const scalar* scores = p.scores + (index_t)blockIdx.x * p.cells;
    unsigned char* grid = p.grid + (index_t)blockIdx.x * p.cells;
    // The count-th largest key, found bit by bit.
    order_t least = 0;
    for (int bit = KEY_BITS - 1; bit >= 0; bit--) {
        const order_t candidate = least | order_t(1) << bit;
        int mine = 0, reached = 0;
        for (int i = threadIdx.x; i < p.cells; i += blockDim.x)
            mine += key_of(__ldg(scores + i)) >= candidate;
        scan(mine, reached);
        if (reached >= p.count) least = candidate;
    }
    int mine = 0, above = 0;
    for (int i = threadIdx.x; i < p.cells; i += blockDim.x)
        mine += key_of(__ldg(scores + i)) > least;
    scan(mine, above);
    int left = p.count - above;  // for those equal to the least, in order
    for (int start = 0; start < p.cells; start += blockDim.x) {
        const int i = start + threadIdx.x;
        const order_t key = i < p.cells ? key_of(__ldg(scores + i)) : 0;
        const bool equal = i < p.cells && key == least;
        int equals = 0;
        const int before = scan(equal, equals);
        if (i < p.cells) grid[i] = key > least || (equal && before < left);
        left -= equals;
    }
}
