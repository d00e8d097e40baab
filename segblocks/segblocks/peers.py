"""Memory that the processes of a host write into each other's of, for what they tell each other in
batch norm.

That is a few kilobytes, twice for each layer of a training step, and everybody waits for it. A
kernel that writes to the others' GPUs and waits for their numbers (`ops/cuda/peers.cuh`) takes a
fraction of NCCL's time. Where GPUs do not reach each other, several hosts included, it is NCCL.
"""

import ctypes
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .ops.cuda.module import import_cupy

MOST = 8  # processes
# As in peers.cuh.
COLUMNS, _NUMBERS, _WORD, _ROUND = 8192, 3, 8, 4  # the last two in bytes
_ROUNDS = COLUMNS  # thread blocks, at the most


@dataclass(frozen=True)
class Peers:
    """This process among those that reach its memory.

    Attributes:
        rank: its number.
        addresses: of `rounds` and of each process's words, as `Peers` in peers.cuh has them.
    """

    rank: int
    addresses: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.addresses) - 1


# The group that has met, and what came of it, by devices.
_met: dict[int, tuple[dist.ProcessGroup, Peers | None]] = {}


def peers_on(index: int) -> Peers | None:
    """The processes of the default group, each with a CUDA device, this one with number `index`.

    The first call for a group is one that all make together. None where one of them cannot write to
    another or has SEGBLOCKS_PEERS=0 in its environment, or where that call is in a CUDA graph.
    """
    group, found = _met.get(index, (None, None))
    if group is not dist.group.WORLD:
        found = None if torch.cuda.is_current_stream_capturing() else _meet(index)
        _met[index] = dist.group.WORLD, found
    return found


def _meet(index: int) -> Peers | None:
    rank, count = dist.get_rank(), dist.get_world_size()
    wanted = os.environ.get("SEGBLOCKS_PEERS") != "0" and count <= MOST
    # What was shared is never freed: others may have it open.
    own, handle = _share(index, count) if wanted else (0, None)
    offers = _everyones((_host(), handle))
    opened: list[int] | None = None
    if all(host == _host() and handle is not None for host, handle in offers):
        opened = _open(index, rank, own, [handle for _, handle in offers])
    if not all(_everyones(opened is not None)) or not all(_everyones(_hear(index, rank, opened))):
        return None
    return Peers(rank, (own + _bytes_of_words(count), *opened))


def _share(index: int, count: int) -> tuple[int, bytes | None]:
    """The address of zeros, and by what others find them; None where this is not possible."""
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    size = _bytes_of_words(count) + _ROUNDS * _ROUND
    with cupy.cuda.Device(index) as device:
        own = runtime.malloc(size)
        runtime.memset(own, 0, size)
        device.synchronize()
        try:
            return own, runtime.ipcGetMemHandle(own)
        except runtime.CUDARuntimeError:
            return own, None


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


def _hear(index: int, rank: int, addresses: list[int]) -> bool:
    """Whether what everybody writes into the others' memory arrives there."""
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    said = ctypes.c_uint64(rank + 1)  # of round 0, which nobody waits for
    with cupy.cuda.Device(index) as device:
        for address in addresses:
            place = address + rank * _WORD
            runtime.memcpy(place, ctypes.addressof(said), _WORD, runtime.memcpyHostToDevice)
        device.synchronize()
        dist.all_gather_object([None] * len(addresses), None)  # all have written
        heard = (ctypes.c_uint64 * len(addresses))()
        size = ctypes.sizeof(heard)
        runtime.memcpy(ctypes.addressof(heard), addresses[rank], size, runtime.memcpyDeviceToHost)
    return list(heard) == [i + 1 for i in range(len(addresses))]


def _bytes_of_words(count: int) -> int:
    return 2 * count * _NUMBERS * COLUMNS * _WORD


def _host() -> tuple[str, ...]:
    """Other hosts, and the same one before it was started again, give something else."""
    started = Path("/proc/sys/kernel/random/boot_id")
    return sys.platform, socket.gethostname(), started.read_text() if started.exists() else ""


def _everyones(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
