// What the processes of a host tell each other, each writing into memory of all others.
//
// A number travels with the round that it belongs to, in one access. So who waits looks at nothing but the
// words that he needs, and no barrier orders anything. Rounds are counted by each thread block, on the
// device, so that one process may replay from a graph what another one launches. They take turns with two
// sets of words: who sends in a round has heard in the round before from processes that had then read
// what he overwrites.
//
// Compile-time constants: SB_PROCESSES, SB_NUMBERS, SB_COLUMNS
#pragma once
#include "dtypes.cuh"

typedef unsigned long long word;

// NUMBERS: that a column sends at most.
constexpr int PROCESSES = SB_PROCESSES, NUMBERS = SB_NUMBERS, COLUMNS = SB_COLUMNS;

struct Peers {
    unsigned* rounds;        // (thread blocks) of this process, the last of each
    word* words[PROCESSES];  // of each process: (2, sender, number, column)
};

INLINE void send(word* at, word value) {
#ifdef __CUDA_ARCH__
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#else
    *(volatile word*)at = value;
#endif
}

INLINE word look(const word* at) {
#ifdef __CUDA_ARCH__
    word value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
#else
    return *(volatile const word*)at;
#endif
}

// For a column: `own` to all processes, and `all` that these send. Called by whole thread blocks, which in
// every process are as many for the same column; `busy`: whether this thread has one.
template <int N>
INLINE void exchange(const Peers& peers, int rank, int column, bool busy, const float (&own)[N],
                     float (&all)[PROCESSES][N]) {
    static_assert(N <= NUMBERS, "no room");
    const unsigned round = peers.rounds[blockIdx.x] + 1;
    const auto place = [&](int sender, int number) {
        return (((long long)(round & 1) * PROCESSES + sender) * NUMBERS + number) * COLUMNS + column;
    };
    if (busy) {
#pragma unroll
        for (int to = 0; to < PROCESSES; to++)
#pragma unroll
            for (int k = 0; k < N; k++)
                send(peers.words[to] + place(rank, k),
                     (word)round << 32 | __float_as_uint(own[k]));
        bool waits;
        do {
            waits = false;
#pragma unroll
            for (int from = 0; from < PROCESSES; from++)
#pragma unroll
                for (int k = 0; k < N; k++) {
                    const word found = look(peers.words[rank] + place(from, k));
                    all[from][k] = __uint_as_float((unsigned)found);
                    waits |= (unsigned)(found >> 32) != round;
                }
        } while (waits);
    }
    __syncthreads();  // all have read the round
    if (threadIdx.x == 0) peers.rounds[blockIdx.x] = round;
}
