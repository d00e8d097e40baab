"""Launches compiled kernels on PyTorch's current stream, through the CUDA driver itself.

At batch 1 a kernel takes about as long as its launch does, so this is written for few steps. A
kernel has one parameter, a struct passed by value: pointers first, then what a shape fixes.
"""

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from . import overlap

_SUCCESS, _INVALID_CONTEXT, _CONTEXT_IS_DESTROYED = 0, 201, 709
_MOST_STREAMS = 64  # that a kernel is ready for


class Kernel:
    """A compiled kernel with everything about a launch that does not change between calls.

    Args:
        function: CuPy's handle of the kernel on one device.
        grid, block: numbers of thread blocks and of threads in each, one to three.
        shared: dynamic shared memory in bytes.
        constants: the kernel's parameter struct after its pointers.
        pointers: how many pointers that struct starts with.
        follows: whether the kernel calls `follow` (follow.cuh), so that it may be launched before
            the one ahead of it has finished, where `overlap.overlapping` asks for that.

    Attributes:
        pack: addresses → the bytes ahead of `constants`; shape, handle, ready: for `put`.
    """

    __slots__ = ("_follows", "_function", "constants", "handle", "pack", "ready", "shape")

    def __init__(
        self,
        function: Any,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared: int,
        constants: bytes,
        pointers: int = 0,
        follows: bool = False,
    ):
        self._follows = follows
        self._function = function  # keeps its module loaded
        self.shape = _shape(function, grid, block, shared)
        self.handle = self.shape[0]
        self.ready: dict[int, Any] = {}  # by stream
        self.constants = constants
        self.pack = struct.Struct(f"<{pointers}Q").pack

    def launch(self, device: torch.device, *pointers: int) -> None:
        """Enqueue on PyTorch's current stream of `device`.

        Raises:
            RuntimeError: the driver refused the launch.
        """
        _enqueue(self.shape, self.pack(*pointers) + self.constants, device.index, self._follows)

    def enqueue(self, index: int, *pointers: int) -> None:
        """`launch` on the device of this index, never before the kernel ahead has finished."""
        put(self, self.pack(*pointers) + self.constants, index)

    def configure(self, stream: int) -> Any:
        """The first argument of cuLaunchKernelEx on a stream; None where the driver has none."""
        if not hasattr(driver(), "cuLaunchKernelEx"):
            return None
        if len(self.ready) >= _MOST_STREAMS:
            self.ready.clear()
        found = self.ready[stream] = ctypes.byref(overlap.configuration(self.shape[1:], stream))
        return found


def launch(
    function: Any,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    shared: int,
    parameters: bytes,
    device: torch.device,
    follows: bool = False,
) -> None:
    """Enqueue a kernel once; arguments as of `Kernel`, `parameters` the whole struct."""
    _enqueue(_shape(function, grid, block, shared), parameters, device.index, follows)


def can_overlap(device: torch.device) -> bool:
    """Whether launches on `device` may overlap in a CUDA graph; not with SEGBLOCKS_OVERLAP=0."""
    if device.type != "cuda" or os.environ.get("SEGBLOCKS_OVERLAP") == "0":
        return False
    version = ctypes.c_int()
    known = hasattr(driver(), "cuLaunchKernelEx")
    known = known and driver().cuDriverGetVersion(ctypes.byref(version)) == _SUCCESS
    recent = known and version.value >= overlap.OLDEST_DRIVER
    return recent and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(maxsize=4096)
def _shape(function: Any, grid: tuple, block: tuple, shared: int) -> tuple:
    """The first arguments of cuLaunchKernel."""
    grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
    return (ctypes.c_void_p(function.ptr), *map(ctypes.c_uint, (*grid, *block, shared)))


class _Parameters(threading.local):
    """What cuLaunchKernel takes its parameters from, for each thread its own."""

    def __init__(self) -> None:
        self.pointers = (ctypes.c_char_p * 1)()


_parameters = _Parameters()


def put(kernel: Kernel, parameters: bytes, index: int) -> None:
    """`Kernel.enqueue` with the whole struct. Four arguments for the driver take 0.4 µs less than
    the eleven of cuLaunchKernel.
    """
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return put(kernel, parameters, index)
    stream = torch._C._cuda_getCurrentRawStream(index)
    ready = kernel.ready.get(stream) or kernel.configure(stream)
    if ready is None:
        return _enqueue(kernel.shape, parameters, index)
    pointers = _parameters.pointers
    pointers[0] = parameters
    launch_kernel = driver().cuLaunchKernelEx
    status = launch_kernel(ready, kernel.handle, pointers, None)
    if status:
        _try_again(status, index, launch_kernel, ready, kernel.handle, pointers, None)


def _enqueue(shape: tuple, parameters: bytes, index: int, follows: bool = False) -> None:
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return _enqueue(shape, parameters, index, follows)
    stream = torch._C._cuda_getCurrentRawStream(index)
    pointers = _parameters.pointers
    pointers[0] = parameters
    launch_kernel = driver().cuLaunchKernel
    if follows and overlap.is_wanted():
        launch_kernel = overlap.launcher(driver())
    arguments = (*shape, ctypes.c_void_p(stream), pointers, None)
    status = launch_kernel(*arguments)
    if status:
        _try_again(status, index, launch_kernel, *arguments)


def _try_again(status: int, index: int, launch_kernel: Callable[..., int], *arguments: Any) -> None:
    """After a launch that failed with `status`, which a thread's first CUDA call may."""
    if status in (_INVALID_CONTEXT, _CONTEXT_IS_DESTROYED):
        _bind_context(index)
        status = launch_kernel(*arguments)
    if status != _SUCCESS:
        raise RuntimeError(f"CUDA could not launch a kernel: {_describe(status)}")


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver, which PyTorch has loaded by the time that a CUDA tensor exists."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _bind_context(device: int) -> None:
    """Make the context that PyTorch uses current in this thread; allowed while capturing."""
    _check(driver().cuCtxSetCurrent(_primary_context(device)), device)


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """Retained for as long as the process lives, as PyTorch does."""
    ordinal, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver().cuDeviceGet(ctypes.byref(ordinal), device), device)
    _check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal), device)
    return context


def _check(status: int, device: int) -> None:
    if status != _SUCCESS:
        raise RuntimeError(f"CUDA could not enter device {device}: {_describe(status)}")


def _describe(status: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    driver().cuGetErrorName(status, ctypes.byref(name))
    driver().cuGetErrorString(status, ctypes.byref(text))
    if not name.value or not text.value:
        return f"error {status}"
    return f"{name.value.decode()}: {text.value.decode()}"
