// What conv_sm90.cu and conv_sm80.cu, the convolutions that go row by row, take. Behind dtypes.cuh.
// An implicit GEMM: rows are the stored pixels of both resolutions, columns the output channels, and the inner
// dimension runs over input channels, 64 at a time, and taps; taps innermost, because nine taps read nearly
// the same pixels, which then come from L1. Everything point-wise around the convolution is done in the same launch.
//
//   x          (extended rows, cin)    input; see tables.cu for extended buffers and tables
//   averages   with SEPARATE, where x holds stored pixels only: the rows that would follow them
//   table      (TAPS, pitch) int32     row of x that a tap reads, per GEMM row
//   weights    (k/64, cout_pad, 64)    packed by `pack_weights`, k = TAPS*cin + cin2
//   bias       (cout_pad) float32
//   x2         (.., cin2), table2 (pitch): a second input through a 1×1 convolution (EXTRA)
//   own        (pitch) int32           buffer row of each GEMM row of the output
//   STEM       x is instead the image as padded blocks of four channels (stem.cu), the kernel 7×7
//              with stride 2; table (pitch) is the first pixel that each GEMM row reads, halved; a
//              step covers two rows of eight pixels, weights beyond 7×7×3 are zero
//   addend     (rows, cout) added before the ReLU (ADD 1), or (extended rows at half the block,
//              cout) enlarged bilinearly first (ADD 2, with up_table (9, up_pitch) and up_zero)
//   pre        (2, cin) float32        x becomes relu(x * pre[0] + pre[1]) (PRE, TAPS == 1 only)
//   post       (2, cout_pad) float32   the same on the result (POST)
//   out        (extended rows, cout)   AVERAGES: with the averages that low neighbours will read
//   LATE       decided by the arguments: batch norm where `mean` is not null, with variance, gain and
//              offset (cout; gain and offset may be null) in float32, or in the type of x with flag 4;
//              then addend, as ADD 1, where it is not null; then ReLU with flag 1; AVERAGES with flag 2
//   work       (shared tiles, split, BM, BN) float32, count (shared tiles) int32 zeros: for tiles that
//              `split` thread blocks share (shares.cuh); there are none where `whole` is all of them
//
// cin is a multiple of 64, or with RAGGED of 8, the weights of channels beyond it being zero; cin2 of 64,
// cout of 8. RELU 2 is one that `limit` bounds.
#pragma once

constexpr int BM = SB_BM, BN = SB_BN, BK = 64, STAGES = SB_STAGES, TAPS = SB_TAPS;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int PITCH = BN + 8;  // floats per staged row; keeps the fragments' stores conflict-free

struct Arguments {
    const scalar* x;
    const int* table;
    const scalar* weights;
    const float* bias;
    const scalar* x2;
    const int* table2;
    const int* own;
    const scalar* addend;
    const int* up_table;
    const float* pre;
    const float* post;
    scalar* out;
    float* work;
    int* count;
    const scalar* averages;
    const void* mean;
    const void* variance;
    const void* gain;
    const void* offset;
    int rows, high_rows, block, pitch, up_high_rows, up_pitch, up_zero;
    int cin, cin2, cout, cout_pad, whole, split, line, half_line, stored, flags;
    float eps, limit;
};

// Steps of the inner dimension, of the first input and of both.
INLINE int main_steps_of(const Arguments& p) {
    return SB_STEM ? 4 : TAPS * ((p.cin + BK - 1) / BK);
}
INLINE int steps_of(const Arguments& p) { return main_steps_of(p) + (SB_EXTRA ? p.cin2 / BK : 0); }

// Where one of the eight threads that copy a row, 16 bytes each, finds its chunk of it in a step.
struct Chunk {
    const scalar* x;      // of row 0
    int width;            // of a row
    bool exists;          // RAGGED: else its channels are beyond the last
    long long high, low;  // STEM: further on, in a high and in a low block

    // Of a row that GEMM row m reads.
    INLINE const scalar* of(const Arguments& p, int row, int m) const {
        const scalar* from = x + (long long)row * width;
        if (SB_STEM) from += m < p.high_rows ? high : low;
        return from;
    }
};

// column: first channel of step k, if that is of the first input.
INLINE Chunk chunk_at(const Arguments& p, int k, int column, int chunk) {
    int main_steps = main_steps_of(p);
    bool second = SB_EXTRA && k >= main_steps;
    if (SB_STEM) {  // row y of the window lies y lines further; chunks 4 to 7 are its next row
        long long line = (long long)(2 * k + chunk / 4);
        return {p.x + chunk % 4 * 8, 8, true, line * p.line, line * p.half_line};
    }
    const scalar* x = (second ? p.x2 + (k - main_steps) * BK : p.x + column) + chunk * 8;
    return {x, second ? p.cin2 : p.cin, !SB_RAGGED || second || column + chunk * 8 < p.cin};
}

INLINE uint4 affine_relu(uint4 v, const float* pre, int cin, int column) {
    unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float a, b;
        unpack_pair(w[i], a, b);
        float2 scale = *(const float2*)(pre + column + 2 * i);
        float2 shift = *(const float2*)(pre + cin + column + 2 * i);
        w[i] = pack_pair(fmaxf(a * scale.x + shift.x, 0.f), fmaxf(b * scale.y + shift.y, 0.f));
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}
