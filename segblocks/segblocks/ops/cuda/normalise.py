"""Batch norm in evaluation over a pixel buffer, in one launch."""

import functools
import math
import struct

import torch
from torch import Tensor

from .module import Kernel, defines, multiprocessors, prepare

_THREADS = 256


def normalise(
    pixels: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool = False,
) -> Tensor | None:
    """(P, C) float16 or bfloat16 pixels normalised; None where the kernel does not apply.

    Args:
        relu: ReLU behind it.
    """
    kind = kind_of(mean, variance, weight, bias)
    if kind is None or not pixels.is_contiguous():
        return None
    index = pixels.get_device()
    kernel = plan(pixels.dtype, kind, index, *pixels.shape, eps, relu)
    if kernel is None:
        return None
    out = torch.empty_like(pixels)
    kernel.enqueue(
        index,
        pixels.data_ptr(),
        mean.data_ptr(),
        variance.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def kind_of(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None
) -> torch.dtype | None:
    """The one type of all of them; None where they differ or do not lie element by element."""
    kind = mean.dtype
    for t in (mean, variance, weight, bias):
        if t is not None and not (t.dtype is kind and t.is_contiguous()):
            return None
    return kind


@functools.lru_cache(maxsize=1024)
def plan(
    dtype: torch.dtype,
    kind: torch.dtype,
    device: int,
    rows: int,
    channels: int,
    eps: float,
    relu: bool,
    high: tuple[int, int] | None = None,
) -> Kernel | None:
    """The launch for (rows, channels) of `dtype` and statistics of `kind`; None: no kernel.

    Args:
        high: rows of the high blocks and their side, to make an extended buffer. The launch then
            takes one address more, that of the table of the pixels' own rows.
    """
    if dtype not in (torch.float16, torch.bfloat16) or channels % 8 or not rows:
        return None
    if kind not in (dtype, torch.float32):
        return None
    vectors, row = rows * channels // 8, channels // 8
    # A whole number of rows for each stride of the grid.
    unit = row // math.gcd(row, _THREADS)
    wanted = min(-(-vectors // _THREADS), 8 * multiprocessors(device))
    blocks = -(-wanted // unit) * unit
    record, more = struct.pack("q2if", vectors, channels, relu, eps), 0
    if high is not None:
        record += struct.pack("3i", high[0], high[1] // 2, blocks)
        more = -(-(high[0] // 4 + 1) * row // _THREADS)
    options = defines(
        dtype=int(dtype == torch.bfloat16),
        vector=8,
        index64=0,
        statistics_half=kind == dtype,
        extended=high is not None,
    )
    return prepare(
        "normalise.cu",
        "normalise",
        options,
        device,
        blocks + more,
        _THREADS,
        record.ljust(-(-len(record) // 8) * 8, b"\0"),
        pointers=6 if high is None else 7,
    )
