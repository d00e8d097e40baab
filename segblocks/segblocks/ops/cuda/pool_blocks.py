"""Launchers of `pool_blocks.cu`."""

import functools

import torch
from torch import Tensor

from ..library import stored_pixels
from . import geometry as geo
from .module import Kernel, defines, prepare

_THREADS = 256
Sides = tuple[int, int, int, int, bool]  # left, right, top, bottom, replicate
Window = tuple[int, int, int, int, int]  # kernel's height and width, stride, dilations


def max_pool(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    replicate: bool,
    fill: float,
    kernel: list[int],
    stride: int,
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    """Pixel buffer (P, C) → pooled pixels (P', C) and the uint8 tap (P', C) that won each.

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_pixels`; a stride that does not
            divide a low block.
    """
    rows, out_rows = _check(pixels, slot, cells, n_high, block, stride)
    geo.check_pixels(pixels, rows)
    shape, device = (out_rows, pixels.shape[1]), pixels.device
    out = torch.empty(shape, dtype=pixels.dtype, device=device)
    taps = torch.empty(shape, dtype=torch.uint8, device=device)
    if out.numel():
        sides = (left, right, top, bottom, bool(replicate))
        window = (*kernel, stride, *dilation)
        where = (slot, cells, n_high, block)
        _run("pool_blocks", pixels, out, taps, *where, sides, fill, window)
    return out, taps


def max_pool_backward(
    grad: Tensor,
    taps: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    replicate: bool,
    kernel: list[int],
    stride: int,
    dilation: list[int],
) -> Tensor:
    """Gradient of the pooled pixels (P', C) → gradient of the pixels (P, C), by gathering.

    Raises:
        TypeError, ValueError: as of `max_pool`; taps that are not those of the pooled pixels.
    """
    rows, out_rows = _check(grad, slot, cells, n_high, block, stride)
    geo.check_pixels(grad, out_rows)
    geo.check_pixels(taps, out_rows)
    if taps.dtype != torch.uint8 or taps.shape != grad.shape:
        raise ValueError(
            f"taps must be uint8 {tuple(grad.shape)}, as from max_pool; got {taps.dtype} "
            f"{tuple(taps.shape)}"
        )
    pixels = torch.empty((rows, grad.shape[1]), dtype=grad.dtype, device=grad.device)
    if pixels.numel():
        sides = (left, right, top, bottom, bool(replicate))
        window = (*kernel, stride, *dilation)
        where = (slot, cells, n_high, block)
        _run("pool_blocks_backward", grad, pixels, taps, *where, sides, 0.0, window)
    return pixels


def _check(
    x: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, stride: int
) -> tuple[int, int]:
    """Pixels stored before and after pooling."""
    geo.check(x, slot, cells, n_high, block)
    if stride < 1 or block % (2 * stride):
        raise ValueError(f"stride {stride} does not divide a low block of {block // 2} pixels")
    rows = geo.stored_pixels(slot, n_high, block)
    return rows, rows // stride**2


def _run(
    name: str,
    source: Tensor,
    target: Tensor,
    taps: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    sides: Sides,
    fill: float,
    window: Window,
) -> None:
    # An access to the taps has as many bytes as one to the pixels has elements.
    taps_at = taps.data_ptr() * source.element_size()
    kernel = _plan(
        name,
        source.get_device(),
        source.dtype,
        tuple(slot.shape),
        source.shape[1],
        n_high,
        block,
        sides,
        repr(float(fill)),  # a NaN is not equal to itself, and would never be found again
        window,
        geo.alignment(source.data_ptr(), target.data_ptr(), taps_at),
    )
    tensors = (source, target, taps, slot, cells)
    kernel.launch(source.device, *(x.data_ptr() for x in tensors))


@functools.lru_cache(maxsize=1024)
def _plan(
    name: str,
    device: int,
    dtype: torch.dtype,
    grid: tuple[int, int, int],
    channels: int,
    n_high: int,
    block: int,
    sides: Sides,
    fill: str,
    window: Window,
    aligned: int,
) -> Kernel:
    height, width, stride, dilation_y, dilation_x = window
    half, out, n_low = block // 2, block // stride, grid[0] * grid[1] * grid[2] - n_high
    vector = geo.access_width(dtype.itemsize, aligned, channels) // dtype.itemsize
    vectors = channels // vector
    worked = (out, out // 2) if name == "pool_blocks" else (block, half)  # a thread per vector
    high, low = (geo.chunks(side * side * vectors, _THREADS) for side in worked)
    geo.chunks(block * block * vectors, _THREADS)  # raises if too large
    constants = defines(
        dtype=geo.DTYPES[dtype],
        vector=vector,
        index64=geo.needs_int64(stored_pixels(n_high, n_low, block) * channels),
        kernel_y=height,
        kernel_x=width,
        stride=stride,
        dilation_y=dilation_y,
        dilation_x=dilation_x,
    )
    where = geo.place(grid, n_high, block, channels, vector, high, low)
    dividers = [divisor for side in (block, half, out, out // 2) for divisor in geo.divider(side)]
    packed = geo.pack([float(fill)], [*where, *map(int, sides), *dividers])
    blocks = n_high * high + n_low * low
    return prepare("pool_blocks.cu", name, constants, device, blocks, _THREADS, packed, pointers=5)
