"""Depthwise convolutions of both resolutions in one launch, for the fused steps of a network."""

import functools
import math

import torch
from torch import Tensor

from ..grid import BlockGrid
from ..ops.cuda import geometry as geo
from ..ops.cuda.launch import Kernel
from ..ops.cuda.module import defines, prepare

_THREADS, _WIDTH = 128, 4  # of depthwise.cu


def pack_depthwise(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, 1, K, K) → (K·K, C), as the kernel reads them."""
    return weight.flatten(1).t().to(dtype).contiguous()


def convolve_depthwise(
    pixels: Tensor,
    weights: Tensor,
    bias: Tensor,
    out: Tensor,
    grid: BlockGrid,
    block: int,
    stride: int,
    limit: float | None,
) -> None:
    """Enqueue one depthwise convolution with padding K // 2; see depthwise.cu.

    Args:
        pixels: (P or more, C) float16 or bfloat16, C a multiple of 8: blocks with sides of `block`.
        weights: from `pack_depthwise`; bias: (C,) float32.
        out: (P' or more, C): blocks with sides of block / stride.
        limit: upper one of a ReLU, infinite for a plain one; None: no ReLU.
    """
    channels, kernel = pixels.shape[1], math.isqrt(weights.shape[0])
    asked = (tuple(grid.mask.shape), grid.n_high, block, channels, kernel, stride, limit)
    device = pixels.get_device()
    _plan(pixels.dtype, device, *asked, max(pixels.numel(), out.numel())).launch(
        pixels.device,
        *(t.data_ptr() for t in (pixels, weights, bias, out, grid.slot, grid.cells)),
    )


@functools.lru_cache(maxsize=2048)
def _plan(
    dtype: torch.dtype,
    device: int,
    grid: tuple[int, int, int],
    n_high: int,
    block: int,
    channels: int,
    kernel: int,
    stride: int,
    limit: float | None,
    elements: int,
) -> Kernel:
    vector = 16 // dtype.itemsize
    made = (block // stride, block // 2 // stride)  # sides of a high and of a low block
    strips = [-(-side // _WIDTH) for side in made]
    vectors = channels // vector
    high, low = (geo.chunks(a * b * vectors, _THREADS) for a, b in zip(made, strips))
    relu = 0 if limit is None else 1 if limit == math.inf else 2
    options = defines(
        dtype=geo.DTYPES[dtype],
        vector=vector,
        index64=geo.needs_int64(elements),
        kernel=kernel,
        stride=stride,
        relu=relu,
    )
    place = geo.place(grid, n_high, block, channels, vector, high, low)
    integers = [*place, *geo.divider(strips[0]), *geo.divider(strips[1])]
    constants = geo.pack([float(limit) if relu == 2 else 0.0], integers)
    blocks = n_high * high + (math.prod(grid) - n_high) * low
    return prepare("depthwise.cu", "depthwise", options, device, blocks, _THREADS, constants, 6)
