"""Launchers of `upsample.cu` and `upsample_backward.cu`."""

import functools

import torch
from torch import Tensor

from ..library import stored_pixels
from . import geometry as geo
from .module import Kernel, defines, prepare

_THREADS = 256


def upsample(
    pixels: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, scale: int, legacy: bool
) -> Tensor:
    """Pixel buffer (P, C) at `block` → pixel buffer (P', C) at `block * scale`, bilinear.

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_pixels`; a scale below 2.
    """
    return _run("upsample", pixels, slot, cells, n_high, block, scale, legacy)


def upsample_backward(
    grad: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, scale: int, legacy: bool
) -> Tensor:
    """Gradient of the enlarged pixels (P', C) → gradient of the pixels (P, C), by gathering.

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_pixels`; a scale below 2.
    """
    return _run("upsample_backward", grad, slot, cells, n_high, block, scale, legacy)


def _run(
    name: str,
    source: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    scale: int,
    legacy: bool,
) -> Tensor:
    if scale < 2:
        raise ValueError(f"scale must be a whole number of at least 2; got {scale}")
    geo.check(source, slot, cells, n_high, block)
    small = geo.stored_pixels(slot, n_high, block)
    rows, out_rows = small, small * scale * scale
    if name == "upsample_backward":
        rows, out_rows = out_rows, rows
    geo.check_pixels(source, rows)
    channels = source.shape[1]
    target = torch.empty((out_rows, channels), dtype=source.dtype, device=source.device)
    if target.numel():
        aligned = geo.alignment(source.data_ptr(), target.data_ptr())
        kernel = plan(
            name,
            source.get_device(),
            source.dtype,
            tuple(slot.shape),
            channels,
            n_high,
            block,
            scale,
            bool(legacy),
            aligned,
        )
        kernel.launch(
            source.device, source.data_ptr(), target.data_ptr(), slot.data_ptr(), cells.data_ptr()
        )
    return target


@functools.lru_cache(maxsize=2048)
def plan(
    name: str,
    device: int,
    dtype: torch.dtype,
    grid: tuple[int, int, int],
    channels: int,
    n_high: int,
    block: int,
    scale: int,
    legacy: bool,
    aligned: int,
) -> Kernel:
    """The launch for addresses of pixels, output, slot and cells; `aligned`: bytes, of both."""
    half = block // 2
    n_low = grid[0] * grid[1] * grid[2] - n_high
    vector = geo.access_width(dtype.itemsize, aligned, channels) // dtype.itemsize
    vectors = channels // vector
    special = scale == 2
    if name == "upsample":  # a thread takes the outputs between four source pixels
        taps = (block + 1, half + 1)
        high, low = (geo.chunks(side * side * vectors, _THREADS) for side in taps)
        integers = [*geo.divider(taps[0]), *geo.divider(taps[1])]
    else:  # edges apart from the rest, where the scale has a kernel for them
        special = special and half >= 2
        margins = (1 if legacy else 2, 1) if special else (0, 0)
        frames = [
            geo.frame(side, side, (margin,) * 4, vectors, _THREADS)
            for side, margin in zip((block, half), margins)
        ]
        high, low = (geo.frame_chunks(frame, _THREADS) for frame in frames)
        integers = [*frames[0], *frames[1]]
    where = geo.place(grid, n_high, block, channels, vector, high, low)
    largest = stored_pixels(n_high, n_low, block) * scale * scale * channels
    constants = defines(
        dtype=geo.DTYPES[dtype],
        vector=vector,
        index64=geo.needs_int64(largest),
        legacy=legacy,
        scale=2 if special else 0,
    )
    geo.chunks(block * block * scale * scale * vectors, _THREADS)  # raises if too large
    blocks = n_high * high + n_low * low
    packed = geo.pack([], [*where, scale, *integers])
    return prepare(f"{name}.cu", name, constants, device, blocks, _THREADS, packed)
