// Storage types, the vectors that move them, and the arithmetic type behind them.
//
// Compile-time constants:
//   SB_DTYPE    0 float16, 1 bfloat16, 2 float32, 3 float64
//   SB_VECTOR   elements per access; SB_VECTOR * sizeof(scalar) is 2, 4, 8 or 16 bytes
//   SB_INDEX64  1: element offsets take 64 bits
//   SB_FOLLOWS  defined by files whose kernels `follow` (follow.cuh)
//
// Conversions are written out, so that the sources need no CUDA header and NVRTC no include path.
#pragma once

#define INLINE __device__ __forceinline__

#if SB_DTYPE <= 1
typedef unsigned short scalar;
typedef float real;
#elif SB_DTYPE == 2
typedef float scalar;
typedef float real;
#else
typedef double scalar;
typedef double real;
#endif

#if SB_INDEX64
typedef long long index_t;
#else
typedef int index_t;
#endif

constexpr int VECTOR = SB_VECTOR;

template <int BYTES> struct Raw;
template <> struct Raw<2> { typedef unsigned short type; };
template <> struct Raw<4> { typedef unsigned int type; };
template <> struct Raw<8> { typedef uint2 type; };
template <> struct Raw<16> { typedef uint4 type; };
typedef Raw<SB_VECTOR * (int)sizeof(scalar)>::type vec;

// What another kernel may have written: by the read-only path where that has finished for certain.
#if defined(SB_FOLLOWS)
template <class T> INLINE T fetch(const T* at) { return *at; }
#else
template <class T> INLINE T fetch(const T* at) { return __ldg(at); }
#endif

INLINE vec load(const scalar* at) { return fetch(reinterpret_cast<const vec*>(at)); }
INLINE void store(scalar* at, vec v) { *reinterpret_cast<vec*>(at) = v; }

#if SB_DTYPE == 0
INLINE real to_real(scalar s) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(s));
    return f;
}
INLINE scalar to_scalar(real f) {
    unsigned short s;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(s) : "f"(f));
    return s;
}
INLINE void unpack_pair(unsigned w, real& a, real& b) {
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(a), "=f"(b) : "r"(w));
}
INLINE unsigned pack_pair(real a, real b) {
    unsigned w;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(b), "f"(a));
#else
    asm("{.reg .f16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
        : "=r"(w) : "f"(a), "f"(b));
#endif
    return w;
}
#elif SB_DTYPE == 1
INLINE real to_real(scalar s) { return __uint_as_float((unsigned)s << 16); }
INLINE unsigned pack_pair(real a, real b) {
    unsigned w;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(b), "f"(a));
#else  // round to nearest even by hand; a NaN stays one
    unsigned u = __float_as_uint(a), v = __float_as_uint(b);
    u = a != a ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    v = b != b ? 0x7fff : (v + 0x7fff + ((v >> 16) & 1)) >> 16;
    w = u | v << 16;
#endif
    return w;
}
INLINE scalar to_scalar(real f) { return (scalar)pack_pair(f, f); }
INLINE void unpack_pair(unsigned w, real& a, real& b) {
    a = __uint_as_float(w << 16);
    b = __uint_as_float(w & 0xffff0000u);
}
#else
INLINE real to_real(scalar s) { return s; }
INLINE scalar to_scalar(real f) { return f; }
#endif

// A vector seen as scalars; only ever indexed by constants, so it lives in registers.
union Lanes {
    vec v;
    scalar s[VECTOR];
    unsigned w[(sizeof(vec) + 3) / 4];
};

INLINE void unpack(vec v, real (&x)[VECTOR]) {
    Lanes lanes;
    lanes.v = v;
#if SB_DTYPE <= 1 && SB_VECTOR > 1
#pragma unroll
    for (int i = 0; i < VECTOR / 2; i++) unpack_pair(lanes.w[i], x[2 * i], x[2 * i + 1]);
#else
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = to_real(lanes.s[i]);
#endif
}

INLINE vec pack(const real (&x)[VECTOR]) {
    Lanes lanes;
#if SB_DTYPE <= 1 && SB_VECTOR > 1
#pragma unroll
    for (int i = 0; i < VECTOR / 2; i++) lanes.w[i] = pack_pair(x[2 * i], x[2 * i + 1]);
#else
#pragma unroll
    for (int i = 0; i < VECTOR; i++) lanes.s[i] = to_scalar(x[i]);
#endif
    return lanes.v;
}

INLINE void add(real (&sum)[VECTOR], vec v, real weight) {
    real x[VECTOR];
    unpack(v, x);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum[i] += weight * x[i];
}

INLINE vec scaled(vec v, real weight) {
    real x[VECTOR];
    unpack(v, x);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] *= weight;
    return pack(x);
}
