// pixel_cross_entropy_backward: gradient of the losses (N, H, W) -> gradient of the logits
//   (N, C, h, w), any sizes, by gathering: a thread sums up what reads its logit.
#include "cross_entropy.cuh"

struct Params {
    const real* grad;
    const scalar* logits;
    const long long* labels;
    const real* log_sums;
    scalar* out;
    Maps of_grad;
    Images in;
    Maps of_labels;
    Images of_out;
    long long ignored;
    Sizes size;
};

// The outputs that may read sample `at`: a pixel more than computed, lest rounding leave one out.
struct Range {
    int first, last;
};

INLINE Range readers(int at, int small, int large) {
    if (SB_SCALE == 1) return {at, at};
    const real scale = real(large) / real(small);
    const int first = (int)((at - real(0.5)) * scale - real(0.5)) - 1;
    const int last = (int)((at + real(1.5)) * scale - real(0.5)) + 2;
    // Beyond the outermost samples every output reads them.
    return {at == 0 ? 0 : max(first, 0), at == small - 1 ? large - 1 : min(last, large - 1)};
}

INLINE Tap tap(int at, int small, int large) {
    return SB_SCALE == 1 ? Tap{at, at, 0} : tap_of(at, small, large);
}

INLINE real weight_of(int sample, const Tap& tap) {
    return (tap.first == sample ? 1 - tap.weight : 0) + (tap.second == sample ? tap.weight : 0);
}

extern "C" __global__ void __launch_bounds__(256) pixel_cross_entropy_backward(const Params p) {
    const Sizes& size = p.size;
    const int n = blockIdx.x / size.blocks, chunk = blockIdx.x - n * size.blocks;
    const index_t item = (index_t)chunk * 256 + threadIdx.x, plane = (index_t)size.h * size.w;
    if (item >= plane * size.classes) return;
    // Neighbours in memory go to neighbouring threads.
    const int c = (int)(SB_LAST ? item % size.classes : item / plane);
    const index_t pixel = SB_LAST ? item / size.classes : item - c * plane;
    const int y = (int)(pixel / size.w), x = (int)(pixel - (index_t)y * size.w);
    const scalar* image = p.logits + n * (index_t)p.in.n;
    const index_t offset = c * (index_t)p.in.c;

    const Range rows = readers(y, size.h, size.height), columns = readers(x, size.w, size.width);
    real sum = 0;
    for (int oy = rows.first; oy <= rows.last; oy++) {
        const Tap down = tap(oy, size.h, size.height);
        const real weight = weight_of(y, down);
        if (weight == 0) continue;
        real of_row = 0;
        for (int ox = columns.first; ox <= columns.last; ox++) {
            const Tap across = tap(ox, size.w, size.width);
            const real share = weight_of(x, across);
            const real pull = __ldg(p.grad + n * (index_t)p.of_grad.n +
                                    oy * (index_t)p.of_grad.y + ox * (index_t)p.of_grad.x);
            if (share == 0 || pull == 0) continue;
            const long long label =
                __ldg(p.labels + n * (index_t)p.of_labels.n + oy * (index_t)p.of_labels.y +
                      ox * (index_t)p.of_labels.x);
            if (label == p.ignored) continue;
            const real log_sum =
                __ldg(p.log_sums + ((index_t)n * size.height + oy) * size.width + ox);
            real upper, lower;
            read_lines(corners_of(image, p.in, down, across), offset, upper, lower);
            const real z = SB_SCALE == 1 ? upper : mix(upper, lower, down.weight);
            const real probability = power_of_2(z - log_sum * LOG2_E);
            of_row += share * pull * (probability - (label == c ? 1 : 0));
        }
        sum += weight * of_row;
    }
    p.out[n * (index_t)p.of_out.n + offset_of(p.of_out, c, y, x)] = to_scalar(sum);
}
