"""What is handed to the CUDA driver for a launch; a driver that only notes it stands in for it."""

import ctypes
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from segblocks.ops.cuda import launch as launching
from segblocks.ops.cuda import overlap
from segblocks.ops.cuda.launch import Kernel, can_overlap, launch
from segblocks.ops.cuda.overlap import overlapping


class Function:
    """CuPy's handle."""

    ptr = 2**40 + 5


FUNCTION = Function()
DEVICE = torch.device("cuda", 1)


class Driver:
    """Answers with `statuses` in turn, then with success."""

    def __init__(self):
        self.launches, self.statuses, self.contexts = [], [], []
        self.overlapping, self.version = [], 13000

    def cuLaunchKernel(self, function, *rest):
        *shape, stream, arguments, extra = rest
        assert extra is None
        numbers = tuple(n.value for n in shape)
        self.launches.append((function.value, numbers, stream.value, bytes(arguments[0])))
        return self.statuses.pop(0) if self.statuses else 0

    def cuLaunchKernelEx(self, configuration, function, arguments, extra):
        assert extra is None
        c = ctypes.cast(configuration, ctypes.POINTER(overlap.Configuration))[0]
        attributes = [(a.id, a.value) for a in c.attributes[: c.count]]
        numbers = (*c.grid, *c.block, c.shared)
        self.overlapping.append((function.value, numbers, c.stream, attributes))
        self.launches.append(bytes(arguments[0]))
        return self.statuses.pop(0) if self.statuses else 0

    def cuDriverGetVersion(self, version):
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = self.version
        return 0

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


# -- launches that overlap -------------------------------------------------------------------------


def test_an_overlapping_launch_says_so(driver):
    kernel = Kernel(FUNCTION, (6, 2), (256,), 1024, struct.pack("2i", 3, 4), 1, follows=True)
    kernel.launch(DEVICE, 9)
    assert not driver.overlapping
    with overlapping():
        kernel.launch(DEVICE, 9)
        launch(FUNCTION, (5,), (32, 2), 0, b"abcd", DEVICE, follows=True)
    first, second = driver.overlapping
    assert first == (FUNCTION.ptr, (6, 2, 1, 256, 1, 1, 1024), 901, [(6, 1)])
    assert second == (FUNCTION.ptr, (5, 1, 1, 32, 2, 1, 0), 901, [(6, 1)])
    assert driver.launches[2] == b"abcd"


def test_only_kernels_that_wait_overlap(driver):
    with overlapping():
        Kernel(FUNCTION, (1,), (32,), 0, b"").launch(DEVICE)
        launch(FUNCTION, (1,), (32,), 0, b"", DEVICE)
    assert not driver.overlapping
    assert len(driver.launches) == 2


def test_overlap_is_asked_for_by_thread_and_ends(driver):
    def run():
        launch(FUNCTION, (1,), (32,), 0, b"", DEVICE, follows=True)

    def fail():
        with overlapping():
            raise KeyError

    with overlapping():
        other = threading.Thread(target=run)
        other.start()
        other.join()
        assert not driver.overlapping
        with overlapping(False):
            run()
        assert not driver.overlapping
        run()
        assert len(driver.overlapping) == 1
    with pytest.raises(KeyError):
        fail()
    run()
    assert len(driver.overlapping) == 1


def test_a_refused_overlapping_launch_raises(driver):
    driver.statuses = [201, 1]
    with overlapping(), pytest.raises(RuntimeError, match="CUDA_ERROR_NAME: what it means"):
        launch(FUNCTION, (1,), (32,), 0, b"", DEVICE, follows=True)
    assert driver.contexts == [77]


