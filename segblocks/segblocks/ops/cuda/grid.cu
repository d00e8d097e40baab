// build_slots: grid (cells) bytes -> slot (cells) int32, cells (cells) int32. One thread block.
// select_budget: scores (N, G) -> grid (N, G) bytes with exactly `count` ones per image: the highest
//   scores, the earlier cell first among equals, NaN below everything. One warp per score.
// select_budget_large: the same with one thread block per image; cheaper for thousands of scores.
// choose_slots: select_budget and build_slots in one thread block, for up to MOST_CELLS cells. Cells
//   that `sampled` (bytes, may be absent) marks come before all others, as if they scored infinity.
//
// Compile-time constant: SB_DTYPE of the scores (SB_VECTOR is 1).
#include "common.cuh"
#include "choose.cuh"

struct SlotParams {
    const unsigned char* grid;
    int* slot;
    int* cells;
    int total;
};

extern "C" __global__ void __launch_bounds__(1024) build_slots(const SlotParams p) {
    place_blocks([&](int i) { return (int)(p.grid[i] != 0); }, p.total, p.slot, p.cells);
}

struct ChooseParams {
    const scalar* scores;
    const unsigned char* sampled;
    Choice choice;
};

extern "C" __global__ void __launch_bounds__(1024) choose_slots(const ChooseParams p) {
    choose_blocks(p.choice, [&](int i) {
        const bool sampled = p.sampled != nullptr && p.sampled[i];
        return key_of(sampled ? real(__int_as_float(0x7f800000)) : to_real(__ldg(p.scores + i)));
    });
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
    const order_t key = key_of(to_real(own));
    int before = 0;
    for (int start = 0; start < p.cells; start += 128) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = start + 32 * j + lane;
            const order_t other = key_of(to_real(others[j]));
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
            mine += key_of(to_real(__ldg(scores + i))) >= candidate;
        scan(mine, reached);
        if (reached >= p.count) least = candidate;
    }
    int mine = 0, above = 0;
    for (int i = threadIdx.x; i < p.cells; i += blockDim.x)
        mine += key_of(to_real(__ldg(scores + i))) > least;
    scan(mine, above);
    int left = p.count - above;  // for those equal to the least, in order
    for (int start = 0; start < p.cells; start += blockDim.x) {
        const int i = start + threadIdx.x;
        const order_t key = i < p.cells ? key_of(to_real(__ldg(scores + i))) : 0;
        const bool equal = i < p.cells && key == least;
        int equals = 0;
        const int before = scan(equal, equals);
        if (i < p.cells) grid[i] = key > least || (equal && before < left);
        left -= equals;
    }
}
