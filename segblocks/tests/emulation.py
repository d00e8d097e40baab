"""Runs a CUDA kernel on the CPU, thread by thread, to check its arithmetic where there is no GPU.

In every type but float16, whose conversions are instructions of the GPU. Kernels are compiled by
g++ with the few CUDA names they use in place. The threads of a thread block run one after another,
or, where they meet in shared memory, as threads of the CPU.
"""

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from segblocks.ops.cuda import module

_HERE = Path(__file__).parent
_SHIM = """
#include "cuda_on_cpu.h"
#include <pthread.h>
#include <thread>
#if TOGETHER
thread_local
#endif
static Index threadIdx;
static pthread_barrier_t barrier;
inline void __syncthreads() { pthread_barrier_wait(&barrier); }
"""
_LOOP = """
extern "C" void run(const char* parameters, unsigned blocks, unsigned rows, unsigned threads) {
    Params p;
    memcpy(&p, parameters, sizeof p);
    blockDim.x = threads;
    gridDim.x = blocks;
    gridDim.y = rows;
    for (blockIdx.y = 0; blockIdx.y < rows; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
#if TOGETHER
            pthread_barrier_init(&barrier, nullptr, threads);
            std::vector<std::thread> all;
            for (unsigned i = 0; i < threads; i++)
                all.emplace_back([&p, i] {
                    threadIdx.x = i;
                    KERNEL(p);
                });
            for (std::thread& one : all) one.join();
            pthread_barrier_destroy(&barrier);
#else
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) KERNEL(p);
#endif
        }
}
extern "C" unsigned size() { return sizeof(Params); }
"""


class EmulatedKernel:
    """In place of `launch.Kernel`; its parameters must fill the kernel's struct."""

    def __init__(self, library: ctypes.CDLL, shape: tuple[int, int, int], constants: bytes):
        self._library, self._constants = library, constants
        self._shape = tuple(map(ctypes.c_uint, shape))

    def enqueue(self, index: int, *pointers: int) -> None:
        self.launch(torch.device("cpu"), *pointers)

    def launch(self, device: torch.device, *pointers: int) -> None:
        parameters = b"".join(p.to_bytes(8, "little") for p in pointers) + self._constants
        assert len(parameters) == self._library.size()
        self._library.run(parameters, *self._shape)


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
) -> EmulatedKernel:
    """In place of `module.prepare`, for CPU tensors."""
    return EmulatedKernel(_library(file, kernel, options), (blocks, rows, threads), constants)


@functools.cache
def _library(file: str, kernel: str, options: tuple[str, ...]) -> ctypes.CDLL:
    text = module.source(file)
    name = re.search(rf"\b{kernel}\(const (?:__grid_constant__ )?(\w+)&? p\)", text)[1]
    loop = _LOOP.replace("KERNEL", kernel).replace("Params", name)
    together = f"-DTOGETHER={int('__syncthreads' in text)}"
    return build(_SHIM + text + loop, "-O1", "-pthread", together, *options)


def build(text: str, *options: str) -> ctypes.CDLL:
    """C++ that may include headers from here, as a library."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(text)
        command = [
            "g++",
            "-shared",
            "-fPIC",
            f"-I{_HERE}",
            *options,
            str(source),
            "-o",
            str(binary),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(binary))
