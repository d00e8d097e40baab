"""Launcher of `turn_weight.cu`."""

import functools
import struct

import torch
from torch import Tensor

from .. import reference
from . import geometry as geo
from .module import Kernel, defines, prepare

_TILE, _THREADS = 32, 256


def turn_weight(weight: Tensor) -> Tensor:
    """(O, I, KH, KW) → (I, O, KH, KW), taps reversed, channels_last; in one launch where the weight
    is contiguous or channels_last."""
    outputs, inputs, height, width = weight.shape
    last = weight.is_contiguous(memory_format=torch.channels_last)
    suits = (weight.is_contiguous() or last) and weight.dtype in geo.DTYPES
    if not suits or not 0 < weight.numel() < 2**31:
        return reference.turn_weight(weight)
    out = torch.empty(
        (inputs, outputs, height, width),
        dtype=weight.dtype,
        device=weight.device,
        memory_format=torch.channels_last,
    )
    index, last = weight.get_device(), not weight.is_contiguous()
    kernel = _plan(index, weight.dtype, outputs, inputs, height * width, last)
    kernel.enqueue(index, weight.data_ptr(), out.data_ptr())
    return out


@functools.lru_cache(maxsize=1024)
def _plan(
    device: int, dtype: torch.dtype, outputs: int, inputs: int, taps: int, last: bool
) -> Kernel:
    options = defines(dtype=geo.DTYPES[dtype], vector=1, index64=0, last=last)
    record = struct.pack("4i", outputs, inputs, taps, 0)
    blocks, rows = -(-inputs * taps // _TILE), -(-outputs // _TILE)
    return prepare(
        "turn_weight.cu", "turn_weight", options, device, blocks, _THREADS, record, 2, rows=rows
    )
