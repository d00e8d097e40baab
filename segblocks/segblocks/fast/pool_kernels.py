"""Launches of pool.cu for eager operations: max pooling, and averages beside a buffer."""

import functools
import struct
from typing import Any

import torch

from ..ops.cuda.launch import Kernel
from ..ops.cuda.module import prepare
from .tables import Scale


@functools.lru_cache(maxsize=1024)
def averages_kernel(dtype: torch.dtype, device: int, high_rows: int, channels: int) -> Kernel:
    """The launch for addresses of pixels, of the table of their own rows, and of the output."""
    blocks = -(-(high_rows // 4 + 1) * channels // 8 // 256)
    constants = struct.pack("2i", high_rows, channels)
    return _pool_file("averages", dtype, device, blocks, constants, 3)


@functools.lru_cache(maxsize=1024)
def pool_kernel(
    dtype: torch.dtype, device: int, source: Scale, scale: Scale, channels: int
) -> Kernel:
    """The launch for addresses of pixels, both tables, the output, and averages of the pixels."""
    sizes = (source.zero, scale.rows, scale.high_rows, scale.block, scale.pitch, channels)
    constants = struct.pack("8i", *sizes, source.rows, 0)
    blocks = -(-(-(-scale.rows // 4) * channels // 8) // 256)
    return _pool_file("max_pool", dtype, device, blocks, constants, 5, SEPARATE=1)


def _pool_file(
    name: str,
    dtype: torch.dtype,
    device: int,
    blocks: int,
    constants: bytes,
    pointers: int,
    **more: int,
) -> Kernel:
    settings: dict[str, Any] = {"DTYPE": dtype == torch.bfloat16, "VECTOR": 8, "INDEX64": 0, **more}
    options = ("-std=c++17", *(f"-DSB_{name}={int(value)}" for name, value in settings.items()))
    return prepare("pool.cu", name, options, device, blocks, 256, constants, pointers)
