// What each thread block of conv_sm90.cu or conv_sm80.cu does, and how the parts of a tile come together;
// row_tiles.py decides. Behind conv_arguments.cuh; HALVES: two warpgroups have staged sums of the same rows.
//
// The first `whole` tiles have a thread block each, which fill the GPU for a number of rounds. Those of
// the round that is left over would fill little of it, for as long as any other: `split` thread blocks
// share each of them, along the inner dimension. Each leaves its sums in `work`, and the last to arrive
// adds all of them in their own order, so that the result never varies.
#pragma once

// A tile and its steps from `first` to before `last`: all of them, with `shared` -1, or part `part` of
// shared tile `shared`.
struct Share {
    int tile_m, tile_n, first, last, shared, part;
};

INLINE Share share_of(const Arguments& p, int steps) {
    int tile = blockIdx.x, columns = (p.cout + BN - 1) / BN;
    Share share = {0, 0, 0, steps, -1, 0};
    if (tile >= p.whole) {
        int rest = tile - p.whole;
        share.shared = rest / p.split, share.part = rest % p.split;
        share.first = share.part * steps / p.split;
        share.last = (share.part + 1) * steps / p.split;
        tile = p.whole + share.shared;
    }
    share.tile_m = tile / columns, share.tile_n = tile % columns;
    return share;
}

// Says whether this part of a shared tile is the last to arrive; then the 64 rows from `row` on of
// `staged` hold the sums of all parts. All 256 threads come here, THREADS of them with the same rows.
template <int THREADS>
INLINE bool add_parts(const Arguments& p, const Share& share, float* staged, int row, int thread,
                      int* arrived) {
    constexpr int ITEMS = 64 * BN / 4, PART = BM * BN / 4, EACH = 4;  // of four floats
    static_assert(ITEMS % (EACH * THREADS) == 0);
    auto at = [&](int item) {
        return (float4*)(staged + item / (BN / 4) * PITCH + item % (BN / 4) * 4);
    };
    float4* parts = (float4*)p.work + (long long)share.shared * p.split * PART + row * BN / 4;
    for (int item = thread; item < ITEMS; item += THREADS) {
        float4 v = *at(item);
        if (HALVES) {  // the other warpgroup's steps
            float4 w = at(item)[16 * PITCH];
            v.x += w.x, v.y += w.y, v.z += w.z, v.w += w.w;
        }
        parts[share.part * PART + item] = v;
    }
    __threadfence();
    sync_threads(1, 256);
    if (threadIdx.x == 0) {
        *arrived = atomicAdd(p.count + share.shared, 1);
        if (*arrived == p.split - 1) p.count[share.shared] = 0;
    }
    sync_threads(1, 256);
    if (*arrived < p.split - 1) return false;
    __threadfence();
#pragma unroll 1
    for (int item = thread; item < ITEMS; item += EACH * THREADS) {
        float4 sums[EACH] = {};
#pragma unroll 2
        for (int part = 0; part < p.split; part++) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                float4 v = __ldcg(parts + part * PART + item + i * THREADS);
                sums[i].x += v.x, sums[i].y += v.y, sums[i].z += v.z, sums[i].w += v.w;
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) *at(item + i * THREADS) = sums[i];
    }
    return true;
}
