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
    rows, channels = pixels.shape
    given = [t for t in (mean, variance, weight, bias) if t is not None]
    kinds = {t.dtype for t in given}
    half = pixels.dtype in (torch.float16, torch.bfloat16)
    if not half or channels % 8 or not rows or len(kinds) > 1 or not pixels.is_contiguous():
        return None
    if not kinds <= {pixels.dtype, torch.float32} or not all(t.is_contiguous() for t in given):
        return None
    out = torch.empty_like(pixels)
    kernel = _kernel(
        pixels.dtype, kinds == {pixels.dtype}, pixels.device.index, rows, channels, eps
    )
    tensors = (pixels, mean, variance, weight, bias, out)
    kernel.launch(pixels.device, *(0 if t is None else t.data_ptr() for t in tensors))
    return out


@functools.lru_cache(maxsize=1024)
def _kernel(
    dtype: torch.dtype, half: bool, device: int, rows: int, channels: int, eps: float
) -> Kernel:
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
