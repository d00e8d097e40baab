"""How the convolution that goes row by row shares its work among thread blocks: tiles of the matrix
product, and for those that would fill little of the GPU, parts of the inner dimension."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..ops.cuda.module import MUCH_SHARED, shared_memory
from .generation import HOPPER, generation

STEP = 64  # inner-dimension values of one pipeline stage
_MOST_PARTS = 12
_FEWEST_STEPS = 3  # of a part


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, pipeline stages, thread blocks a multiprocessor and threads that
    only fetch, 0 for `conv_sm80.cu`; each is its own kernel."""

    rows: int = 128
    columns: int = 128
    stages: int = 3
    resident: int = 2
    producers: int = 64

    @property
    def shared(self) -> int:
        """Dynamic shared memory in bytes: the stages, which the epilogue reuses, aligned."""
        stages = self.stages * (self.rows + self.columns) * STEP * 2
        return max(stages, 128 * (self.columns + 8) * 4) + 1024

    def count(self, rows: int, columns: int) -> int:
        """Tiles of a product of so many rows and columns."""
        return -(-rows // self.rows) * -(-columns // self.columns)


class Tiles(NamedTuple):
    """What there is on a GPU, for at most 64 output channels and for more."""

    narrow: tuple[Tile, ...]
    wide: tuple[Tile, ...]


ON_HOPPER = Tiles((Tile(128, 64, 3, 2, 128),), (Tile(64, 128, 4, 2, 64), Tile(128, 128, 3, 2, 64)))


def tiles_of(device: torch.device) -> Tiles:
    """Of a GPU on which the fused kernels run."""
    if generation(device) == HOPPER:
        return ON_HOPPER
    return on_ampere(shared_memory(device.index))


def on_ampere(shared: int) -> Tiles:
    """Without Hopper's instructions; `shared`: bytes of shared memory of a multiprocessor."""
    resident = 2 if shared >= MUCH_SHARED else 1
    narrow, low, high = ((128, 64, 3), (64, 128, 3), (128, 128, 2))
    return Tiles((Tile(*narrow, resident, 0),), (Tile(*low, resident, 0), Tile(*high, resident, 0)))


@dataclass(frozen=True)
class Division:
    """How one convolution is shared; `whole` and `split` as in the kernel's `Arguments`.

    Attributes:
        tiles: all of them. whole: the first ones, with a thread block each.
        split: thread blocks for each of the others, which share its inner dimension.
    """

    tile: Tile
    tiles: int
    whole: int
    split: int = 1

    @property
    def blocks(self) -> int:
        """Thread blocks."""
        return self.whole + (self.tiles - self.whole) * self.split

    @property
    def work(self) -> int:
        """float32 values that parts leave for the last of them to add."""
        return (self.blocks - self.whole) * self.tile.rows * self.tile.columns


@functools.cache
def divide(
    rows: int,
    columns: int,
    steps: int,
    processors: int,
    may_split: bool = True,
    tiles_there: Tiles = ON_HOPPER,
) -> Division:
    """The division that takes least time by `estimate`.

    Args:
        rows: GEMM rows; columns: output channels; steps: inner dimension / 64.
        processors: multiprocessors of the GPU.
        may_split: False: every tile is whole, so that there is nothing to leave for others.
        tiles_there: of that GPU.
    """
    divisions = []
    for tile in tiles_there.narrow if columns <= 64 else tiles_there.wide:
        tiles, slots = tile.count(rows, columns), processors * tile.resident
        divisions.append(Division(tile, tiles, tiles))
        over = tiles % slots
        if may_split and over:
            most = min(_MOST_PARTS, steps // _FEWEST_STEPS, slots // over)
            divisions += [Division(tile, tiles, tiles - over, n) for n in range(2, most + 1)]
    return min(divisions, key=lambda division: estimate(division, steps, processors))


# Microseconds, from times of whole layers on an H200 in float16: of a step, by the sides of a tile,
# alone on a multiprocessor and beside another; of all else in a tile; of what split tiles take
# longer, once and for every 64×128 values of each part. Of 128×64 none was measured: it moves what
# 64×128 does.
_STEP_TIMES = {(64, 128): (0.4, 0.6), (128, 64): (0.4, 0.6), (128, 128): (0.6, 1.0)}
_SLOWER = 1.8  # steps without Hopper's instructions
_TILE_TIME, _SPLIT_TIME, _PART_TIME = 3.0, 2.5, 0.8


def estimate(division: Division, steps: int, processors: int) -> float:
    """Microseconds of a convolution: of rounds of as many whole tiles as the GPU holds at once,
    which take no shorter for fewer; the parts of split tiles are one more."""
    tile, split = division.tile, division.split
    slower = 1 if tile.producers else _SLOWER
    alone, beside = (slower * time for time in _STEP_TIMES[tile.rows, tile.columns])

    def one_round(blocks: int, steps: int) -> float:
        return _TILE_TIME + steps * (alone if blocks <= processors else beside)

    slots = processors * tile.resident
    rounds, over = divmod(division.whole, slots)
    time = rounds * one_round(slots, steps) + (one_round(over, steps) if over else 0)
    if split > 1:
        time += one_round(division.blocks - division.whole, -(-steps // split))
        time += _SPLIT_TIME + split * _PART_TIME * tile.rows * tile.columns / (64 * 128)
    return time
