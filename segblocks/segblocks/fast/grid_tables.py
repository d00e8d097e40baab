"""Neighbour tables of a grid as single operations ask for them, most of them built ahead."""

import functools

import torch

from ..grid import BlockGrid
from .tables import MOST_TABLES, Kernel, TableKey, prepare_tables, table_shape

_MOST_KEYS = MOST_TABLES
_ALIGNMENT = 64  # bytes between the beginnings of two tables are a multiple of this
Key = tuple[int, int, bool]  # block, stride, centre: a TableKey that hashes fast
# By the first table that a grid needed and its shape: what such grids went on to need.
_WANTED: dict[tuple, list[Key]] = {}


def table(grid: BlockGrid, key: Key) -> int:
    """The address of a table, which is kept with the grid."""
    return grid.tables.get(key) or _make_tables(grid, key)


def _make_tables(grid: BlockGrid, key: Key) -> int:
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
