"""Launchers of `windows.cu`."""

import functools
import struct

import torch
from torch import Tensor

from ..windows import Windows
from . import geometry as geo
from .module import Kernel, defines, prepare


def gather_windows(padded: Tensor, *windows) -> Tensor:
    """Padded blocks (P', C) → (P, KH * KW * C), in one launch.

    Raises:
        ValueError: see `Windows.check`; TypeError: a dtype without kernel.
    """
    w = _windows(windows)
    channels = w.check(padded, w.padded_rows)
    out = padded.new_empty((w.rows, w.taps * channels))
    return _run("gather_windows", padded, out, w, channels)


def sum_windows(columns: Tensor, *windows) -> Tensor:
    """The gradient: (P, KH * KW * C) → padded blocks (P', C), in one launch.

    Raises:
        ValueError: see `Windows.check`; TypeError: a dtype without kernel.
    """
    w = _windows(windows)
    channels = w.check(columns, w.rows, w.taps)
    out = columns.new_empty((w.padded_rows, channels))
    return _run("sum_windows", columns, out, w, channels)


def _windows(given: tuple) -> Windows:
    *blocks, kernel, stride, dilation = given
    return Windows(*blocks, tuple(kernel), tuple(stride), tuple(dilation))


def _run(name: str, source: Tensor, out: Tensor, w: Windows, channels: int) -> Tensor:
    if source.dtype not in geo.DTYPES:
        raise TypeError(f"no CUDA kernel for {source.dtype}")
    if out.numel():
        aligned = geo.alignment(source.data_ptr(), out.data_ptr())
        index = source.get_device()
        kernel = _plan(name, index, source.dtype, w, channels, aligned, out.shape[0])
        kernel.enqueue(index, source.data_ptr(), out.data_ptr())
    return out


@functools.lru_cache(maxsize=2048)
def _plan(
    name: str, device: int, dtype: torch.dtype, w: Windows, channels: int, aligned: int, rows: int
) -> Kernel:
    vector = geo.access_width(dtype.itemsize, aligned, channels) // dtype.itemsize
    # A thread block has a row: of all taps, or of one pixel.
    vectors = channels // vector * (w.taps if name == "gather_windows" else 1)
    threads = min(256, -(-vectors // 32) * 32)
    record = struct.pack(
        "12i",
        *(w.n_high, w.block, w.more_y, w.more_x, w.side),
        *(*w.kernel, *w.stride, *w.dilation),
        channels,
    )
    options = defines(dtype=geo.DTYPES[dtype], vector=vector, index64=0)
    return prepare("windows.cu", name, options, device, rows, threads, record, pointers=2)
