// What patch_sm90.cu does with its sums: adds up the parts of the inner dimension, then bias, addend,
// ReLU, a second affine and ReLU, and the averages of the high blocks. All in registers: a thread
// holds pairs of neighbouring pixels of two channels, and 8×8 matrices are turned round on the way
// out, and on the way in for the addend.
//
// Thread (r, c) = (lane / 4, lane % 4) of a warp holds, for j < 16, acc[4j .. 4j+3]: tile pixels
// 8j + 2c and the next of channel 4 (r / 2) + r % 2 of the warp's 16, then the same pixels two
// channels on. `pack_patch_weights` orders the weights so, for then the transposed pair of matrices
// is four consecutive channels 4c .. 4c+3 of tile pixel 8j + r.
#pragma once

INLINE unsigned transpose(unsigned matrix) {
    unsigned turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(matrix));
    return turned;
}

// Leaves the sum over all parts in `acc` of the part that arrives last, and says whether this is it.
INLINE bool add_parts(const Arguments& p, float (&acc)[64], int index, const Share& share, int group,
                      int* arrived) {
    int thread = threadIdx.x % 128, unit = index * (p.cout / 64) + share.slice;
    float4* work = (float4*)p.work + (long long)unit * p.parts * 16 * 128 + thread;
#pragma unroll
    for (int i = 0; i < 16; i++)
        __stcg(work + (share.part * 16 + i) * 128,
               make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
    __threadfence();
    sync_threads(1 + group, 128);
    if (thread == 0) {
        *arrived = atomicAdd(p.count + unit, 1);
        if (*arrived == p.parts - 1) p.count[unit] = 0;
    }
    sync_threads(1 + group, 128);
    if (*arrived < p.parts - 1) return false;
    __threadfence();
    // In the order of the parts, so that the sum never depends on who was last.
    for (int part = 0; part < p.parts; part++) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float4 v = __ldcg(work + (part * 16 + i) * 128);
            float* sum = acc + 4 * i;
            if (part == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
            sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        }
    }
    return true;
}

// Where a thread's results go: for each j the row of tile pixel 8j + r, and for each four j the row of
// the average r of their eight.
struct Rows {
    int pixels[16], averages[4];
};

INLINE Rows rows_of(const Arguments& p, const Tile& tile, int index) {
    Rows rows;
    int r = threadIdx.x % 32 / 4;
    const int* tall = p.patches + (long long)index * TILE_PITCH;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        int m = tile.first + 8 * j + r;
        if (tile.kind != ROWS)
            rows.pixels[j] = __ldg(tall + OUTPUT_AT + 8 * j + r);
        else
            rows.pixels[j] = m < p.pitch ? __ldg(p.own + m) : p.at.zero;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int m = tile.first + 32 * j + 4 * r;
        if (tile.kind != ROWS)
            rows.averages[j] = __ldg(tall + AVERAGES_AT + 8 * j + r);
        else
            rows.averages[j] = m < p.at.high_rows ? p.at.rows + m / 4 : -1;
    }
    return rows;
}

// The two averages that this thread contributes to a matrix of eight: columns 2c and 2c + 1.
INLINE unsigned pair_of_averages(const float (&sums)[4], int kind, int c) {
    float first, second;
    if (kind == ROWS) {  // four consecutive pixels are a 2×2 quad, and each of the four j holds two
        float low[4], high[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float quad = sums[i] + __shfl_xor_sync(0xffffffffu, sums[i], 1);
            float other = __shfl_xor_sync(0xffffffffu, quad, 2);
            low[i] = c < 2 ? quad : other;
            high[i] = c < 2 ? other : quad;
        }
        first = c == 0 ? low[0] : c == 1 ? low[1] : c == 2 ? low[2] : low[3];
        second = c == 0 ? high[0] : c == 1 ? high[1] : c == 2 ? high[2] : high[3];
    } else {
        first = sums[0] + (kind == TALL ? sums[1] : sums[2]);
        second = (kind == TALL ? sums[2] : sums[1]) + sums[3];
    }
    return pack_pair(0.25f * first, 0.25f * second);
}

INLINE void finish(const Arguments& p, float (&acc)[64], const Tile& tile, const Rows& rows,
                   int slice) {
    int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    int base = slice * 64 + threadIdx.x % 128 / 32 * 16, column = base + 4 * c;
    int channel[2] = {base + 4 * (r / 2) + r % 2, base + 4 * (r / 2) + r % 2 + 2};
    float bias[2], scale[2], shift[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        bias[i] = p.bias[channel[i]];
        scale[i] = SB_POST ? p.post[channel[i]] : 0;
        shift[i] = SB_POST ? p.post[p.cout_pad + channel[i]] : 0;
    }
    bool high = tile.kind == ROWS ? tile.first < p.at.high_rows : tile.high;
#pragma unroll
    for (int first = 0; first < 16; first += 4) {
        uint2 addend[4];
#pragma unroll
        for (int i = 0; i < 4 && SB_ADD; i++) {
            int row = rows.pixels[first + i];
            addend[i] = make_uint2(0, 0);
            if (row < p.at.rows)
                addend[i] = __ldg((const uint2*)(p.addend + (long long)row * p.cout + column));
        }
        unsigned more[4][2], packed[4][2];
#pragma unroll
        for (int i = 0; i < 4 && SB_ADD; i++)
            more[i][0] = transpose(addend[i].x), more[i][1] = transpose(addend[i].y);
        float sums[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float a = acc[4 * (first + i) + 2 * k] + bias[k];
                float b = acc[4 * (first + i) + 2 * k + 1] + bias[k];
                if (SB_ADD) {
                    float more_a, more_b;
                    unpack_pair(more[i][k], more_a, more_b);
                    a += more_a, b += more_b;
                }
                if (SB_RELU) a = fmaxf(a, 0.f), b = fmaxf(b, 0.f);
                if (SB_POST) {
                    a = fmaxf(a * scale[k] + shift[k], 0.f);
                    b = fmaxf(b * scale[k] + shift[k], 0.f);
                }
                sums[k][i] = a + b;
                packed[i][k] = pack_pair(a, b);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            packed[i][0] = transpose(packed[i][0]), packed[i][1] = transpose(packed[i][1]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = rows.pixels[first + i];
            if (row < p.at.rows)
                *(uint2*)(p.out + (long long)row * p.cout + column) =
                    make_uint2(packed[i][0], packed[i][1]);
        }
        if (high) {
            int row = rows.averages[first / 4];
            unsigned means[2];
#pragma unroll
            for (int k = 0; k < 2; k++)
                means[k] = transpose(pair_of_averages(sums[k], tile.kind, c));
            if (row >= 0)
                *(uint2*)(p.out + (long long)row * p.cout + column) = make_uint2(means[0], means[1]);
        }
    }
}
