// turn_weight: a convolution's weight (O, I, KH, KW) -> (I, O, KH, KW) with its taps in reverse order,
//   channels_last: the weight of the convolution that is its gradient.
//
// Compile-time constants beside those of dtypes.cuh:
//   SB_LAST  the weight is 1: channels_last, 0: contiguous
#include "dtypes.cuh"

struct Params {
    const scalar* in;
    scalar* out;
    int outputs, inputs, taps;
};

constexpr int TILE = 32, LINES = 8;

// In memory the weight is O rows of I * taps, and the result I * taps rows of O.
extern "C" __global__ void __launch_bounds__(TILE * LINES) turn_weight(const Params p) {
    __shared__ scalar tile[TILE][TILE + 1];
    const int columns = p.inputs * p.taps, first = blockIdx.x * TILE, top = blockIdx.y * TILE;
    const int lane = threadIdx.x % TILE, line = threadIdx.x / TILE;
#pragma unroll
    for (int k = line; k < TILE; k += LINES)
        if (top + k < p.outputs && first + lane < columns)
            tile[k][lane] = __ldg(p.in + (long long)(top + k) * columns + first + lane);
    __syncthreads();
#pragma unroll
    for (int k = line; k < TILE; k += LINES) {
        const int column = first + k;
        if (column >= columns || top + lane >= p.outputs) continue;
        const int i = SB_LAST ? column % p.inputs : column / p.taps;
        const int tap = SB_LAST ? column / p.inputs : column - i * p.taps;
        p.out[((long long)i * p.taps + p.taps - 1 - tap) * p.outputs + top + lane] = tile[lane][k];
    }
}
