"""Launchers of `joint_norm.cu`: every process calls the same ones in the same order, one behind the
other."""

import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from . import geometry as geo
from .batch_norm import address, check_row, mark_changed
from .launch import Kernel
from .module import defines, prepare

COLUMNS, _NUMBERS = 8192, 3  # of a batch norm, and that a column sends
_WORD, _ROUND = 8, 4  # bytes
_THREADS = 64  # a channel each


@dataclass(frozen=True)
class Peers:
    """A process among those that write into each other's memory.

    Attributes:
        rank: its number.
        addresses: of its rounds, and of the words of each process, as this one sees them.
    """

    rank: int
    addresses: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.addresses) - 1


def bytes_of_words(count: int) -> int:
    """Of each of `count` processes."""
    return 2 * count * _NUMBERS * COLUMNS * _WORD


BYTES_OF_ROUNDS = COLUMNS // _THREADS * _ROUND


def joint_table(
    peers: Peers,
    own: Tensor,
    rows: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What `batch_join` makes of the tables (4, C) of all `peers`, who all call this.

    Args:
        own: of `batch_statistics` with the same eps and without weight and bias.
        rows: of the pixels that it is of.

    Raises:
        ValueError: dtypes, shapes or layouts that do not fit.
    """
    channels = own.shape[1]
    check_row(own, own, (4, channels))
    given = (weight, bias, running_mean, running_var)
    for tensor in given:
        check_row(tensor, own, (channels,))
    table, share = torch.empty_like(own), own.new_empty(())
    settings = struct.pack("3d", float(rows), float(momentum), float(eps))
    kernel = _kernel("joint_table", own.get_device(), peers.rank, peers.count, channels, settings)
    kernel.enqueue(
        own.get_device(),
        own.data_ptr(),
        *map(address, given),
        table.data_ptr(),
        share.data_ptr(),
        *peers.addresses,
    )
    mark_changed(running_mean, running_var)
    return table, share


def joint_sums(peers: Peers, own: Tensor, share: Tensor) -> Tensor:
    """Sums (2, C) float32 of each of `peers`, who all call this → their sum times `share`, 0-d.

    Raises:
        ValueError: dtypes, shapes or layouts that do not fit.
    """
    channels = own.shape[1]
    check_row(own, own, (2, channels))
    check_row(share, own, ())
    sums = torch.empty_like(own)
    kernel = _kernel("joint_sums", own.get_device(), peers.rank, peers.count, channels)
    pointers = (own.data_ptr(), share.data_ptr(), sums.data_ptr(), *peers.addresses)
    kernel.enqueue(own.get_device(), *pointers)
    return sums


def greet(peers: Peers, index: int, number: int) -> None:
    """Send `number` to each process, whose first words are those from all ranks, 8 bytes each."""
    record = struct.pack("2i", peers.rank, number)
    kernel = _prepare("greet", index, peers.count, 1, record, 1 + peers.count)
    kernel.enqueue(index, *peers.addresses)


@functools.lru_cache(maxsize=2048)
def _kernel(
    name: str, device: int, rank: int, processes: int, channels: int, settings: bytes = b""
) -> Kernel:
    if channels > COLUMNS:
        raise ValueError(f"{channels} channels are too many for a batch norm of blocks")
    record = struct.pack("2i", rank, channels) + settings
    pointers = processes + (8 if name == "joint_table" else 4)
    return _prepare(name, device, processes, -(-channels // _THREADS), record, pointers)


def options_of(processes: int) -> tuple[str, ...]:
    """Of the compiler."""
    bounds = {"processes": processes, "numbers": _NUMBERS, "columns": COLUMNS}
    return defines(dtype=geo.DTYPES[torch.float32], vector=1, index64=0, **bounds)


def _prepare(
    name: str, device: int, processes: int, blocks: int, record: bytes, pointers: int
) -> Kernel:
    return prepare(
        "joint_norm.cu", name, options_of(processes), device, blocks, _THREADS, record, pointers
    )
