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

from ..ops.cuda.module import prepare

_TILE = 128  # tables are padded to whole tiles of GEMM rows
_ENTRIES = 8  # tables a launch can fill


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
    """All tables of a network, eight to a launch.

    Args:
        slot (N, Gh, Gw), cells (N·Gh·Gw,) int32: as from `build_slots`.

    Returns:
        For each key a (9, pitch) int32 table, or (1, pitch) with the middle tap alone.
    """
    tables = new_tables(slot, n_high, keys)
    made = list(tables.items())
    for start in range(0, len(made), _ENTRIES):
        _launch(slot, cells, n_high, made[start : start + _ENTRIES])
    return tables


def new_tables(slot: Tensor, n_high: int, keys: Iterable[TableKey]) -> dict[TableKey, Tensor]:
    """The tables of `build_tables`, yet to be filled in."""
    tables = {}
    for key in keys:
        pitch = Scale.of(key.block // key.stride, n_high, slot.numel()).pitch
        shape = (1 if key.centre else 9, pitch)
        tables[key] = torch.empty(shape, dtype=torch.int32, device=slot.device)
    return tables


def pack_blocks(slot: Tensor, n_high: int) -> bytes:
    """The struct Blocks of tables.cuh after its pointers."""
    return struct.pack("4i", *slot.shape[1:], n_high, slot.numel())


def pack_table(key: TableKey, table: Tensor) -> bytes:
    """The struct TableEntry of tables.cuh."""
    sizes = (key.block, key.stride, table.shape[1], key.centre)
    return struct.pack("Q4i", table.data_ptr(), *sizes)


def _launch(
    slot: Tensor, cells: Tensor, n_high: int, entries: list[tuple[TableKey, Tensor]]
) -> None:
    record = b"".join(pack_table(*entry) for entry in entries).ljust(24 * _ENTRIES, b"\0")
    widest = max(table.shape[1] for _, table in entries)
    prepare(
        "tables.cu",
        "build_tables",
        ("-std=c++17",),
        slot.device.index,
        -(-widest // 256),
        256,
        pack_blocks(slot, n_high) + record,
        pointers=2,
        rows=len(entries),
    ).launch(slot.device, slot.data_ptr(), cells.data_ptr())
