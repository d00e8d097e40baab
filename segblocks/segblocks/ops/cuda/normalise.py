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
) -> Tensor | None:
    """(P, C) float16 or bfloat16 pixels normalised; None where the kernel does not apply."""
    given = (mean, variance) if weight is None else (mean, variance, weight)
    if bias is not None:
        given += (bias,)
    kinds = tuple([t.dtype for t in given])
    kernel = _kernel(pixels.dtype, kinds, pixels.get_device(), *pixels.shape, eps)
    if kernel is None or not pixels.is_contiguous():
        return None
    for t in given:
        if not t.is_contiguous():
            return None
    out = torch.empty_like(pixels)
    kernel.launch(
        pixels.device,
        pixels.data_ptr(),
        mean.data_ptr(),
        variance.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


@functools.lru_cache(maxsize=1024)
def _kernel(
    dtype: torch.dtype,
    kinds: tuple[torch.dtype, ...],
    device: int,
    rows: int,
    channels: int,
    eps: float,
) -> Kernel | None:
    half = kinds[0] == dtype
    if dtype not in (torch.float16, torch.bfloat16) or channels % 8 or not rows:
        return None
    if len(set(kinds)) > 1 or kinds[0] not in (dtype, torch.float32):
        return None
    vectors, row = rows * channels // 8, channels // 8
    # A whole number of rows for each stride of the grid.
    unit = row // math.gcd(row, _THREADS)
    wanted = min(-(-vectors // _THREADS), 8 * multiprocessors(device))
    options = defines(dtype=int(dtype == torch.bfloat16), vector=8, index64=0, statistics_half=half)
    return prepare(
        "normalise.cu",
        "normalise",
        options,
        device,
        -(-wanted // unit) * unit,
        _THREADS,
        struct.pack("qif", vectors, channels, eps),
        pointers=6,
    )
