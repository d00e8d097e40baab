// Stands in for the instructions that wgmma.cuh, mma.cuh, warp_product.cuh, pipeline.cuh and follow.cuh wrap, so
// that a kernel written with them runs on the CPU (hopper_on_cpu.py).
//
// The threads of a thread block are fibers of one thread of the CPU, in an order that changes from thread
// block to thread block; one runs until it waits for others. Thread blocks run one after another.
// Whatever is asynchronous happens as late as the kernel allows: copies when their arrival is announced,
// or nobody can go on without them, products when they are waited for. So what is read before it is there,
// or overwritten while it is still to be read, shows in the result; and a thread block that would wait for
// ever is an error.
//
// Shared memory is named by its distance from the dynamic part, which begins at 0.
#include "cuda_on_cpu.h"
#include <cstdint>
#include <ucontext.h>

static Index threadIdx;

// -- fibers ------------------------------------------------------------------------------------------

struct Product {  // D[64, N] = A B of a thread, or += with `add`; yet to be computed
    float* d;
    unsigned long long a, b;
    int n, add;
};
struct Copy {
    char* to;
    const char* from;  // nullptr: zeros
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
    unsigned exchanges;                          // of words between the threads of its warp
    std::vector<Copy> copies;                    // not yet announced
    std::vector<std::vector<Copy>> groups;       // of copies that were not waited for
    std::vector<std::vector<Product>> products;  // of each group that was not waited for; the open one
};
static std::vector<Fiber> fibers;
static unsigned running;
static ucontext_t scheduler;
static bool progress;  // whether anything has happened since all fibers had their turn

inline Fiber& me() { return fibers[running]; }
template <class Condition> inline void wait_until(const Condition& holds) {
    while (!holds()) swapcontext(&me().context, &scheduler), threadIdx.x = running;
    progress = true;
}

struct Meeting {  // of `size` threads, again and again
    unsigned arrived, times;
    void wait(unsigned size) {
        unsigned now = times;
        if (++arrived == size) arrived = 0, times++;
        progress = true;
        wait_until([&] { return times != now; });
    }
};
static Meeting everyone, named[16];
inline void __syncthreads() { everyone.wait(blockDim.x); }
inline void sync_threads(int barrier, int threads) { named[barrier].wait(threads); }

// A word of each thread of a warp, for all of them. Two sets of words take turns, as a warp never is
// two exchanges apart.
struct Warp {
    unsigned words[2][32], arrived[2];
};
static std::vector<Warp> warps;
inline const unsigned* exchange(unsigned word) {
    Warp& warp = warps[running / 32];
    unsigned set = me().exchanges++ % 2;
    if (warp.arrived[set] == 32) warp.arrived[set] = 0;
    warp.words[set][running % 32] = word;
    warp.arrived[set]++;
    wait_until([&] { return warp.arrived[set] == 32; });
    return warp.words[set];
}
inline void __syncwarp() { exchange(0); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return same_bits<float>(exchange(same_bits<unsigned>(value))[running % 32 ^ mask]);
}
// movmatrix: of an 8×8 matrix a thread holds two neighbours of row lane / 4.
inline unsigned transpose(unsigned matrix) {
    const unsigned* words = exchange(matrix);
    unsigned row = running % 32 / 4, column = running % 4 * 2;
    auto at = [&](unsigned y, unsigned x) { return words[4 * y + x / 2] >> x % 2 * 16 & 0xffff; };
    return at(column, row) | at(column + 1, row) << 16;
}

// -- shared memory, barriers, copies -----------------------------------------------------------------

alignas(1024) static char dynamic_memory[232448];
inline unsigned shared_address(const void* pointer) {
    return (unsigned)((const char*)pointer - dynamic_memory);
}
inline char* shared(unsigned address) { return dynamic_memory + (int)address; }
inline int load_shared(unsigned from) { return *(int*)shared(from); }
inline int count_arrival(int* count) { return (*count)++; }

