// Depthwise convolution K×K over both resolutions, of stride 1 or 2 and padding K/2, with bias and ReLU.
//
//   in       (P, C) stored pixels of blocks with sides of `place.block`; more may follow
//   weights  (K*K, C); bias (C) float32
//   out      (P', C) stored pixels of blocks with sides of `place.block` / STRIDE
//   slot, cells  as everywhere (common.cuh)
//   limit    the ReLU's upper one (SB_RELU 2)
//
// Compile-time constants: those of dtypes.cuh, SB_KERNEL, SB_STRIDE, and SB_RELU: 0 none, 1, 2 limited
//
// A thread makes WIDTH neighbouring outputs of a line, VECTOR channels each, in float32. It reads pixels
// of the eight neighbours where they lie, so there is no padded copy; a window reaches no further.
#define SB_FOLLOWS
#include "blockpad.cuh"
#include "follow.cuh"

constexpr int K = SB_KERNEL, STRIDE = SB_STRIDE, PAD = K / 2, WIDTH = 4;
constexpr int SPAN = (WIDTH - 1) * STRIDE + K;  // inputs of a line

struct Params {
    const scalar* in;
    const scalar* weights;
    const float* bias;
    scalar* out;
    const int* slot;
    const int* cells;
    double limit;
    Place place;  // of the input
    Divider by_strips_high, by_strips_low;  // strips of WIDTH outputs in a line
};

// What never changes, by the read-only path.
INLINE void read_weights(const scalar* at, real (&x)[VECTOR]) {
    unpack(__ldg(reinterpret_cast<const vec*>(at)), x);
}

// Adds input j of a line to the outputs that read it.
INLINE void add_input(real (&sums)[WIDTH][VECTOR], const real (&weights)[K][VECTOR], vec v, int j) {
    real x[VECTOR];
    unpack(v, x);
#pragma unroll
    for (int w = 0; w < WIDTH; w++) {
        const int tap = j - w * STRIDE;
        if (tap < 0 || tap >= K) continue;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sums[w][i] += x[i] * weights[tap][i];
    }
}

// A line of inputs that begins at (y, x) of the block and reaches over its edges.
template <bool HIGH>
INLINE void add_line(const Params& p, const Cell& cell, int y, int x, int v,
                     real (&sums)[WIDTH][VECTOR], const real (&weights)[K][VECTOR]) {
    const int side = side_of<HIGH>(p.place), dy = y < 0 ? -1 : y >= side;
    int slots[3];
    bool there[3];
#pragma unroll
    for (int d = 0; d < 3; d++) {
        const int cx = cell.x + d - 1;
        there[d] = (unsigned)cx < (unsigned)p.place.gw;
        slots[d] = there[d] ? slot_at(p.place, p.slot, cell.n, cell.y + dy, cx) : 0;
    }
    vec held[SPAN];  // all are on their way before the first is waited for
#pragma unroll
    for (int j = 0; j < SPAN; j++) {
        const int at = x + j;
        const bool left = at < 0, right = at >= side;
        const bool exists = left ? there[0] : right ? there[2] : there[1];
        const int slot = left ? slots[0] : right ? slots[2] : slots[1];
        const int own = left ? at + side : right ? at - side : at;
        held[j] = filled(0);
        if (exists && at < side + PAD)  // further on, only outputs beyond the line would read it
            held[j] = picture_at<HIGH>(p.place, p.in, slot, y - dy * side, own, v);
    }
#pragma unroll
    for (int j = 0; j < SPAN; j++) add_input(sums, weights, held[j], j);
}

template <bool HIGH> INLINE void convolve(const Params& p, const Work& w) {
    const int side = side_of<HIGH>(p.place), made = side / STRIDE;
    const int t = w.chunk * (int)blockDim.x + threadIdx.x;
    const Position at = position(t, p.place.by_vectors, HIGH ? p.by_strips_high : p.by_strips_low);
    if (at.y >= made) return;
    const int channel = at.v * VECTOR;
    real sums[WIDTH][VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        const real bias = __ldg(p.bias + channel + i);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sums[j][i] = bias;
    }
    follow();
    const Cell cell = cell_of(p.place, fetch(p.cells + w.k));
    const int first_y = at.y * STRIDE - PAD, first_x = at.x * WIDTH * STRIDE - PAD;
    const bool inside = first_x >= 0 && first_x + SPAN <= side;
    const scalar* own = p.in + first_pixel<HIGH>(p.place, w.k) * p.place.channels + channel;
#pragma unroll 1
    for (int i = 0; i < K; i++) {
        const int y = first_y + i, dy = y < 0 ? -1 : y >= side;
        if ((unsigned)(cell.y + dy) >= (unsigned)p.place.gh) continue;
        real weights[K][VECTOR];
#pragma unroll
        for (int j = 0; j < K; j++)
            read_weights(p.weights + (i * K + j) * p.place.channels + channel, weights[j]);
        if (inside && dy == 0) {
            const scalar* line = own + (index_t)(y * side + first_x) * p.place.channels;
            vec held[SPAN];
#pragma unroll
            for (int j = 0; j < SPAN; j++) held[j] = load(line + (index_t)j * p.place.channels);
#pragma unroll
            for (int j = 0; j < SPAN; j++) add_input(sums, weights, held[j], j);
        } else {
            add_line<HIGH>(p, cell, y, first_x, at.v, sums, weights);
        }
    }
    const real most = (real)p.limit;
    const index_t area = (index_t)(p.place.block / STRIDE) * (p.place.block / STRIDE);
    const index_t start =
        HIGH ? w.k * area : p.place.n_high * area + (w.k - p.place.n_high) * (area / 4);
    scalar* out = p.out + (start + at.y * made) * p.place.channels + channel;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        const int x = at.x * WIDTH + j;
        if (x >= made) return;
        if (SB_RELU) {  // NaN stays
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                sums[j][i] = sums[j][i] < 0 ? 0 : sums[j][i];
                if (SB_RELU == 2 && sums[j][i] > most) sums[j][i] = most;
            }
        }
        store(out + (index_t)x * p.place.channels, pack(sums[j]));
    }
}

extern "C" __global__ void __launch_bounds__(128) depthwise(const __grid_constant__ Params p) {
    const Work w = my_work(p.place);
    if (w.high)
        convolve<true>(p, w);
    else
        convolve<false>(p, w);
}
