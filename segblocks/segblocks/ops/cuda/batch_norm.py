"""Launchers of `batch_statistics.cu`, `batch_join.cu`, `batch_gradient_sums.cu` and
`batch_normalise*.cu`."""

import functools
import itertools
import math
import struct

import torch
from torch import Tensor

from . import geometry as geo
from .module import Kernel, defines, multiprocessors, prepare

_THREADS, _STREAMS, _TILES = 256, 64, 512  # of columns.cuh
# Bytes of a row that a thread block takes. The fewer its columns, the more threads join each in the
# end, which nobody else can help with; less than this would waste parts of memory transactions.
_ACROSS = 64
_JOINED = 64  # threads of a thread block of batch_join, a channel each
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_MASK, FROM_INPUT, FROM_OUTPUT = 0, 1, 2  # SB_MASK

# Numbers of the streams of each device: launches on different ones may run at the same time, and
# count their thread blocks apart.
_streams: dict[tuple[int, int], int] = {}
_numbers = itertools.count()


def batch_statistics(
    pixels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Pixels (P, C) → table (4, C) float32 of their batch norm, in one launch.

    Raises:
        TypeError, ValueError: dtypes, shapes or layouts that do not fit.
    """
    rows, channels = _check(pixels)
    if rows < 2 and running_var is not None:
        raise ValueError("one row has no unbiased variance to move running_var towards")
    given = (weight, bias, running_mean, running_var)
    for tensor in given:
        check_row(tensor, pixels, (channels,))
    table = torch.empty((4, channels), dtype=torch.float32, device=pixels.device)
    index = pixels.get_device()
    aligned = geo.alignment(pixels.data_ptr())
    settings = (float(momentum), float(eps))
    name = "batch_statistics"
    kernel, parts = _columns(name, index, pixels.dtype, rows, channels, aligned, NO_MASK, settings)
    partials = torch.empty(2 * parts * channels, dtype=torch.float32, device=pixels.device)
    kernel.enqueue(
        index,
        pixels.data_ptr(),
        *(address(tensor) for tensor in given),
        table.data_ptr(),
        partials.data_ptr(),
        _stream(pixels),
    )
    mark_changed(running_mean, running_var)
    return table


def batch_join(
    tables: Tensor,
    rows: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Tables (W, 4, C) float32 → that of all their pixels (4, C), and the share of `rows`, 0-d.

    Raises:
        ValueError: dtypes, shapes or layouts that do not fit.
    """
    processes, _, channels = tables.shape
    check_row(tables, tables, (processes, 4, channels))
    given = (weight, bias, running_mean, running_var)
    for tensor in given:
        check_row(tensor, tables, (channels,))
    table, share = tables.new_empty((4, channels)), tables.new_empty(())
    index = tables.get_device()
    kernel = _join(index, processes, channels, (float(rows), float(momentum), float(eps)))
    kernel.enqueue(
        index,
        tables.data_ptr(),
        *(address(tensor) for tensor in given),
        table.data_ptr(),
        share.data_ptr(),
    )
    mark_changed(running_mean, running_var)
    return table, share


def batch_normalise(pixels: Tensor, table: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
    """Pixels (P, C) → what a batch norm makes of them, plus the addend, and a ReLU: (P, C).

    Raises:
        TypeError, ValueError: dtypes, shapes or layouts that do not fit.
    """
    rows, channels = _check(pixels, addend)
    check_row(table, pixels, (4, channels))
    out = torch.empty_like(pixels)
    index = pixels.get_device()
    pointers = [pixels.data_ptr(), table.data_ptr(), address(addend), out.data_ptr()]
    aligned = geo.alignment(pointers[0], *pointers[2:])
    name = "batch_normalise"
    kernel = _pointwise(name, index, pixels.dtype, rows, channels, aligned, NO_MASK, bool(relu))
    kernel.enqueue(index, *pointers)
    return out


def batch_gradient_sums(
    grad: Tensor, pixels: Tensor, table: Tensor, output: Tensor | None, relu: bool
) -> Tensor:
    """Gradient (P, C) of what `batch_normalise` made → those of bias and weight, (2, C) float32.

    Raises:
        TypeError, ValueError: dtypes, shapes or layouts that do not fit.
    """
    rows, channels = _check(grad, pixels, output)
    check_row(table, pixels, (4, channels))
    sums = torch.empty((2, channels), dtype=torch.float32, device=grad.device)
    index = grad.get_device()
    pointers = [grad.data_ptr(), pixels.data_ptr(), address(output)]
    aligned, mask = geo.alignment(*pointers), _mask(output, relu)
    name = "batch_gradient_sums"
    kernel, parts = _columns(name, index, grad.dtype, rows, channels, aligned, mask)
    partials = torch.empty(2 * parts * channels, dtype=torch.float32, device=grad.device)
    kernel.enqueue(
        index,
        *pointers[:2],
        table.data_ptr(),
        pointers[2],
        sums.data_ptr(),
        partials.data_ptr(),
        _stream(grad),
    )
    return sums


def batch_normalise_backward(
    grad: Tensor,
    pixels: Tensor,
    table: Tensor,
    sums: Tensor,
    output: Tensor | None,
    relu: bool,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient (P, C) of what `batch_normalise` made → those of the pixels and, if `masked`, of the
    addend (else empty), (P, C).

    Raises:
        TypeError, ValueError: dtypes, shapes or layouts that do not fit.
    """
    rows, channels = _check(grad, pixels, output)
    check_row(table, pixels, (4, channels))
    check_row(sums, pixels, (2, channels))
    for_pixels = torch.empty_like(pixels)
    for_addend = torch.empty_like(pixels) if masked else pixels.new_empty(0)
    index = grad.get_device()
    maps = [grad.data_ptr(), pixels.data_ptr(), address(output), for_pixels.data_ptr()]
    maps.append(for_addend.data_ptr() if masked else 0)
    aligned, mask = geo.alignment(*maps), _mask(output, relu)
    name = "batch_normalise_backward"
    kernel = _pointwise(name, index, grad.dtype, rows, channels, aligned, mask)
    kernel.enqueue(index, *maps[:2], table.data_ptr(), sums.data_ptr(), *maps[2:])
    return for_pixels, for_addend


def _check(pixels: Tensor, *others: Tensor | None) -> tuple[int, int]:
    """P and C."""
    if pixels.dtype not in _DTYPES:
        raise TypeError(f"no CUDA kernel for {pixels.dtype}; use float16, bfloat16 or float32")
    if pixels.dim() != 2 or not pixels.numel():
        raise ValueError(
            f"pixels must be (P, C) with at least a row and a channel; got {tuple(pixels.shape)}"
        )
    for tensor in (pixels, *others):
        if tensor is None:
            continue
        if (tensor.dtype, tensor.shape, tensor.device) != (
            pixels.dtype,
            pixels.shape,
            pixels.device,
        ):
            raise ValueError(
                f"pixels of {pixels.dtype} {tuple(pixels.shape)} on {pixels.device} do not go with "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"pixel buffer must be contiguous; got strides {tensor.stride()}")
    return tuple(pixels.shape)


def check_row(tensor: Tensor | None, pixels: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a batch norm's table or weight is as kernels read it, or None."""
    if tensor is None:
        return
    if tensor.dtype != torch.float32 or tensor.shape != shape or tensor.device != pixels.device:
        raise ValueError(
            f"what belongs to a batch norm must be float32, {shape} and on {pixels.device}; got "
            f"{tensor.dtype}, {tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous() or (tensor.dim() == 2 and tensor.data_ptr() % 16):
        raise ValueError("tables and weights of a batch norm must be contiguous and aligned")


def _mask(output: Tensor | None, relu: bool) -> int:
    return NO_MASK if not relu else FROM_INPUT if output is None else FROM_OUTPUT


def address(tensor: Tensor | None) -> int:
    """Of its numbers; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def mark_changed(*tensors: Tensor | None) -> None:
    """Tell autograd that a kernel has written to them."""
    changed = [tensor for tensor in tensors if tensor is not None]
    if changed:
        torch.autograd.graph.increment_version(changed)


def _stream(x: Tensor) -> int:
    """A number below _STREAMS; not a pointer, but as wide as one."""
    index = x.get_device()
    stream = (index, torch._C._cuda_getCurrentRawStream(index) if x.is_cuda else 0)
    found = _streams.get(stream)
    if found is None:
        found = _streams.setdefault(stream, next(_numbers) % _STREAMS)
    return found


@functools.lru_cache(maxsize=2048)
def _columns(
    name: str,
    device: int,
    dtype: torch.dtype,
    rows: int,
    channels: int,
    aligned: int,
    mask: int,
    settings: tuple[float, ...] = (),
) -> tuple[Kernel, int]:
    """The launch of a kernel over columns.cuh, and its thread blocks for the same columns."""
    vector = geo.access_width(dtype.itemsize, aligned, channels) // dtype.itemsize
    vectors = channels // vector
    tiles = -(-vectors * vector * dtype.itemsize // _ACROSS)
    width = -(-vectors // tiles)
    tiles = -(-vectors // width)
    if tiles > _TILES:
        raise ValueError(f"{channels} channels are too many for a batch norm of blocks")
    lines = _THREADS // width
    unit = 4 * lines  # rows that a thread block takes at once
    wanted = max(1, 3 * multiprocessors(device) // tiles)
    per_block = -(-rows // (wanted * unit)) * unit
    parts = -(-rows // per_block)
    record = struct.pack("2q4i", rows, per_block, channels, width, lines, 0)
    record += struct.pack(f"{len(settings)}d", *settings)
    options = defines(dtype=geo.DTYPES[dtype], vector=vector, index64=0, mask=mask)
    pointers = 8 if name == "batch_statistics" else 7
    kernel = prepare(
        f"{name}.cu", name, options, device, parts, _THREADS, record, pointers, rows=tiles
    )
    return kernel, parts


@functools.lru_cache(maxsize=2048)
def _join(
    device: int, processes: int, channels: int, settings: tuple[float, float, float]
) -> Kernel:
    record = struct.pack("2i3d", processes, channels, *settings)
    options = defines(dtype=geo.DTYPES[torch.float32], vector=1, index64=0, mask=NO_MASK)
    blocks = -(-channels // _JOINED)
    return prepare("batch_join.cu", "batch_join", options, device, blocks, _JOINED, record, 7)


@functools.lru_cache(maxsize=2048)
def _pointwise(
    name: str,
    device: int,
    dtype: torch.dtype,
    rows: int,
    channels: int,
    aligned: int,
    mask: int,
    relu: bool = False,
) -> Kernel:
    vector = geo.access_width(dtype.itemsize, aligned, channels) // dtype.itemsize
    row = channels // vector
    vectors = rows * row
    # A whole number of rows for each stride of the grid.
    unit = row // math.gcd(row, _THREADS)
    wanted = min(-(-vectors // _THREADS), 8 * multiprocessors(device))
    blocks = -(-wanted // unit) * unit
    if name == "batch_normalise":
        record, pointers = struct.pack("q2i", vectors, channels, relu), 4
    else:
        record, pointers = struct.pack("qif", vectors, channels, 1 / rows), 7
    options = defines(dtype=geo.DTYPES[dtype], vector=vector, index64=0, mask=mask)
    return prepare(f"{name}.cu", name, options, device, blocks, _THREADS, record, pointers)
