"""Programmatic dependent launch: a kernel starts while the one ahead of it still runs.

What it does not read from others (barriers, weights) is then ready by the time that the other has
finished, which `follow()` of `follow.cuh` waits for. Between kernels of a few microseconds that is
worth more than anything in them.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# Captured as an edge of its own kind since CUDA 12.3.
OLDEST_DRIVER = 12030


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, with the one kind of value that is used here."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("others", ctypes.c_char * 60),  # a union of 64 bytes
    )


class Configuration(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


_ALLOWED = (Attribute * 1)(Attribute(id=_SERIALIZATION, value=1))


class _State(threading.local):
    wanted = False


_STATE = _State()


@contextlib.contextmanager
def overlapping(wanted: bool = True) -> Iterator[None]:
    """Inside it, kernels of this thread that `follow` may start before the one ahead has finished.

    Ask `launch.can_overlap` first. What other libraries launch in between stays in line.
    """
    before, _STATE.wanted = _STATE.wanted, wanted
    try:
        yield
    finally:
        _STATE.wanted = before


def is_wanted() -> bool:
    return _STATE.wanted


def launcher(driver: Any) -> Callable[..., int]:
    """With the arguments of cuLaunchKernel, a launch that may overlap with the one ahead."""

    def launch(function: ctypes.c_void_p, *rest: Any) -> int:
        *shape, stream, arguments, extra = rest
        found = configuration(shape, stream)
        found.attributes, found.count = _ALLOWED, 1
        return driver.cuLaunchKernelEx(ctypes.byref(found), function, arguments, extra)

    return launch


def configuration(shape: Sequence[ctypes.c_uint], stream: int | ctypes.c_void_p) -> Configuration:
    """A launch that does not overlap; `shape`: grid, block and shared memory for cuLaunchKernel."""
    numbers = [n.value for n in shape]
    return Configuration(
        grid=tuple(numbers[:3]), block=tuple(numbers[3:6]), shared=numbers[6], stream=stream
    )
