"""Runs a kernel with matrix instructions on the CPU, in bfloat16.

`hopper_on_cpu.h` has the instructions; everything else is the kernel's own text, compiled by g++.
"""

import ctypes
import functools
import shutil
from typing import Any

import emulation
import pytest
import torch
from fast_models import DEVICES, ON_HOPPER

from segblocks.fast import patches, row_conv, stem, tables
from segblocks.ops.cuda import module

PROCESSORS = 6  # multiprocessors of the GPU that is played
# Headers that hopper_on_cpu.h stands for.
_INSTRUCTIONS = ("wgmma.cuh", "mma.cuh", "warp_product.cuh", "pipeline.cuh", "follow.cuh")
_LOOP = """
extern "C" int run(const char* parameters, unsigned blocks, unsigned threads) {
    static Arguments p;
    memcpy(&p, parameters, sizeof p);
    blockDim.x = threads;
    gridDim = {blocks, 1, 1};
    fibers.resize(threads);
    warps.resize(threads / 32);
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; i++) order[i] = i;
    unsigned random = 1;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        memset(dynamic_memory, 0xff, sizeof dynamic_memory);
        everyone = {};
        for (Meeting& meeting : named) meeting = {};
        for (Warp& warp : warps) warp = {};
        for (unsigned i = threads - 1; i; i--) {
            random = random * 1664525 + 1013904223;
            std::swap(order[i], order[random / 65536 % (i + 1)]);
        }
        for (unsigned i = 0; i < threads; i++) {
            Fiber& fiber = fibers[i];
            fiber.stack.resize(1 << 16);
            fiber.done = false, fiber.exchanges = 0;
            fiber.copies.clear(), fiber.groups.clear(), fiber.products.assign(1, {});
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, (void (*)())+[] {
                KERNEL(p);
                progress = me().done = true;
            }, 0);
        }
        for (unsigned left = threads; left;) {
            progress = false, left = 0;
            for (unsigned i : order) {
                if (fibers[i].done) continue;
                running = threadIdx.x = i;
                swapcontext(&scheduler, &fibers[i].context);
                left += !fibers[i].done;
            }
            if (left && !progress && !land_bulks()) return left;
        }
    }
    return 0;
}
extern "C" unsigned size() { return sizeof(Arguments); }
"""


def _place(request, monkeypatch):
    """Where tables and convolutions run: on CPU tensors too."""
    if request.param == "cpu":
        _play(monkeypatch)
    return request.param


_ON_HOPPER = ["cpu", pytest.param("cuda", marks=ON_HOPPER)]
hopper_or_cpu = pytest.fixture(name="device", params=_ON_HOPPER)(_place)
gpu_or_cpu = pytest.fixture(name="device", params=DEVICES)(_place)


def _play(monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    for user in (patches, stem, tables):
        monkeypatch.setattr(user, "prepare", emulation.prepare)
    for user in (row_conv, patches, stem):
        monkeypatch.setattr(user, "load", load)
        monkeypatch.setattr(user, "launch", launch)
    monkeypatch.setattr(row_conv, "function", load)
    monkeypatch.setattr(stem, "multiprocessors", lambda device: PROCESSORS)
    monkeypatch.setattr(row_conv, "_kernel", row_conv._kernel.__wrapped__)


def load(file: str, kernel: str, options: tuple[str, ...], device: Any, shared: int) -> ctypes.CDLL:
    """In place of `hopper.load` and `module.function`."""
    return _library(file, kernel, options)


def launch(
    library: ctypes.CDLL,
    grid: tuple[int, ...],
    block: tuple[int],
    shared: int,
    parameters: bytes,
    device: torch.device,
    follows: bool = False,
) -> None:
    """In place of `launch.launch`."""
    assert len(parameters) == library.size()
    stuck = library.run(parameters, *map(ctypes.c_uint, (grid[0], block[0])))
    assert not stuck, f"{stuck} threads of a thread block wait for ever"


@functools.cache
def _library(file: str, kernel: str, options: tuple[str, ...]) -> ctypes.CDLL:
    text = module.source(file)
    for header in _INSTRUCTIONS:
        text = text.replace(module.source(header), "")
    text = text.replace("extern __shared__ char dynamic[];", "char* dynamic = dynamic_memory;")
    loop = _LOOP.replace("KERNEL", kernel)
    return emulation.build('#include "hopper_on_cpu.h"\n' + text + loop, "-O2", *options)
