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
) -> Kernel | None:
    """The launch for (rows, channels) of `dtype` and statistics of `kind`; None: no kernel."""
    if dtype not in (torch.float16, torch.bfloat16) or channels % 8 or not rows:
        return None
    if kind not in (dtype, torch.float32):
        return None
    vectors, row = rows * channels // 8, channels // 8
    # A whole number of rows for each stride of the grid.
    unit = row // math.gcd(row, _THREADS)
    wanted = min(-(-vectors // _THREADS), 8 * multiprocessors(device))
    half = kind == dtype
    options = defines(dtype=int(dtype == torch.bfloat16), vector=8, index64=0, statistics_half=half)
    return prepare(
        "normalise.cu",
        "normalise",
        options,
        device,
        -(-wanted // unit) * unit,
        _THREADS,
        struct.pack("q2if4x", vectors, channels, relu, eps),
        pointers=6,
    )
