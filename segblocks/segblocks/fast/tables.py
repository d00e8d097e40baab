"""Neighbour tables: for every output pixel and every tap of a 3×3 window, the row it reads.

A table turns the halo into one indexed load. It addresses an *extended* buffer: the (P, C) pixel
buffer, then n_high·(b/2)² rows of 2×2 averages of the high blocks, which is what a low block reads
of a high neighbour, then one row of zeros, which stands for all beyond the image. `tables.cu` says
how rows are ordered.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.cuda.module import Kernel, prepare

_TILE = 128  # tables are padded to whole tiles of GEMM rows
MOST_TABLES = 16  # tables a launch can fill


@dataclass(frozen=True)
class Scale:
    """Sizes of the buffers at one scale, for one number of high blocks.

    Attributes:
        block: side of a high block in pixels.
        high_rows: rows of the high blocks, n_high·b².
        rows: stored pixels P.
        zero: index of the row of zeros: P plus the averages of the high blocks.
    """

    block: int
    high_rows: int
    rows: int
    zero: int

    @classmethod
    def of(cls, block: int, n_high: int, n_blocks: int) -> "Scale":
        quarter = (block // 2) ** 2
        rows = n_high * block * block + (n_blocks - n_high) * quarter
        return cls(block, n_high * block * block, rows, rows + n_high * quarter)

    @property
    def pitch(self) -> int:
        """Columns of a table for this scale's rows."""
        return -(-self.rows // _TILE) * _TILE


@dataclass(frozen=True)
class TableKey:
    """A table by what it is for: input block in pixels, stride, and the middle tap alone or all."""

    block: int
    stride: int = 1
    centre: bool = False


def build_tables(
    slot: Tensor, cells: Tensor, n_high: int, keys: Iterable[TableKey]
) -> dict[TableKey, Tensor]:
    """All tables of a network, sixteen to a launch.

    Args:
        slot (N, Gh, Gw), cells (N·Gh·Gw,) int32: as from `build_slots`.

    Returns:
        For each key a (9, pitch) int32 table, or (1, pitch) with the middle tap alone.
    """
    tables = new_tables(slot, n_high, keys)
    keys, shape = list(tables), tuple(slot.shape)
    for start in range(0, len(keys), MOST_TABLES):
        some = tuple(keys[start : start + MOST_TABLES])
        addresses = [tables[key].data_ptr() for key in some]
        kernel = prepare_tables(shape, n_high, some, slot.device.index)
        addresses += [0] * (MOST_TABLES - len(addresses))
        kernel.launch(slot.device, slot.data_ptr(), cells.data_ptr(), *addresses)
    return tables


def new_tables(slot: Tensor, n_high: int, keys: Iterable[TableKey]) -> dict[TableKey, Tensor]:
    """The tables of `build_tables`, yet to be filled in."""
    tables = {}
    for key in keys:
        size = table_shape(key, n_high, slot.numel())
        tables[key] = torch.empty(size, dtype=torch.int32, device=slot.device)
    return tables


def table_shape(key: TableKey, n_high: int, n_blocks: int) -> tuple[int, int]:
    """Shape of a table: taps and GEMM rows."""
    pitch = Scale.of(key.block // key.stride, n_high, n_blocks).pitch
    return 1 if key.centre else 9, pitch


def pack_blocks(slot: Tensor, n_high: int) -> bytes:
    """The struct Blocks of tables.cuh after its pointers."""
    return struct.pack("4i", *slot.shape[1:], n_high, slot.numel())


def pack_table(key: TableKey, table: Tensor) -> bytes:
    """The struct TableEntry of tables.cuh."""
    return struct.pack("Q", table.data_ptr()) + _pack_sizes(key, table.shape[1])


def _pack_sizes(key: TableKey, pitch: int) -> bytes:
    return struct.pack("4i", key.block, key.stride, pitch, key.centre)


def prepare_tables(
    shape: tuple[int, int, int], n_high: int, keys: tuple[TableKey, ...], device: int | None
) -> Kernel:
    """The launch for up to `MOST_TABLES` tables of a grid.

    It takes the addresses of slot, of cells and of each table, 0 for those that it does not make.
    """
    n, gh, gw = shape
    record, widest = struct.pack("4i", gh, gw, n_high, n * gh * gw), 0
    for key in keys:
        pitch = table_shape(key, n_high, n * gh * gw)[1]
        record += _pack_sizes(key, pitch)
        widest = max(widest, pitch)
    record += bytes(16 * (MOST_TABLES - len(keys)))
    return prepare(
        "tables.cu",
        "build_tables",
        ("-std=c++17",),
        device,
        -(-widest // 256),
        256,
        record,
        pointers=2 + MOST_TABLES,
        rows=len(keys),
    )
