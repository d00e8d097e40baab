// What the kernels of pixel_cross_entropy share: logits (N, C, h, w) of any strides, seen enlarged
// or shrunk bilinearly (corners not aligned) at the pixels of labels (N, H, W).
//
// Compile-time constants beside those of dtypes.cuh, whose SB_VECTOR is 1:
//   SB_SCALE  2, 4, 8: H = SB_SCALE h and W = SB_SCALE w; 1: equal sizes; 0: any sizes
//   SB_LAST   1: the classes of a pixel lie side by side
#pragma once
#include "dtypes.cuh"

struct Images {  // in elements
    long long n, c, y, x;
};

struct Maps {
    long long n, y, x;
};

INLINE index_t offset_of(const Images& strides, int c, int y, int x) {
    return c * (index_t)strides.c + y * (index_t)strides.y + x * (index_t)strides.x;
}

struct Sizes {
    int classes, h, w, height, width;
    int blocks;  // thread blocks of an image
};

// Logarithms and powers to base 2 are what the hardware has; the mixing weights bring logits there.
constexpr real LOG2_E = 1.4426950408889634;

#if SB_DTYPE == 3
INLINE real power_of_2(real x) { return exp2(x); }
INLINE real log_2(real x) { return log2(x); }
INLINE real larger(real a, real b) { return fmax(a, b); }
INLINE real times(real a, real b) { return __dmul_rn(a, b); }
INLINE real fused(real a, real b, real c) { return fma(a, b, c); }
INLINE real infinity() { return __longlong_as_double(0x7ff0000000000000ll); }
#else
INLINE real power_of_2(real x) {
    real y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE real log_2(real x) { return log2f(x); }
INLINE real larger(real a, real b) { return fmaxf(a, b); }
INLINE real times(real a, real b) { return __fmul_rn(a, b); }
INLINE real fused(real a, real b, real c) { return fmaf(a, b, c); }
INLINE real infinity() { return __int_as_float(0x7f800000); }
#endif

// Between two samples of an axis, the weight being that of the second. Weights multiply both, so
// that a class of -inf everywhere stays -inf. `fused` and `times` leave the compiler no choice of
// rounding: a logit read twice is the same number, and no loss is below 0.
struct Tap {
    int first, second;
    real weight;
};

INLINE real mix(real first, real second, real weight) {
    return fused(1 - weight, first, times(weight, second));
}

// Output `at` of `large`, from `small` samples: the index that PyTorch computes.
INLINE Tap tap_of(int at, int small, int large) {
    real from = (at + real(0.5)) * (real(small) / real(large)) - real(0.5);
    from = from < 0 ? real(0) : from;
    const int first = min((int)from, small - 1);
    return {first, min(first + 1, small - 1), from - first};
}

// The samples that cell `cell` lies between: SB_SCALE outputs from first_output(cell) on.
INLINE Tap between(int cell, int small, real weight) {
    return {max(cell - 1, 0), min(cell, small - 1), weight};
}

INLINE int first_output(int cell) { return (cell - 1) * SB_SCALE + SB_SCALE / 2; }

INLINE constexpr real fraction(int i) { return (i + real(0.5)) / (SB_SCALE ? SB_SCALE : 1); }

// The four logits around an output, or around several that lie between the same four.
struct Corners {
    const scalar* at[4];
    real left, right;  // weights, times LOG2_E
};

INLINE Corners corners_of(const scalar* image, const Images& in, const Tap& y, const Tap& x) {
    const index_t above = (index_t)y.first * (index_t)in.y, below = (index_t)y.second * (index_t)in.y;
    const index_t left = (index_t)x.first * (index_t)in.x, right = (index_t)x.second * (index_t)in.x;
    return {{image + above + left, image + above + right, image + below + left, image + below + right},
            (1 - x.weight) * LOG2_E,
            x.weight * LOG2_E};
}

INLINE void read_lines(const Corners& from, index_t offset, real& upper, real& lower) {
    const real a = to_real(__ldg(from.at[0] + offset));
    if (SB_SCALE == 1) {  // no neighbour, whose infinity would count as NaN
        upper = lower = times(a, LOG2_E);
        return;
    }
    const real b = to_real(__ldg(from.at[1] + offset)), c = to_real(__ldg(from.at[2] + offset));
    const real d = to_real(__ldg(from.at[3] + offset));
    upper = fused(from.left, a, times(from.right, b));
    lower = fused(from.left, c, times(from.right, d));
}
