"""Launch of the kernels with an image on one side and a pixel buffer on the other (`image.cuh`)."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..library import stored_pixels
from . import geometry as geo
from .module import Kernel, defines, multiprocessors, prepare

_TILE_THREADS = 256
_TILE_PIXELS = 128
_TILE_CHANNELS = 32
_STRIP = 6144  # elements that a thread block writes
_SHARED = 48 << 10  # bytes that any thread block may have
_NO_FRAME = (0,) * 16


@dataclass(frozen=True)
class Case:
    """What a plan depends on. Two calls with equal cases share one."""

    file: str
    kernel: str
    device: int
    dtype: torch.dtype
    grid: tuple[int, int, int]
    channels: int
    n_high: int
    block: int
    strides: tuple[int, int, int, int]  # N, C, H, W in elements; 0 or 1 where the length is 1
    aligned: int
    legacy: bool
    threads: int

    @property
    def half(self) -> int:
        return self.block // 2


@dataclass(frozen=True)
class Variant:
    """One kernel and its work division: the fields of `Params` (image.cuh) that depend on it."""

    kernel: str
    vector: int  # elements per access
    high: int  # thread blocks per high block
    low: int
    threads: int
    copy: int  # bytes per access of the plain copy
    file: str = ""  # if not the kernel's own
    planes: int = 0
    strip: int = 0
    items: int = 1
    row: int = 1
    run: int = 1
    lanes: int = 1
    tile_channels: int = 1
    tile_stride: int = 1
    n_tiles: int = 1
    frame: tuple[int, ...] = _NO_FRAME
    shared: int = 0


def kernel_for(
    file: str,
    kernel: str,
    image: Tensor,
    pixels: Tensor,
    slot: Tensor,
    n_high: int,
    block: int,
    legacy: bool = False,
    threads: int = 128,
) -> Kernel:
    """The variant of `kernel` (without `_rows`, `_planes` or `_tile`) for this image's layout.

    `threads` is the size of a thread block where the channels are adjacent.
    """
    n, c, _, _ = image.shape
    stride_n, stride_c, stride_y, stride_x = image.stride()
    strides = (stride_n if n > 1 else 0, stride_c if c > 1 else 1, stride_y, stride_x)
    aligned = geo.alignment(image.data_ptr(), pixels.data_ptr())
    return _plan(
        file,
        kernel,
        image.get_device(),
        image.dtype,
        tuple(slot.shape),
        c,
        n_high,
        block,
        strides,
        aligned,
        legacy,
        threads,
    )


@functools.lru_cache(maxsize=2048)
def _plan(*case) -> Kernel:
    case = Case(*case)
    n, gh, gw = case.grid
    b, half, c = case.block, case.half, case.channels
    n_low = n * gh * gw - case.n_high
    lengths = (n, c, gh * b, gw * b)
    extent = sum(stride * (length - 1) for stride, length in zip(case.strides, lengths))
    stored = stored_pixels(case.n_high, n_low, b) * c

    v = _planes(case) or _strips(case) or _rows(case) or _tile(case)
    constants = {
        "dtype": geo.DTYPES[case.dtype],
        "vector": v.vector,
        "index64": geo.needs_int64(extent, stored),
        "copy": v.copy,
    }
    if case.kernel.startswith("split"):
        constants["planes"] = v.planes
    else:
        constants["legacy"] = case.legacy
    integers = [
        *geo.place(case.grid, case.n_high, b, c, v.vector, v.high, v.low, v.items),
        *geo.divider(v.row),
        *geo.divider(v.run),
        *geo.divider(b),
        *geo.divider(half),
        *geo.divider(half + 1),
        *(v.lanes, v.tile_channels, v.tile_stride, v.strip),
        *geo.divider(v.n_tiles),
        *geo.divider(v.tile_channels // v.vector),
        *v.frame,
    ]
    return prepare(
        v.file or case.file,
        v.kernel,
        defines(**constants),
        case.device,
        blocks=case.n_high * v.high + n_low * v.low,
        threads=v.threads,
        constants=geo.pack(list(case.strides), integers),
        shared=v.shared,
    )


def _planes(case: Case) -> Variant | None:
    """Split of up to four channels whose columns are adjacent."""
    size = case.dtype.itemsize
    stride_n, stride_c, stride_y, stride_x = case.strides
    vector = 16 // size
    if case.kernel != "split" or case.channels > 4 or stride_x != 1 or case.block % vector:
        return None
    steps = (stride_n, stride_y) if case.channels == 1 else (stride_n, stride_y, stride_c)
    if geo.access_width(size, case.aligned, *steps) < 16:
        return None
    runs = case.block // vector
    return Variant(
        "split_planes",
        vector,
        high=geo.chunks(case.block * runs, _TILE_THREADS),
        low=geo.chunks(case.half * runs, _TILE_THREADS),
        threads=_TILE_THREADS,
        copy=size,
        planes=case.channels,
        run=runs,
    )


def _strips(case: Case) -> Variant | None:
    """Combine of so few or so odd channels that accesses across them would be narrow."""
    size, c, b, half = case.dtype.itemsize, case.channels, case.block, case.half
    stride_n, stride_c, stride_y, stride_x = case.strides
    width = geo.access_width(size, case.aligned, c)
    if case.kernel != "combine" or width == 16:
        return None
    strip = min(b, max(2, _STRIP // (b * c) & ~1))
    out = strip * b * c * size
    around = (strip // 2 + 2) * (half + 2) * c * max(size, 4)
    steps = (stride_n, stride_y) if c == 1 else (stride_n, stride_y, stride_c)
    n_strips = -(-b // strip)
    if stride_x == 1:
        pairs = case.aligned >= 2 * size and not any(step % 2 for step in steps)
        if not pairs or max(out, around) > _SHARED:
            return None
        copy = geo.access_width(size, case.aligned, b * c)
        kernel, high, items, shared = "combine_planes", n_strips, 1, max(out, around)
    elif stride_c == 1 and stride_x == c and width <= 4 and out + around <= _SHARED:
        copy = geo.access_width(size, case.aligned, b * c, stride_n, stride_y)
        n, gh, gw = case.grid
        work = n * gh * gw * b * b * c * size // copy
        items = geo.items_per_thread(work, multiprocessors(case.device))
        high = geo.chunks(b * b * c * size // copy, _TILE_THREADS * items)
        kernel, shared = "combine_narrow", out + around
    else:
        return None
    row = b * c * size // copy
    return Variant(
        kernel,
        1,
        high=high,
        low=n_strips,
        threads=_TILE_THREADS,
        copy=copy,
        file="combine_strips.cu",
        strip=strip,
        items=items,
        row=row,
        run=row,
        shared=shared,
    )


def _rows(case: Case) -> Variant | None:
    """Images whose channels are adjacent."""
    stride_n, stride_c, stride_y, stride_x = case.strides
    if stride_c != 1 or (case.kernel == "combine_backward" and case.half < 2):
        return None
    size, c, b, half = case.dtype.itemsize, case.channels, case.block, case.half
    width = geo.access_width(size, case.aligned, c, stride_n, stride_y, stride_x)
    vectors = c * size // width
    copy = width
    whole_rows = stride_x == c  # then a row of a block is one stretch of the image
    if whole_rows and (case.kernel != "combine_backward" or case.legacy):
        copy = geo.access_width(size, case.aligned, b * c, stride_n, stride_y)
    row = b * c * size // copy

    n, gh, gw = case.grid
    low_work, low_items = half * half * vectors, 1
    if case.kernel == "combine":
        low_work = (half + 1) ** 2 * vectors
    elif case.kernel.startswith("split"):
        low_items = min(4, 16 // width)  # NARROW of split.cu
    work = case.n_high * b * row + (n * gh * gw - case.n_high) * low_work
    items = geo.items_per_thread(work, multiprocessors(case.device))
    high = geo.chunks(b * row, case.threads * items)
    low = geo.chunks(low_work, case.threads * low_items)
    frame = _NO_FRAME
    if case.kernel == "combine_backward":  # pixels at edges apart from the rest
        frame = tuple(geo.frame(half, half, (1, 1, 1, 1), vectors, case.threads))
        low = geo.frame_chunks(frame, case.threads)
        high = high if case.legacy else low
    return Variant(
        f"{case.kernel}_rows",
        width // size,
        high=high,
        low=low,
        threads=case.threads,
        copy=copy,
        items=items,
        row=row,
        run=row if whole_rows else c * size // copy,
        frame=frame,
    )


def _tile(case: Case) -> Variant:
    """Any strides, through tiles in shared memory."""
    size, c, b = case.dtype.itemsize, case.channels, case.block
    width = geo.access_width(size, case.aligned, c)
    vector = width // size
    channels = min(_TILE_CHANNELS, c)
    channels -= channels % vector
    # A thread per pixel and, of small blocks, per channel as well.
    lanes = min(_TILE_PIXELS, 1 << (b * b - 1).bit_length())
    lanes = max(lanes, _TILE_THREADS >> (channels.bit_length() - 1))
    # An odd number of 4-byte words from row to row keeps a column in different banks.
    stride = channels + (2 - channels) % 4 if size == 2 else channels | 1
    side_low = b if case.kernel == "combine" else case.half
    n_tiles = -(-c // channels)
    return Variant(
        f"{case.kernel}_tile",
        vector,
        high=geo.chunks(b * b, lanes) * n_tiles,
        low=geo.chunks(side_low * side_low, lanes) * n_tiles,
        threads=_TILE_THREADS,
        copy=size,
        lanes=lanes,
        tile_channels=channels,
        tile_stride=stride,
        n_tiles=n_tiles,
        shared=lanes * stride * size,
    )
