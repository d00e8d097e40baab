"""What a forward pass on a grid begins with, in one launch: padded blocks and all tables."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..grid import BlockGrid
from ..ops.cuda.module import prepare
from .patches import build_patches, new_patches, pack_patches
from .stem import is_packed, plan_split
from .tables import TableKey, build_tables, new_tables, pack_blocks, pack_table
from .tilings import Cut

_MOST_TILES, _MOST_COLUMNS = 6, 12  # of front.cu


@dataclass(frozen=True)
class Front:
    """What the network's steps read besides each other's buffers.

    Attributes:
        padded: the image as `split_padded` makes it.
        tables: as from `build_tables`; tiles: as from `build_patches`.
    """

    padded: Tensor
    tables: dict[TableKey, Tensor]
    tiles: dict[Cut, Tensor]


def begin(
    image: Tensor,
    grid: BlockGrid,
    block: int,
    dtype: torch.dtype,
    keys: Iterable[TableKey],
    cuts: Iterable[Cut],
) -> Front:
    """Padded blocks of an image (N, 3, H, W), in `dtype`, and the tables of a grid on its device.

    Args:
        block: side of a high block of the image in pixels.
        keys: the neighbour tables wanted; cuts: those whose tiles are.
    """
    keys, cuts = list(keys), list(cuts)
    slot, cells, n_high = grid.slot, grid.cells, grid.n_high
    image = image.to(dtype)
    split = plan_split(grid.shape, n_high, block, dtype, image.stride(), is_packed(image))
    padded = torch.empty((split.rows, 4), dtype=dtype, device=image.device)
    tables = new_tables(slot, n_high, keys[:_MOST_COLUMNS])
    tiles = new_patches(slot, cuts[:_MOST_TILES])

    def padded_to(count: int, numbers: Iterable[int]) -> list[int]:
        numbers = list(numbers)
        return numbers + [0] * (count - len(numbers))

    blocks = padded_to(_MOST_TILES, map(len, tiles.values()))
    blocks += padded_to(_MOST_COLUMNS, (-(-t.shape[1] // 256) for t in tables.values()))
    first = list(accumulate(blocks, initial=0))
    places = struct.pack("2Q", slot.data_ptr(), cells.data_ptr())
    record = struct.pack("2Q", image.data_ptr(), padded.data_ptr())
    record += places + split.record + places + pack_blocks(slot, n_high)
    entries = b"".join(pack_patches(slot, n_high, *entry) for entry in tiles.items())
    record += entries.ljust(48 * _MOST_TILES, b"\0")
    entries = b"".join(pack_table(*entry) for entry in tables.items())
    record += entries.ljust(24 * _MOST_COLUMNS, b"\0")
    record += struct.pack(f"{len(first)}ii", *first, 0)
    prepare(
        "front.cu",
        "begin",
        split.options,
        image.device.index,
        first[-1] + split.blocks,
        256,
        record,
        pointers=0,
    ).launch(image.device)
    # Networks of more scales than one launch takes.
    tables |= build_tables(slot, cells, n_high, keys[_MOST_COLUMNS:])
    tiles |= build_patches(slot, cells, n_high, cuts[_MOST_TILES:])
    return Front(padded, tables, tiles)
