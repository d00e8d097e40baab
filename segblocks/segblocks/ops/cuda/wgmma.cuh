// Hopper's warpgroup matrix product: D[64, N] += A[64, 16] B[16, N], both from shared memory.
//
// A is 64 rows and B is N rows of 64 K-values each (128 bytes, 128-byte swizzle, 1024-byte aligned
// tiles). Thread t of the warpgroup holds, for j < N/8, d[4j..4j+3] = rows t/4 + 16*(t/32 within the
// group's four warps), and 8 below it, columns 8j + 2*(t%4) and the next.
#pragma once

#if SB_DTYPE == 1
#define WGMMA_TYPE "bf16.bf16"
#else
#define WGMMA_TYPE "f16.f16"
#endif

template <int N> struct Wgmma;

// An instruction names each of its operands, so the lists below are written out: D is the first N/2, and
// A, B and ADD follow. Whether the product is added to D is asked at run time.
#define WGMMA(N, A, B, ADD, D, ...)                                                               \
    template <> struct Wgmma<N> {                                                                 \
        INLINE static void run(float (&d)[N / 2], unsigned long long a, unsigned long long b,     \
                               int add) {                                                         \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0;\n"                            \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." WGMMA_TYPE " {" D      \
                         "}, " A ", " B ", p, 1, 1, 0, 0;}\n"                                     \
                         : __VA_ARGS__                                                            \
                         : "l"(a), "l"(b), "r"(add));                                             \
        }                                                                                         \
    };
#define D_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define D_16 D_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D_32 D_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D_40 D_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define D_48 D_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define D_64 D_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D_96 D_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define D_128 D_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS(i)                                                                            \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_16 SUMS(0), SUMS(8)
#define SUMS_32 SUMS_16, SUMS(16), SUMS(24)
#define SUMS_64 SUMS_32, SUMS(32), SUMS(40), SUMS(48), SUMS(56)
#define SUMS_96 SUMS_64, SUMS(64), SUMS(72), SUMS(80), SUMS(88)
WGMMA(16, "%8", "%9", "%10", D_8, SUMS(0))
WGMMA(32, "%16", "%17", "%18", D_16, SUMS_16)
WGMMA(64, "%32", "%33", "%34", D_32, SUMS_32)
WGMMA(80, "%40", "%41", "%42", D_40, SUMS_32, SUMS(32))
WGMMA(96, "%48", "%49", "%50", D_48, SUMS_32, SUMS(32), SUMS(40))
WGMMA(128, "%64", "%65", "%66", D_64, SUMS_64)
WGMMA(192, "%96", "%97", "%98", D_96, SUMS_96)
WGMMA(256, "%128", "%129", "%130", D_128, SUMS_96, SUMS(96), SUMS(104), SUMS(112), SUMS(120))

INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> INLINE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Turns an 8×8 matrix of a warp round, of which a thread holds two neighbours of row lane / 4.
INLINE unsigned transpose(unsigned matrix) {
    unsigned turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(matrix));
    return turned;
}
