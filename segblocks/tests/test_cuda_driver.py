"""What is handed to the CUDA driver for a launch; a driver that only notes it stands in for it."""

import ctypes
import struct

import pytest
import torch

from segblocks.ops.cuda import launch as launching
from segblocks.ops.cuda.launch import Kernel, launch


class Function:
    """CuPy's handle."""

    ptr = 2**40 + 5


FUNCTION = Function()
DEVICE = torch.device("cuda", 1)


class Driver:
    """Answers with `statuses` in turn, then with success."""

    def __init__(self):
        self.launches, self.statuses, self.contexts = [], [], []

    def cuLaunchKernel(self, function, *rest):
        *shape, stream, arguments, extra = rest
        assert extra is None
        numbers = tuple(n.value for n in shape)
        self.launches.append((function.value, numbers, stream.value, bytes(arguments[0])))
        return self.statuses.pop(0) if self.statuses else 0

    def cuDeviceGet(self, ordinal, device):
        ctypes.cast(ordinal, ctypes.POINTER(ctypes.c_int))[0] = device
        return 0

    def cuDevicePrimaryCtxRetain(self, context, ordinal):
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = 77
        return 0

    def cuCtxSetCurrent(self, context):
        self.contexts.append(context.value)
        return 0

    def cuGetErrorName(self, status, name):
        ctypes.cast(name, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_NAME"
        return 0

    def cuGetErrorString(self, status, text):
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"what it means"
        return 0


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(launching, "driver", lambda: found)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 900 + i, raising=False)
    launching._primary_context.cache_clear()
    yield found
    launching._primary_context.cache_clear()


def test_hands_over_shape_stream_and_parameters(driver):
    constants = struct.pack("2i", -7, 9).rstrip(b"\0") + bytes(3)  # zeros within and behind
    kernel = Kernel(FUNCTION, (6, 2), (256,), 1024, constants, pointers=2)
    kernel.launch(DEVICE, 2**47, 0)
    kernel.launch(DEVICE, 1, 2)
    (function, numbers, stream, _), _ = driver.launches
    assert (function, numbers, stream) == (FUNCTION.ptr, (6, 2, 1, 256, 1, 1, 1024), 901)


def test_parameters_are_passed_whole(monkeypatch, driver):
    """Zero bytes do not end them: the driver reads the struct behind the pointer."""
    seen = []

    def read(function, *rest):
        address = ctypes.cast(rest[-2], ctypes.POINTER(ctypes.c_void_p))[0]
        seen.append(ctypes.string_at(address, 24))
        return 0

    monkeypatch.setattr(driver, "cuLaunchKernel", read)
    constants = struct.pack("2i", 0, 5)
    Kernel(FUNCTION, (1,), (32,), 0, constants, pointers=2).launch(DEVICE, 0, 2**40)
    launch(FUNCTION, (1, 1), (32,), 0, struct.pack("3Q", 1, 0, 3), DEVICE)
    assert seen == [struct.pack("2Q2i", 0, 2**40, 0, 5), struct.pack("3Q", 1, 0, 3)]


def test_wrong_number_of_pointers(driver):
    with pytest.raises(struct.error):
        Kernel(FUNCTION, (1,), (32,), 0, b"", pointers=2).launch(DEVICE, 1)
    assert not driver.launches


def test_refused_launches_raise(driver):
    driver.statuses = [1]
    with pytest.raises(RuntimeError, match="CUDA_ERROR_NAME: what it means"):
        launch(FUNCTION, (1,), (32,), 0, b"", DEVICE)


def test_a_new_thread_enters_the_context(driver):
    driver.statuses = [201]
    launch(FUNCTION, (1,), (32,), 0, b"", DEVICE)
    assert driver.contexts == [77]
    assert len(driver.launches) == 2


def test_another_device_is_made_current(driver, monkeypatch):
    current = [0]

    class Entered:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Entered)
    launch(FUNCTION, (1,), (32,), 0, b"", DEVICE)
    assert len(driver.launches) == 1
    assert current == [0]
