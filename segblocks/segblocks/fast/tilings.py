"""How the Hopper 3×3 convolution of patches shares its work: tiles of pixels of both resolutions,
output channels, the inner dimension. `patch_sm90.cu` says what the kernel does with them."""

import functools
import struct
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import NamedTuple

from .tables import Scale

TALL, PATCHES, WOVEN, ROWS = 0, 1, 2, 3  # kinds of tiles
TILE, PATCH = 128, 64  # pixels
SLICE = 64  # output channels of a thread block, and input channels of a stage
STAGE_BYTES = SLICE * SLICE * 2
SHARED = 232448 - 2048  # dynamic shared memory, less alignment and the barriers
MAX_PARTS, MAX_RING, STREAMED = 8, 8, 8
# Bytes of eight channels of a slot's pixels: 16 more than a multiple of 128, so that banks differ.
_PLANES = {TALL: 2960, PATCHES: 3216, WOVEN: 4624, ROWS: 2064}
_PLANE_OF_TRIPLES = 4880


@dataclass(frozen=True)
class Tiling:
    """Tiles at one scale; attributes as in the kernel's `Tiling`."""

    high_tiles: int
    tiles: int
    high_kind: int
    low_kind: int
    first_row: int
    triples: int = 0

    @classmethod
    def of(cls, scale: Scale) -> "Tiling":
        """Tiles of 128 pixels, of high blocks and of low ones."""
        high_kind, low_kind = _high_kind(scale.block), _low_kind(scale.block // 2)
        high_rows, low_rows = scale.high_rows, scale.rows - scale.high_rows
        if high_kind == ROWS or not high_rows:
            # One range of rows: whatever their resolution, or low ones alone.
            high_rows, low_rows = 0, scale.rows
            high_kind = low_kind
        elif not low_rows:
            low_kind = high_kind
        # Blocks are whole patches, so that rows tell their number.
        high_tiles, low_tiles = -(-high_rows // TILE), -(-low_rows // TILE)
        return cls(high_tiles, high_tiles + low_tiles, high_kind, low_kind, high_rows)

    @classmethod
    def of_patches(cls, scale: Scale, tiles: int) -> "Tiling | None":
        """At most so many tiles, of two patches each or, where those are too few, some of three.

        Blocks of both resolutions share tiles where the sides of both are multiples of 8. None:
        there is no such tiling, or it is that of `of`.
        """
        if scale.block % 8:
            return None
        both, rows, low_tiles = scale.block % 16 == 0, scale.rows, 0
        if not both:  # low blocks have tiles of their own
            rows, low_tiles = scale.high_rows, -(-(scale.rows - scale.high_rows) // TILE)
        patches = rows // PATCH
        tiles = min(tiles - low_tiles, -(-patches // 2))
        triples = max(0, patches - 2 * tiles)
        if triples > tiles or not (both or triples):
            return None
        low_kind = PATCHES if both else _low_kind(scale.block // 2)
        return cls(tiles, tiles + low_tiles, PATCHES, low_kind, rows, triples)

    @property
    def plane(self) -> int:
        """Bytes of eight channels of a tile's pixels in shared memory."""
        triples = _PLANE_OF_TRIPLES if self.triples else 0
        return max(_PLANES[self.high_kind], _PLANES[self.low_kind], triples)

    @property
    def most_pixels(self) -> int:
        """Of a tile."""
        return 3 * PATCH if self.triples else TILE

    @property
    def slot(self) -> int:
        """Bytes of 64 channels of a tile's pixels, and of its output rows, in shared memory."""
        return 8 * self.plane + self.most_pixels * 5

    @property
    def has_patches(self) -> bool:
        return self.high_kind != ROWS

    @property
    def packed(self) -> bytes:
        return struct.pack("6i", *astuple(self))


class Cut(NamedTuple):
    """How a scale is cut, and the side of its high blocks."""

    block: int
    tiling: Tiling


@dataclass(frozen=True)
class Division:
    """How the work of one convolution is shared; attributes as in the kernel's `Arguments`."""

    tiling: Tiling
    chunk_of: tuple[int, ...]
    resident: bool
    stages: int
    ring: int
    lanes: int
    slices: int

    @property
    def parts(self) -> int:
        return len(self.chunk_of) - 1

    @property
    def shared(self) -> int:
        return self.stages * STAGE_BYTES + self.ring * self.tiling.slot + 1024

    @property
    def blocks(self) -> int:
        return self.lanes * self.slices * self.parts


@functools.cache
def plan(scale: Scale, channels: tuple[int, int, int], processors: int) -> Division:
    """The division of a convolution.

    Where weights stream by, and there are few rounds of tiles, it is the one that takes least time
    by `estimate`: patches of both resolutions may share tiles, and some tiles of three patches save
    a round for the last few.

    Args:
        channels: input, second input, output.
        processors: multiprocessors of the GPU.
    """
    best = divide(Tiling.of(scale), channels, processors)
    rounds = -(-best.tiling.tiles // best.lanes)  # of one tile each
    # Larger tiles leave no room for weights that stay, which costs more than the round they save.
    if best.resident or rounds > _MOST_ROUNDS:
        return best
    least = _WORTH * estimate(best, channels)
    for tiles in range(best.lanes, (rounds + 1) * best.lanes, best.lanes):
        tiling = Tiling.of_patches(scale, tiles)
        if tiling is None:
            continue
        other = divide(tiling, channels, processors)
        time = estimate(other, channels)
        if other.parts == 1 and time < least:
            best, least = other, time
    return best


@functools.cache
def divide(tiling: Tiling, channels: tuple[int, int, int], processors: int) -> Division:
    """Share a convolution among thread blocks: tiles, output channels, the inner dimension.

    Args:
        channels: input, second input, output.
    """
    slices = channels[2] // SLICE
    taps = [9] * (channels[0] // SLICE) + [1] * (channels[1] // SLICE)
    slot = tiling.slot
    resident, stages, chunk_of = True, sum(taps), (0, len(taps))
    # Products hold a slot until those after them are issued, so fewer than three do not do.
    if stages * STAGE_BYTES + 3 * slot > SHARED:
        parts = _balance(taps, (SHARED - 3 * slot) // STAGE_BYTES)
        # Parts pay where each thread block has one tile or none: adding them up takes time.
        if parts is None or tiling.tiles * slices * (len(parts) - 1) > processors:
            resident, stages = False, STREAMED
        else:
            chunk_of, stages = parts, max(sum(taps[a:b]) for a, b in pairwise(parts))
    ring = min(MAX_RING, (SHARED - stages * STAGE_BYTES) // slot)
    lanes = max(1, min(processors // (slices * (len(chunk_of) - 1)), tiling.tiles))
    return Division(tiling, chunk_of, resident, stages, ring, lanes, slices)


# Cycles of a multiprocessor of an H200: of the product of 64 output channels, so many pixels and 16
# values of the inner dimension, which a warpgroup issues in turn with another; of storing a tile.
# And bytes of weights that come in a cycle.
_PRODUCT, _PRODUCT_PIXEL, _STORE, _STORE_PIXEL, _BYTES = 15, 0.44, 800, 12.5, 24
_MOST_ROUNDS = 16  # of tiles: beyond them the last one matters little
_WORTH = 0.97  # of the time with tiles of 128 pixels, which are fetched with less halo


def estimate(division: Division, channels: tuple[int, int, int]) -> float:
    """Cycles of the thread block that takes longest, without what all convolutions take."""
    tiling, lanes = division.tiling, division.lanes
    taps = 9 * channels[0] // SLICE + channels[1] // SLICE
    fetched = 0 if division.resident else taps * STAGE_BYTES / _BYTES

    def one_round(sizes: list[int]) -> float:
        """Tiles of both warpgroups, or halves of one."""
        products = sum(_PRODUCT + _PRODUCT_PIXEL * pixels for pixels in sizes)
        return max(4 * taps * products + _STORE + _STORE_PIXEL * max(sizes), fetched)

    def size_of(index: int) -> int:
        return 3 * PATCH if index < tiling.triples else TILE

    def rounds(first: int, end: int, kind: int) -> float:
        mine = list(range(first, end, lanes))
        if kind == WOVEN:  # multiplied with two lines of each half for nothing
            return len(mine) * one_round([TILE // 2 + 16] * 2)
        pairs = [mine[i : i + 2] for i in range(0, len(mine), 2)]
        sizes = [[size_of(i) for i in pair] for pair in pairs]
        return sum(one_round(s if len(s) == 2 else [s[0] // 2] * 2) for s in sizes)

    high = tiling.high_tiles
    return max(
        rounds(lane, high, tiling.high_kind)
        + rounds(high + (lane - high) % lanes, tiling.tiles, tiling.low_kind)
        for lane in range(lanes)
    )


def needs_table(block: int) -> bool:
    """Whether any tile of an output with that side of a high block reads the neighbour table."""
    return ROWS in (_high_kind(block), _low_kind(block // 2))


def _high_kind(side: int) -> int:
    if side % 8:
        return ROWS
    return TALL if side % 16 == 0 else PATCHES


def _low_kind(side: int) -> int:
    return WOVEN if side == 4 else _high_kind(side)


def _balance(taps: list[int], most: int) -> tuple[int, ...] | None:
    """Boundaries of as few runs of chunks as `most` stages each allow, of nearly the same size;
    None where that would take too many."""
    for parts in range(1, MAX_PARTS + 1):
        share, bounds, total = sum(taps) / parts, [0], 0
        for i, count in enumerate(taps):
            if len(bounds) < parts and total + count / 2 > share * len(bounds):
                bounds.append(i)
            total += count
        bounds.append(len(taps))
        if max(sum(taps[a:b]) for a, b in pairwise(bounds)) <= most:
            return tuple(bounds)
    return None