struct Barrier {
    std::uint16_t expected, pending;
    std::uint32_t bytes : 31, phase : 1;
    void settle() {
        progress = true;
        if (!pending && !bytes) pending = expected, phase ^= 1;
    }
};
static_assert(sizeof(Barrier) == 8);
inline Barrier& barrier_at(unsigned address) { return *(Barrier*)shared(address); }
inline void barrier_init(unsigned barrier, int arrivals) {
    barrier_at(barrier) = {(std::uint16_t)arrivals, (std::uint16_t)arrivals, 0, 0};
}
inline void barriers_ready() {}
inline void barrier_arrive(unsigned barrier, int times = 1) {
    barrier_at(barrier).pending -= times;
    barrier_at(barrier).settle();
}
inline void barrier_expect(unsigned barrier, int bytes) {
    barrier_at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(unsigned barrier, int parity) {
    wait_until([&] { return (int)barrier_at(barrier).phase != parity; });
}
inline void copy_async(unsigned to, const void* from) {
    me().copies.push_back({shared(to), (const char*)from});
}
inline void copy_zeros(unsigned to, const void*) { me().copies.push_back({shared(to), nullptr}); }
inline void copy_ahead(unsigned to, const void* from) { copy_async(to, from); }
inline void land(std::vector<Copy>& copies) {
    for (const Copy& copy : copies)
        copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
    copies.clear();
}
inline void copies_landed() { land(me().copies); }
inline void copies_begun() {
    me().groups.push_back(std::move(me().copies));
    me().copies.clear();
}
template <int PENDING> inline void copies_landed() {
    std::vector<std::vector<Copy>>& groups = me().groups;
    int count = (int)groups.size() - PENDING;
    for (int i = 0; i < count; i++) land(groups[i]);
    if (count > 0) groups.erase(groups.begin(), groups.begin() + count);
}
inline void copy_async_arrive(unsigned barrier) {
    copies_landed();
    barrier_arrive(barrier);
}
inline void store_shared(unsigned to, uint4 v) { memcpy(shared(to), &v, sizeof v); }
struct Bulk {
    unsigned to;
    const void* from;
    int bytes;
    unsigned barrier;
};
static std::vector<Bulk> bulks;  // on their way
inline void copy_bulk(unsigned to, const void* from, int bytes, unsigned barrier) {
    bulks.push_back({to, from, bytes, barrier});
}
inline bool land_bulks() {  // false: there were none
    for (const Bulk& bulk : bulks) {
        memcpy(shared(bulk.to), bulk.from, bulk.bytes);
        barrier_at(bulk.barrier).bytes -= bulk.bytes;
        barrier_at(bulk.barrier).settle();
    }
    bool any = !bulks.empty();
    bulks.clear();
    return any;
}
template <int COUNT, bool MORE> inline void set_registers() {}
inline void fence_proxy() {}

inline void follow() {}
inline int4 read_ahead(const int4* at) { return *at; }
inline int read_ahead(const int* at) { return *at; }

// -- products ----------------------------------------------------------------------------------------

template <int N> struct Wgmma {
    inline static void run(float (&d)[N / 2], unsigned long long a, unsigned long long b, int add) {
        me().products.back().push_back({d, a, b, N, add});
    }
};
// Element k of line n of a factor, as its descriptor says where they lie.
inline float element(unsigned long long descriptor, int n, int k) {
    unsigned start = (descriptor & 0x3fff) << 4, along = (descriptor >> 16 & 0x3fff) << 4;
    unsigned across = (descriptor >> 32 & 0x3fff) << 4, at;
    if (descriptor >> 62 == 1) {  // lines of 128 bytes, swizzled
        at = start + n / 8 * across + n % 8 * 128 + 2 * k;
        at ^= at >> 3 & 0x70;
    } else {
        at = start + n / 8 * across + k / 8 * along + n % 8 * 16 + k % 8 * 2;
    }
    return same_bits<float>((unsigned)*(std::uint16_t*)shared(at) << 16);
}
inline void compute(const Product& p) {
    if (!p.add) std::fill(p.d, p.d + p.n / 2, 0.f);
    int thread = running % 128, row = thread / 32 * 16 + thread % 32 / 4;
    float left[2][16];
    for (int k = 0; k < 16; k++)
        left[0][k] = element(p.a, row, k), left[1][k] = element(p.a, row + 8, k);
    for (int i = 0; i < p.n / 4; i++) {  // columns 8 (i / 2) + 2 (lane % 4) + i % 2
        int column = i / 2 * 8 + thread % 4 * 2 + i % 2, at = i / 2 * 4 + i % 2;
        for (int k = 0; k < 16; k++) {
            float right = element(p.b, column, k);
            p.d[at] += left[0][k] * right;
            p.d[at + 2] += left[1][k] * right;
        }
    }
}
// Those of a warp, of tiles whose chunks of eight values are found by `place`.
template <int MT, int NT, class Place>
inline void warp_product(float (&acc)[MT][NT][4], const char* a, const char* b, const Place& place) {
    auto value = [&](const char* tile, int line, int k) {
        const char* at = tile + place(line, k / 8) + k % 8 * 2;
        return same_bits<float>((unsigned)*(const std::uint16_t*)at << 16);
    };
    int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = 0; i < MT; i++)
        for (int j = 0; j < NT; j++)
            for (int item = 0; item < 4; item++)
                for (int k = 0; k < 64; k++)
                    acc[i][j][item] += value(a, 16 * i + row + item / 2 * 8, k) *
                                       value(b, 8 * j + column + item % 2, k);
}
inline void wgmma_fence() {}
inline void wgmma_commit() { me().products.emplace_back(); }
template <int PENDING> inline void wgmma_wait() {
    std::vector<std::vector<Product>>& groups = me().products;
    int count = (int)groups.size() - 1 - PENDING;
    for (int i = 0; i < count; i++)
        for (const Product& product : groups[i]) compute(product);
    if (count > 0) groups.erase(groups.begin(), groups.begin() + count);
    __syncwarp();  // an instruction of the whole warp
}
