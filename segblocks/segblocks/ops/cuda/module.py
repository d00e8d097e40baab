"""Compiles the `.cu` files beside this one with CuPy; `launch.py` launches them.

A file is compiled by NVRTC once per set of compile-time constants (element type, access width,
index width, ...); shapes are arguments. CuPy keeps the binary in its disk cache (`CUPY_CACHE_DIR`),
so another process only loads it. The sources include no CUDA header, so no toolkit is needed.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .launch import Kernel

_FOLDER = Path(__file__).parent
# Kernels that call `follow` (follow.cuh), and so may be launched before the one ahead has finished.
FOLLOWING = frozenset(
    """averages begin block_conv build_patches build_tables combine_narrow combine_planes
    combine_rows combine_tile depthwise max_pool patch_conv policy_first policy_scores pooled_conv
    small_conv split_extended split_padded stem_conv""".split()
)
# Shared memory of a multiprocessor of an A100, in bytes; most others of its time have 100 KiB.
MUCH_SHARED = 164 << 10
_SHARED_UNASKED = 48 * 1024  # bytes of shared memory that a kernel may use without asking


def prepare(
    file: str,
    kernel: str,
    options: tuple[str, ...],
    device: int,
    blocks: int,
    threads: int,
    constants: bytes,
    pointers: int = 4,
    shared: int = 0,
    rows: int = 1,
) -> Kernel:
    """Compile (or find) `kernel` of `file` and fix its launch. Keep the result; this is slow.

    Raises:
        ValueError: more thread blocks than one launch can have.
    """
    if blocks >= 2**31:
        raise ValueError(
            f"{kernel} would need {blocks} thread blocks; split the batch (limit 2^31)"
        )
    handle = function(file, kernel, options, device, shared)
    follows = kernel in FOLLOWING
    return Kernel(handle, (blocks, rows), (threads,), shared, constants, pointers, follows)


@functools.cache
def source(file: str) -> str:
    """The text of a `.cu` file with its headers in place, so that caches see every change."""
    seen = set()

    def expand(match: re.Match) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        return read(name)

    def read(name: str) -> str:
        text = (_FOLDER / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'#include "(\w+\.cuh)"\n', expand, text)

    return read(file)


def defines(**constants: int) -> tuple[str, ...]:
    """Compiler options that set the compile-time constants `SB_<NAME>`."""
    return ("-std=c++17", *(f"-DSB_{name.upper()}={int(v)}" for name, v in constants.items()))


@functools.cache
def function(file: str, kernel: str, options: tuple[str, ...], device: int, shared: int = 0) -> Any:
    """CuPy's handle of a kernel, loaded on one device and allowed `shared` bytes of its memory."""
    cupy = import_cupy()
    with cupy.cuda.Device(device):
        raw = _raw_module(file, options).get_function(kernel)
        if shared > _SHARED_UNASKED:
            raw.max_dynamic_shared_size_bytes = shared
        return raw.kernel


@functools.cache
def _raw_module(file: str, options: Sequence[str]) -> Any:
    return import_cupy().RawModule(code=source(file), options=options)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory of a multiprocessor."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def import_cupy() -> ModuleType:
    """CuPy, or an error that names the package to install."""
    try:
        import cupy
    except ImportError as error:
        version = (torch.version.cuda or "13").split(".")[0]
        raise ImportError(
            f"blocks on CUDA tensors need CuPy: pip install cupy-cuda{version}x "
            f"(PyTorch was built for CUDA {torch.version.cuda}); cause: {error}"
        ) from error
    return cupy
