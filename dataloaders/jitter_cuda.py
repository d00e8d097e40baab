"""Colour jitter and normalisation of a batch on a GPU, in two kernels of Triton.

The arithmetic is that of `jitter` and `to_network` on the CPU, operation by operation, and fused
multiply-adds are where PyTorch has them there. So results differ where float32 falls on the other
side of one half: a few pixels by one level of 255. The exception is contrast, whose mean grey is
rounded to a whole level: once in 100 000 images that becomes the next one, and with it many pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dataloaders.jitter import LUMA

_SUMMED, _WRITTEN = 4096, 1024  # pixels of a program of the first and the second kernel

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (tl.constexpr(i) for i in range(4))
_RED, _GREEN, _BLUE = (tl.constexpr(x) for x in LUMA)
_ROUNDS = tl.constexpr(1.5 * 2**23)  # added to a small float32, leaves no room for a fraction


def jitter_and_normalise(
    image: Tensor, changes: Tensor, mean: Tensor, std: Tensor, channels_last: bool = False
) -> Tensor:
    """Apply each image's colour jitter, round to whole levels, and normalise. Enqueues two kernels
    on the current stream and waits for nothing; sums are added in one order, so results repeat.

    Args:
        image: (N, 3, H, W) uint8, of any strides.
        changes: (N, 4, 2) float32 as `DrawJitter` draws them, on the same device.
        mean, std: three float32 each, contiguous, over 0..1.
        channels_last: memory format of the result; otherwise it is contiguous.

    Returns:
        (N, 3, H, W) float32.
    """
    count, _, height, width = image.shape
    pixels = height * width
    form = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(image.shape, dtype=torch.float32, device=image.device, memory_format=form)
    tiles = triton.cdiv(pixels, _SUMMED)
    sums = torch.empty(count, tiles, device=image.device)
    changes = changes.contiguous()
    # Only as in the CPU's arithmetic, where it is written out.
    options = {"enable_fp_fusion": False}
    with torch.cuda.device_of(image):  # Triton launches on the current one
        _sum_grey[count, tiles](
            image, changes, sums, width, pixels, *image.stride(), BLOCK=_SUMMED, num_warps=8,
            **options,
        )  # fmt: skip
        _jitter[count, triton.cdiv(pixels, _WRITTEN)](
            image, changes, sums, mean, std, out, width, pixels, tiles,
            *image.stride(), *out.stride(),
            BLOCK=_WRITTEN, TILES=triton.next_power_of_2(tiles), num_warps=4, **options,
        )  # fmt: skip
    return out


@triton.jit
def _sum_grey(
    image, changes, sums, width, pixels, stride_n, stride_c, stride_h, stride_w,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The grey that contrast finds, added up over a tile: sums (N, tiles)."""
    n, tile = tl.program_id(0), tl.program_id(1)
    place = 4
    for i in range(4):
        if tl.load(changes + n * 8 + 2 * i) == _CONTRAST:
            place = i
    if place < 4:
        at = tile * BLOCK + tl.arange(0, BLOCK)
        there = at < pixels
        start = image + n.to(tl.int64) * stride_n
        r, g, b = _pixels(start, at, there, width, stride_c, stride_h, stride_w)
        for i in range(place):
            change = tl.load(changes + n * 8 + 2 * i)
            factor = tl.load(changes + n * 8 + 2 * i + 1)
            r, g, b = _changed(r, g, b, change, factor, 0.0)
        grey = tl.where(there, _grey(r, g, b), 0.0)
        tl.store(sums + n * tl.num_programs(1) + tile, tl.sum(grey, axis=0))


@triton.jit
def _jitter(
    image, changes, sums, mean, std, out, width, pixels, tiles,
    stride_n, stride_c, stride_h, stride_w, out_n, out_c, out_h, out_w,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < pixels
    start = image + n.to(tl.int64) * stride_n
    r, g, b = _pixels(start, at, there, width, stride_c, stride_h, stride_w)
    for i in range(4):
        change = tl.load(changes + n * 8 + 2 * i)
        factor = tl.load(changes + n * 8 + 2 * i + 1)
        middle = 0.0
        if change == _CONTRAST:
            tile = tl.arange(0, TILES)
            parts = tl.load(sums + n * tiles + tile, mask=tile < tiles, other=0.0)
            middle = (tl.sum(parts, axis=0) / pixels + _ROUNDS) - _ROUNDS  # a half to even
        r, g, b = _changed(r, g, b, change, factor, middle)
    to = out + n.to(tl.int64) * out_n + (at // width) * out_h + (at % width) * out_w
    tl.store(to, _normalised(r, mean, std, 0), mask=there)
    tl.store(to + out_c, _normalised(g, mean, std, 1), mask=there)
    tl.store(to + 2 * out_c, _normalised(b, mean, std, 2), mask=there)


@triton.jit
def _pixels(start, at, there, width, stride_c, stride_h, stride_w):
    where = start + (at // width) * stride_h + (at % width) * stride_w
    r = tl.load(where, mask=there, other=0).to(tl.float32)
    g = tl.load(where + stride_c, mask=there, other=0).to(tl.float32)
    b = tl.load(where + 2 * stride_c, mask=there, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _changed(r, g, b, change, factor, middle):
    """One change, of NAMES; contrast is about the grey `middle`."""
    if change == _BRIGHTNESS:
        r, g, b = _cut(r * factor), _cut(g * factor), _cut(b * factor)
    elif change == _CONTRAST:
        shift = middle * (1 - factor)
        r, g, b = _cut(r * factor + shift), _cut(g * factor + shift), _cut(b * factor + shift)
    elif change == _SATURATION:
        grey = _grey(r, g, b) * (1 - factor)
        r = _cut(tl.fma(r, factor, grey))
        g = _cut(tl.fma(g, factor, grey))
        b = _cut(tl.fma(b, factor, grey))
    elif change == _HUE:
        high = tl.maximum(tl.maximum(r, g), b)
        low = tl.minimum(tl.minimum(r, g), b)
        chroma = high - low
        scale = tl.div_rn(1.0, tl.maximum(chroma, 1e-6))
        turn = 6 * factor
        angle = tl.where(high == g, (b - r) * scale + (2 + turn), (r - g) * scale + (4 + turn))
        angle = tl.where(high == r, (g - b) * scale + turn, angle)
        r = low + chroma * _share(angle, 0)
        g = low + chroma * _share(angle, 2)
        b = low + chroma * _share(angle, 4)
    return r, g, b


@triton.jit
def _cut(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _grey(r, g, b):
    return tl.fma(b, _BLUE, tl.fma(g, _GREEN, r * _RED))


@triton.jit
def _share(angle, own):
    away = tl.abs(tl.abs(angle - own) - 3) - 1
    return tl.minimum(tl.maximum(away, 0.0), 1.0)


@triton.jit
def _normalised(x, mean, std, channel):
    level = (x + 0.5).to(tl.int32).to(tl.float32)
    return tl.div_rn(tl.div_rn(level, 255.0) - tl.load(mean + channel), tl.load(std + channel))
