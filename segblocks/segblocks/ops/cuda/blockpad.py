"""Launchers of `blockpad.cu` and `blockpad_near.cu`."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch_norm import pads_normalised
from . import geometry as geo
from .batch_norm import check_row
from .module import Kernel, defines, multiprocessors, prepare

_THREADS = 128
_RESIDENT = 6  # thread blocks of blockpad_near, by its registers, that a multiprocessor holds
Sides = tuple[int, int, int, int, bool]  # left, right, top, bottom, replicate


def blockpad(
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
) -> Tensor:
    """Pixel buffer (P, C) → padded blocks (P', C), both resolutions in one launch.

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_pixels`; pads that leave no pixel.
    """
    geo.check(pixels, slot, cells, n_high, block)
    geo.check_pixels(pixels, geo.stored_pixels(slot, n_high, block))
    rows = _padded_rows(slot, n_high, block, left, right, top, bottom)
    padded = torch.empty((rows, pixels.shape[1]), dtype=pixels.dtype, device=pixels.device)
    if padded.numel():
        sides = (left, right, top, bottom, bool(replicate))
        kernel = _kernel("blockpad", pixels, padded, slot, n_high, block, sides, float(fill))
        kernel.launch(
            pixels.device, pixels.data_ptr(), padded.data_ptr(), slot.data_ptr(), cells.data_ptr()
        )
    return padded


def blockpad_normalised(
    pixels: Tensor,
    table: Tensor,
    relu: bool,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
) -> Tensor:
    """`blockpad`, beyond the image 0, of what a batch norm with this table (4, C) makes of pixels.

    Raises:
        TypeError, ValueError: as of `blockpad`; float64; pads that are negative or wider than a low
            block; a table that does not fit.
    """
    geo.check(pixels, slot, cells, n_high, block)
    geo.check_pixels(pixels, geo.stored_pixels(slot, n_high, block))
    sides = (left, right, top, bottom, False)
    if pixels.dtype == torch.float64:
        raise TypeError("no CUDA kernel for float64; use float16, bfloat16 or float32")
    check_row(table, pixels, (4, pixels.shape[1]))
    if not pads_normalised(sides[:4], block):
        raise ValueError(
            f"pads (left, right, top, bottom) = {sides[:4]} must lie between 0 and the side of a "
            f"low block, {block // 2}"
        )
    rows = _padded_rows(slot, n_high, block, left, right, top, bottom)
    padded = torch.empty((rows, pixels.shape[1]), dtype=pixels.dtype, device=pixels.device)
    if padded.numel():
        name = "blockpad_normalised_relu" if relu else "blockpad_normalised"
        kernel = _kernel(name, pixels, padded, slot, n_high, block, sides, 0.0)
        tensors = (pixels, padded, slot, cells, table)
        kernel.launch(pixels.device, *(x.data_ptr() for x in tensors))
    return padded


def blockpad_backward(
    grad: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    replicate: bool,
) -> Tensor:
    """Gradient of the padded blocks (P', C) → gradient of the pixel buffer (P, C), by gathering.

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_pixels`; pads that leave no pixel.
    """
    geo.check(grad, slot, cells, n_high, block)
    geo.check_pixels(grad, _padded_rows(slot, n_high, block, left, right, top, bottom))
    rows = geo.stored_pixels(slot, n_high, block)
    pixels = torch.empty((rows, grad.shape[1]), dtype=grad.dtype, device=grad.device)
    if pixels.numel():
        sides = (left, right, top, bottom, bool(replicate))
        kernel = _kernel("blockpad_backward", grad, pixels, slot, n_high, block, sides, 0.0)
        kernel.launch(
            grad.device, grad.data_ptr(), pixels.data_ptr(), slot.data_ptr(), cells.data_ptr()
        )
    return pixels


def _padded_rows(
    slot: Tensor, n_high: int, block: int, left: int, right: int, top: int, bottom: int
) -> int:
    if min(left + right, top + bottom) < -(block // 2):
        raise ValueError(
            f"pads (left, right, top, bottom) = {(left, right, top, bottom)} take more than a "
            f"low block of {block // 2} pixels; crop less or use larger blocks"
        )
    return geo.stored_pixels(slot, n_high, block, top + bottom, left + right)


def _kernel(
    name: str,
    source: Tensor,
    target: Tensor,
    slot: Tensor,
    n_high: int,
    block: int,
    sides: Sides,
    fill: float,
) -> Kernel:
    return _plan(
        name,
        source.get_device(),
        source.dtype,
        tuple(slot.shape),
        source.shape[1],
        n_high,
        block,
        sides,
        repr(fill),  # a NaN is not equal to itself, and would never be found again
        geo.alignment(source.data_ptr(), target.data_ptr()),
        max(source.numel(), target.numel()),
    )


@functools.lru_cache(maxsize=2048)
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
    aligned: int,
    elements: int,
) -> Kernel:
    n_low = grid[0] * grid[1] * grid[2] - n_high
    vector = geo.access_width(dtype.itemsize, aligned, channels) // dtype.itemsize
    asked, name = name, "blockpad" if "normalised" in name else name
    divide = _near if _is_near(name, sides, block // 2) else _any
    d = divide(name, n_high, n_low, channels // vector, block, sides, multiprocessors(device))
    where = geo.place(grid, n_high, block, channels, vector, d.high, d.low, d.items)
    more, pointers, last = {}, 4, []
    if d.file == "blockpad_near.cu":
        more = {"normalised": asked != name, "each": d.each}
    if asked != name:
        pointers, last = 5, [int(asked.endswith("relu"))]
    wide = geo.needs_int64(elements)
    constants = defines(dtype=geo.DTYPES[dtype], vector=vector, index64=wide, **more)
    blocks = n_high * d.high + n_low * d.low
    packed = geo.pack([float(fill)], [*where, *d.integers, *last])
    return prepare(d.file, d.kernel, constants, device, blocks, d.threads, packed, pointers)


@dataclass(frozen=True)
class Division:
    """A kernel, its division of the work, and the end of its `Params`."""

    file: str
    kernel: str
    threads: int
    high: int  # thread blocks per high block
    low: int
    items: int
    integers: list[int]
    each: int = 1  # vectors of a halo that a thread brings


def _is_near(name: str, sides: Sides, half: int) -> bool:
    """Whether the kernels of blockpad_near.cu apply."""
    left, right, top, bottom, replicate = sides
    if replicate or min(left, right, top, bottom) < 0:
        return False
    if name == "blockpad":
        return max(left, right, top, bottom) <= half
    return max(left + right, top + bottom) <= half


def _near(
    name: str, n_high: int, n_low: int, vectors: int, block: int, sides: Sides, processors: int
) -> Division:
    left, right, top, bottom, _ = sides
    threads, shapes, work = 256 if name == "blockpad" else 128, [], 0
    for side, reach, count in ((block, 2, n_high), (block // 2, 1, n_low)):
        if name == "blockpad":
            lines, line = side + top + bottom, side + left + right
            margins = (top, bottom, left, right)
        else:  # the bottom pad of the block above, of a low one twice its rows, and so on
            lines, line = side, side
            margins = (reach * bottom, reach * top, reach * right, reach * left)
        shapes.append((lines, line, margins, vectors))
        work += count * lines * line * vectors
    items = geo.items_per_thread(work, processors)

    def division(each: int) -> Division:
        frames = [geo.frame(*shape, threads * each) for shape in shapes]
        high, low = (geo.frame_chunks(frame, threads * items) for frame in frames)
        kernel = name.replace("blockpad", "blockpad_near")
        integers = [left, right, top, bottom, *frames[0], *frames[1]]
        return Division("blockpad_near.cu", kernel, threads, high, low, items, integers, each)

    one, two = division(1), division(2)
    at_once = _RESIDENT * processors
    blocks, fewer = (n_high * d.high + n_low * d.low for d in (one, two))
    # A second round for a few thread blocks would take as long as the first.
    return two if name == "blockpad" and fewer <= at_once < blocks else one


def _any(
    name: str, n_high: int, n_low: int, vectors: int, block: int, sides: Sides, processors: int
) -> Division:
    left, right, top, bottom, replicate = sides
    half = block // 2
    more_y, more_x = (top + bottom, left + right) if name == "blockpad" else (0, 0)
    row_high, row_low = (block + more_x) * vectors, (half + more_x) * vectors
    work_high, work_low = (block + more_y) * row_high, (half + more_y) * row_low
    items = geo.items_per_thread(n_high * work_high + n_low * work_low, processors)
    high, low = (geo.chunks(work, _THREADS * items) for work in (work_high, work_low))
    integers = [
        *(left, right, top, bottom, int(replicate)),
        *geo.divider(row_high),
        *geo.divider(row_low),
        *geo.divider(block),
        *geo.divider(half),
    ]
    return Division("blockpad.cu", name, _THREADS, high, low, items, integers)