def test_where_launches_can_overlap(driver, monkeypatch):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.delenv("SEGBLOCKS_OVERLAP", raising=False)
    assert can_overlap(DEVICE)
    assert not can_overlap(torch.device("cpu"))
    monkeypatch.setenv("SEGBLOCKS_OVERLAP", "0")
    assert not can_overlap(DEVICE)
    monkeypatch.setenv("SEGBLOCKS_OVERLAP", "1")
    assert can_overlap(DEVICE)
    capability[0] = (8, 9)
    assert not can_overlap(DEVICE)
    capability[0] = (9, 0)
    driver.version = 12020
    assert not can_overlap(DEVICE)
    driver.version = 12030
    assert can_overlap(DEVICE)
    monkeypatch.delattr(Driver, "cuLaunchKernelEx")
    assert not can_overlap(DEVICE)


LAYOUT = """
#include <stddef.h>
#include <stdio.h>
#include <cuda.h>
int main() {
    printf("%d %zu %zu %zu ", CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
           sizeof(CUlaunchAttribute), offsetof(CUlaunchAttribute, id),
           offsetof(CUlaunchAttribute, value.programmaticStreamSerializationAllowed));
    printf("%zu %zu %zu %zu %zu %zu %zu", sizeof(CUlaunchConfig),
           offsetof(CUlaunchConfig, gridDimX), offsetof(CUlaunchConfig, blockDimX),
           offsetof(CUlaunchConfig, sharedMemBytes),
           offsetof(CUlaunchConfig, hStream), offsetof(CUlaunchConfig, attrs),
           offsetof(CUlaunchConfig, numAttrs));
}
"""


def layout() -> list[int]:
    """What LAYOUT prints, of the structs here."""
    attribute, configuration = overlap.Attribute, overlap.Configuration
    names = ("grid", "block", "shared", "stream", "attributes", "count")
    return [
        overlap._SERIALIZATION,
        ctypes.sizeof(attribute),
        attribute.id.offset,
        attribute.value.offset,
        ctypes.sizeof(configuration),
        *(getattr(configuration, name).offset for name in names),
    ]


def test_layout_of_the_driver_structs():
    assert layout() == [6, 72, 0, 8, 56, 0, 12, 24, 32, 40, 48]


def test_layout_is_that_of_the_header(tmp_path):
    folders = [Path(torch.__file__).parent.parent, Path("/usr/local")]
    patterns = ("triton/backends/nvidia/include", "nvidia/*/include", "cuda*/include")
    found = [f for folder in folders for p in patterns for f in folder.glob(p)]
    found = [folder for folder in found if (folder / "cuda.h").exists()]
    compiler = shutil.which("cc")
    if not found or not compiler:
        pytest.skip("needs cuda.h and a C compiler")
    (tmp_path / "layout.c").write_text(LAYOUT)
    build = [compiler, "-I", str(found[0]), "layout.c", "-o", "layout"]
    subprocess.run(build, cwd=tmp_path, check=True)
    printed = subprocess.run(["./layout"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert [int(number) for number in printed.stdout.split()] == layout()


def test_launches_of_eager_operations_stay_in_line(driver):
    """One configuration a stream, without attributes, whatever is wanted around it."""
    kernel = Kernel(FUNCTION, (6, 2), (256,), 1024, b"ab", pointers=1, follows=True)
    with overlapping():
        kernel.enqueue(1, 5)
    kernel.enqueue(1, 6)
    expected = (FUNCTION.ptr, (6, 2, 1, 256, 1, 1, 1024), 901, [])
    assert driver.overlapping == [expected, expected]
    assert len(kernel.ready) == 1


def test_eager_launches_with_a_driver_that_knows_no_configurations(driver, monkeypatch):
    monkeypatch.delattr(Driver, "cuLaunchKernelEx")
    driver.statuses = [201]  # a thread's first CUDA call
    Kernel(FUNCTION, (6, 2), (256,), 1024, b"ab", pointers=1).enqueue(1, 5)
    assert [stream for _, _, stream, _ in driver.launches] == [901, 901]
    assert driver.contexts == [77]


def test_refused_eager_launches_raise(driver):
    driver.statuses = [201, 1]
    with pytest.raises(RuntimeError, match="could not launch"):
        Kernel(FUNCTION, (1,), (32,), 0, b"", pointers=0).enqueue(1)
    assert driver.contexts == [77]
