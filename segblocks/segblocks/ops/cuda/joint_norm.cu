// Batch norm over the pixels of several processes, which tell each other of theirs (peers.cuh).
//
// joint_table: a process's table (4, C) of its own rows -> that of all processes' rows, and the share of
//   them that `rows` are. weight, bias, running_mean, running_var: as in batch_statistics.cu.
// joint_sums: its sums (2, C) -> those of all processes, times its share of all rows.
// greet: a number to all processes, in their word of its rank; it belongs to no round, so nobody waits.
//
// Compile-time constants beside those of dtypes.cuh: those of peers.cuh
#include "batch_table.cuh"
#include "peers.cuh"

struct TableParams {
    const float* own;
    const float* weight;
    const float* bias;
    float* running_mean;
    float* running_var;
    float* table;
    float* share;
    Peers peers;
    int rank, channels;
    double rows, momentum, eps;
};

extern "C" __global__ void joint_table(const TableParams p) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    const bool busy = column < p.channels;
    float own[3] = {}, all[PROCESSES][3];
    if (busy) {
        own[ROWS] = (float)p.rows;
        own[ROWS_MEAN] = p.own[MEAN * (long long)p.channels + column];
        own[ROWS_INVSTD] = p.own[INVSTD * (long long)p.channels + column];
    }
    exchange(p.peers, p.rank, column, busy, own, all);
    if (!busy) return;
    join_column(p, PROCESSES, p.channels, column, [&](int i, int what) -> double { return all[i][what]; });
}

struct SumsParams {
    const float* own;
    const float* share;
    float* sums;
    Peers peers;
    int rank, channels;
};

extern "C" __global__ void joint_sums(const SumsParams p) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    const bool busy = column < p.channels;
    float own[2] = {}, all[PROCESSES][2];
    if (busy) {
        own[0] = p.own[column];
        own[1] = p.own[p.channels + column];
    }
    exchange(p.peers, p.rank, column, busy, own, all);
    if (!busy) return;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < PROCESSES; i++) sum += all[i][k];
        p.sums[(long long)k * p.channels + column] = (float)(sum * *p.share);
    }
}

struct GreetParams {
    Peers peers;
    int rank, number;
};

extern "C" __global__ void greet(const GreetParams p) {
    if (threadIdx.x >= PROCESSES) return;
#pragma unroll
    for (int to = 0; to < PROCESSES; to++)
        if (threadIdx.x == to) send(p.peers.words[to] + p.rank, (word)p.number);
}
