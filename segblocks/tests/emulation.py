"""Runs a CUDA kernel on the CPU, thread by thread, to check its arithmetic where there is no GPU.

For kernels whose threads do not talk to one another, in every type but float16, whose conversions
are instructions of the GPU. They are compiled by g++ with the few CUDA names they use in place.
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from segblocks.ops.cuda import module

_SHIM = """
#include <algorithm>
#include <cmath>
#include <cstring>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
using std::max;
using std::min;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y, z; };
static Index blockIdx, threadIdx, blockDim, gridDim;
template <class T> inline T __ldg(const T* at) { return *at; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
template <class To, class From> inline To same_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int i) { return same_bits<float>(i); }
inline float __uint_as_float(unsigned i) { return same_bits<float>(i); }
inline unsigned __float_as_uint(float f) { return same_bits<unsigned>(f); }
"""
_LOOP = """
extern "C" void run(const char* parameters, unsigned blocks, unsigned threads) {
    Params p;
    memcpy(&p, parameters, sizeof p);
    blockDim.x = threads;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) KERNEL(p);
}
extern "C" unsigned size() { return sizeof(Params); }
"""


class EmulatedKernel:
    """In place of `launch.Kernel`; its parameters must fill the kernel's struct."""

    def __init__(self, library: ctypes.CDLL, blocks: int, threads: int, constants: bytes):
        self._library, self._constants = library, constants
        self._shape = (ctypes.c_uint(blocks), ctypes.c_uint(threads))

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
) -> EmulatedKernel:
    """In place of `module.prepare`, for CPU tensors."""
    return EmulatedKernel(_library(file, kernel, options), blocks, threads, constants)


@functools.cache
def _library(file: str, kernel: str, options: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        text = module.source(file)
        name = "Params" if "struct Params" in text else "Arguments"
        loop = _LOOP.replace("KERNEL", kernel).replace("Params", name)
        source.write_text(_SHIM + text + loop)
        command = ["g++", "-O1", "-shared", "-fPIC", *options, str(source), "-o", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(binary))
