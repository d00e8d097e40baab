"""Neighbour tables of a grid as single operations ask for them, most of them built ahead."""

import functools

import torch

from ..grid import BlockGrid
from . import pending
from .tables import MOST_TABLES, Kernel, TableKey, prepare_tables, table_shape

_MOST_KEYS = MOST_TABLES
_ALIGNMENT = 64  # bytes between the beginnings of two tables are a multiple of this
Key = tuple[int, int, bool]  # block, stride, centre: a TableKey that hashes fast
# By the first table that a grid needed and its shape: what such grids went on to need.
_WANTED: dict[tuple, list[Key]] = {}


def table(grid: BlockGrid, key: Key, stream: int) -> int:
    """The address of a table, which is kept with the grid, for a launch on this stream, the current
    one."""
    if stream not in grid.streams:
        _order(grid, stream)
    return grid.tables.get(key) or _make_tables(grid, key, stream)


def _order(grid: BlockGrid, stream: int) -> None:
    """Let this stream wait for the one that made the tables."""
    if grid.streams:
        pending.follow(grid.streams[0], grid.slot.device, *grid.buffers)
        # In a capture there is no waiting for what is outside, and nothing learnt for later.
        if not torch.cuda.is_current_stream_capturing():
            grid.streams.append(stream)


def _make_tables(grid: BlockGrid, key: Key, stream: int) -> int:
    """This table, and in the same launch those that grids like this one asked for next."""
    tables = grid.tables
    start = (next(iter(tables), key), grid.shape)
    wanted = _WANTED.setdefault(start, [])
    if key not in wanted:
        if len(wanted) >= _MOST_KEYS:
            wanted.clear()
        wanted.append(key)
    if len(_WANTED) > _MOST_KEYS:
        _WANTED.clear()
    # Another thread may change the list meanwhile.
    keys = tuple(dict.fromkeys((key, *[k for k in wanted if k not in tables])))[:MOST_TABLES]
    slot, cells = grid.slot, grid.cells
    index = slot.get_device()
    kernel, size, offsets = _layout(grid.shape, grid.n_high, keys, index)
    buffer = torch.empty(size, dtype=torch.int32, device=slot.device)
    first = buffer.data_ptr()
    addresses = [first + offset for offset in offsets]
    kernel.enqueue(
        index, slot.data_ptr(), cells.data_ptr(), *addresses, *(0,) * (MOST_TABLES - len(keys))
    )
    tables.update(zip(keys, addresses))
    grid.buffers.append(buffer)
    grid.streams[:] = [stream]
    return tables[key]


@functools.lru_cache(maxsize=256)
def _layout(
    shape: tuple[int, int, int], n_high: int, keys: tuple[Key, ...], device: int
) -> tuple[Kernel, int, list[int]]:
    """The launch that makes tables in one buffer, its elements, at which byte each table begins."""
    offsets, size = [], 0
    for key in keys:
        taps, pitch = table_shape(TableKey(*key), n_high, shape[0] * shape[1] * shape[2])
        offsets.append(4 * size)
        size += -(-taps * pitch * 4 // _ALIGNMENT) * _ALIGNMENT // 4
    kernel = prepare_tables(shape, n_high, tuple(TableKey(*key) for key in keys), device)
    return kernel, size, offsets
