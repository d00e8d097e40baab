// The convolution of conv_sm90.cu for GPUs that lack its instructions: Ampere, Ada, and those after
// Hopper (sm_80 and later). conv_arguments.cuh says what is convolved, and what the arguments are. SEPARATE
// and LATE are of eager inference, which takes conv_sm90.cu alone.
//
// Eight warps fetch and multiply alike. While they multiply a step, copies of the STAGES - 1 behind it are on
// their way; a warp multiplies 16·MT rows by 32 columns. Fetched rows, and output channels, are lines of
// 128 bytes, their 16-byte chunks permuted so that threads reach them without conflicts.
#include "dtypes.cuh"
#include "pipeline.cuh"
#include "mma.cuh"
#include "warp_product.cuh"
#include "follow.cuh"
#include "conv_arguments.cuh"

constexpr bool HALVES = false;  // all warps go through the whole inner dimension
constexpr int THREADS = 256, LINES = THREADS / 8;  // eight threads copy a line
constexpr int ACROSS = BN / 32, DOWN = 8 / ACROSS, MT = BM / DOWN / 16, NT = 4;  // warps; their products
constexpr int ROWS = BM / LINES, COLUMNS = BN / LINES;                           // lines a thread copies

#include "shares.cuh"
#include "epilogue.cuh"

// Where a 16-byte chunk of a line lies. The same chunk of eight consecutive lines lies in eight different
// places of a line, and four chunks of two consecutive lines in different banks.
INLINE int place(int line, int chunk) {
    return line * 128 + ((chunk ^ ((line & 1) << 2 | (line >> 1 & 3))) << 4);
}

// Fetches one step after the other.
struct Fetcher {
    const Arguments& p;
    const Share& share;
    const int* looked_up;  // rows that the taps and the second input read
    unsigned smem;
    int k, tap, column, stage;
    uint4 held[ROWS];  // PRE: on their way through registers

    // Starts copies of the next step, if there is one.
    INLINE void begin() {
        if (k >= share.last) return;
        int chunk = threadIdx.x % 8, own = threadIdx.x / 8;
        unsigned to = smem + stage * STAGE_BYTES;
        const scalar* weights = p.weights + ((long long)k * p.cout_pad + share.tile_n * BN) * BK;
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {  // packed for Hopper, chunks permuted by the channel modulo 8
            int n = own + i * LINES;
            copy_async(to + A_BYTES + place(n, chunk), weights + n * BK + (chunk ^ (n & 7)) * 8);
        }
        Chunk source = chunk_at(p, k, column, chunk);
        const int* rows = looked_up + (SB_EXTRA && k >= main_steps_of(p) ? TAPS : tap) * BM + own;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int line = own + i * LINES;
            const scalar* from = source.of(p, rows[i * LINES], share.tile_m * BM + line);
            if (SB_PRE)
                held[i] = source.exists ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
            else if (source.exists)
                copy_async(to + place(line, chunk), from);
            else
                copy_zeros(to + place(line, chunk), p.x);
        }
    }
    // Stores what came through registers, and goes on to the step behind.
    INLINE void end() {
        if (SB_PRE && k < share.last) {
            int chunk = threadIdx.x % 8, own = threadIdx.x / 8, channel = column + chunk * 8;
            bool exists = !SB_RAGGED || channel < p.cin;
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                uint4 v = held[i];
                if (exists) v = affine_relu(v, p.pre, p.cin, channel);
                store_shared(smem + stage * STAGE_BYTES + place(own + i * LINES, chunk), v);
            }
        }
        k++;
        if (++stage == STAGES) stage = 0;
        if (++tap == TAPS) tap = 0, column += BK;
    }
};

// All rows that the tile reads, so that no step waits for a table. STEM's is the same for every grid: no
// kernel makes it.
INLINE void look_up(const Arguments& p, const Share& share, int* looked_up) {
    for (int item = threadIdx.x; item < (TAPS + SB_EXTRA) * BM / 4; item += THREADS) {
        int t = item / (BM / 4), m = share.tile_m * BM + item % (BM / 4) * 4;
        int4 v = read_ahead((const int4*)((t < TAPS ? p.table + t * p.pitch : p.table2) + m));
        if (TAPS == 1) {
            int left = p.rows - m;  // x may end with the stored pixels: past them, read the first
            v.x = left > 0 ? v.x : 0, v.y = left > 1 ? v.y : 0;
            v.z = left > 2 ? v.z : 0, v.w = left > 3 ? v.w : 0;
        }
        ((int4*)looked_up)[item] = v;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, SB_BLOCKS)
    block_conv(const __grid_constant__ Arguments p) {
    extern __shared__ char dynamic[];
    __shared__ int arrived;
    __shared__ Places places;
    __shared__ __align__(16) int looked_up[(TAPS + SB_EXTRA) * BM];
    char* memory = (char*)(((unsigned long long)dynamic + 1023) & ~1023ull);
    Share share = share_of(p, steps_of(p));
    look_up(p, share, looked_up);
    if (!SB_STEM) look_up_places(p, share, places);
    follow();
    if (SB_STEM) look_up_places(p, share, places);
    __syncthreads();

    Fetcher fetcher = {p, share, looked_up, shared_address(memory), share.first};
    fetcher.tap = share.first % TAPS, fetcher.column = share.first / TAPS * BK, fetcher.stage = 0;
    for (int i = 0; i < STAGES - 1; i++) {
        fetcher.begin();
        fetcher.end();
        copies_begun();
    }
    int thread = threadIdx.x, warp = thread / 32, down = warp / ACROSS * 16 * MT, across = warp % ACROSS * 32;
    float acc[MT][NT][4] = {};
    for (int k = share.first, stage = 0; k < share.last; k++) {
        copies_landed<STAGES - 2>();
        __syncthreads();  // step k is there, and the stage of the one before it free
        fetcher.begin();
        copies_begun();
        const char* from = memory + stage * STAGE_BYTES;
        warp_product(acc, from + down * 128, from + A_BYTES + across * 128, place);
        fetcher.end();
        if (++stage == STAGES) stage = 0;
    }
    copies_landed<0>();
    __syncthreads();  // the stages become the staging area

    float* staged = (float*)memory;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float* to = staged + (down + 16 * i + thread % 32 / 4) * PITCH + across + 8 * j + thread % 4 * 2;
            *(float2*)to = make_float2(acc[i][j][0], acc[i][j][1]);
            *(float2*)(to + 8 * PITCH) = make_float2(acc[i][j][2], acc[i][j][3]);
        }
    __syncthreads();
    constexpr int READERS = BM == 64 ? THREADS : 128;  // of the same 64 rows
    int row = thread / READERS * 64, reader = thread % READERS;
    staged += row * PITCH;
    if (share.shared >= 0) {
        if (!add_parts<READERS>(p, share, staged, row, reader, &arrived)) return;
        __syncthreads();
    }
    finish(p, staged, places, row, share.tile_m * BM + row, share.tile_n, reader, READERS, false);
}
