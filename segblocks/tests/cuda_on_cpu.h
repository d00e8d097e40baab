// The CUDA names that kernels use, for g++: emulation.py and hopper_on_cpu.h, which have threads of their own.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
using std::max;
using std::min;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x, y, z; };
static Index blockIdx, blockDim, gridDim;

template <class T> inline T __ldcg(const T* at) { return *at; }
template <class T> inline T __ldg(const T* at) { return *at; }
template <class T> inline void __stcg(T* at, T value) { *at = value; }
inline void __threadfence() { __sync_synchronize(); }
inline int atomicAdd(int* at, int more) { return __sync_fetch_and_add(at, more); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __clz(int i) { return __builtin_clz(i); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
template <class To, class From> inline To same_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int i) { return same_bits<float>(i); }
inline float __uint_as_float(unsigned i) { return same_bits<float>(i); }
inline unsigned __float_as_uint(float f) { return same_bits<unsigned>(f); }
