"""The processes of a host that write into each other's memory what they exchange in batch norm.

That is a few kilobytes, twice for each layer of a training step, and everybody waits for it. A
kernel that writes to the others' GPUs and waits for their numbers (`ops/cuda/peers.cuh`) takes a
fraction of NCCL's time. Where GPUs do not reach each other, several hosts included, it is NCCL.
"""

import ctypes
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.cuda.joint_norm import BYTES_OF_ROUNDS, Peers, bytes_of_words, greet
from .ops.cuda.module import import_cupy

MOST = 8  # processes

# The group that has met, and what came of it, by devices.
_met: dict[int, tuple[dist.ProcessGroup, Peers | None]] = {}


def peers_on(index: int) -> Peers | None:
    """The processes of the default group, each with a CUDA device, this one with number `index`.

    The first call for a group is one that all make together. None where one of them cannot write to
    another or has SEGBLOCKS_PEERS=0 in its environment, or where that call is in a CUDA graph; the
    same in all processes.
    """
    group, found = _met.get(index, (None, None))
    if group is not dist.group.WORLD:
        with torch.cuda.device(index):  # on which NCCL gathers what they say
            found = None if torch.cuda.is_current_stream_capturing() else _meet(index)
        _met[index] = dist.group.WORLD, found
    return found


def peers_of(tensor: Tensor) -> Peers | None:
    """`peers_on` its device; None on the CPU."""
    return peers_on(tensor.get_device()) if tensor.is_cuda else None


def _meet(index: int) -> Peers | None:
    rank, count = dist.get_rank(), dist.get_world_size()
    wanted = os.environ.get("SEGBLOCKS_PEERS") != "0" and count <= MOST
    # Never freed: others may have it open.
    own, handle = _share(index, count) if wanted else (0, None)
    offers = _everyones((_host(), handle))
    words: list[int] | None = None
    if all(host == _host() and handle is not None for host, handle in offers):
        words = _open(index, rank, own, [handle for _, handle in offers])
    if not all(_everyones(words is not None)):
        return None
    peers = Peers(rank, (own + bytes_of_words(count), *words))
    if not all(_everyones(_greeted(peers, index))):
        return None
    return peers if all(_everyones(_heard(index, own, count))) else None


def _share(index: int, count: int) -> tuple[int, bytes | None]:
    """The address of zeros, and by what others find them; None where this is not possible."""
    try:
        cupy = import_cupy()
    except ImportError:
        return 0, None
    runtime = cupy.cuda.runtime
    size = bytes_of_words(count) + BYTES_OF_ROUNDS
    with cupy.cuda.Device(index) as device:
        try:
            own = runtime.malloc(size)
            runtime.memset(own, 0, size)
            device.synchronize()
            return own, runtime.ipcGetMemHandle(own)
        except runtime.CUDARuntimeError:
            return 0, None


def _open(index: int, rank: int, own: int, handles: list[bytes]) -> list[int] | None:
    """Addresses of everybody's memory in this process; None where one cannot be reached."""
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    with cupy.cuda.Device(index):
        try:
            return [
                own if i == rank else runtime.ipcOpenMemHandle(handle)
                for i, handle in enumerate(handles)
            ]
        except runtime.CUDARuntimeError:
            return None


def _greeted(peers: Peers, index: int) -> bool:
    """Whether this process could write to all."""
    try:
        greet(peers, index, peers.rank + 1)
        torch.cuda.synchronize(index)
    except Exception:  # whatever it is, all must hear of it
        return False
    return True


def _heard(index: int, own: int, count: int) -> bool:
    """Whether what everybody has written into this process's memory arrived there."""
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    found = (ctypes.c_uint64 * count)()
    with cupy.cuda.Device(index):
        size = ctypes.sizeof(found)
        try:
            runtime.memcpy(ctypes.addressof(found), own, size, runtime.memcpyDeviceToHost)
        except runtime.CUDARuntimeError:
            return False
    return list(found) == list(range(1, count + 1))


def _host() -> tuple[str, ...]:
    """Other hosts, and the same one before it was started again, give something else."""
    started = Path("/proc/sys/kernel/random/boot_id")
    return sys.platform, socket.gethostname(), started.read_text() if started.exists() else ""


def _everyones(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
