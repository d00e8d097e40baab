"""What the tiles of the patch convolution read and write, by plain indexing (patch_tiles.cuh)."""

from dataclasses import dataclass
from itertools import pairwise, product

from neighbours import buffer_index, read_row, stored_blocks
from torch import Tensor

# How blocks with sides of so many pixels are cut; other sides are rows of the neighbour table.
HIGH_KINDS = {32: "tall", 16: "tall", 24: "pair", 8: "pair"}
LOW_KINDS = HIGH_KINDS | {4: "woven"}
SIZES = {"tall": (16, 8), "pair": (8, 8), "triple": (8, 8), "woven": (4, 4)}  # of a patch
IN_TURN = {"tall": 1, "pair": 2, "triple": 3}  # patches whose lines take turns
WIDTH = 8  # pixels of a line


@dataclass
class TileByHand:
    """One tile of 128 or 192 pixels.

    Attributes:
        kind: "tall", "pair", "triple" or "woven".
        inputs: rows of the input in the order in which they are staged.
        outputs: row of each pixel, the row of zeros where there is none.
        averages: row of each average, a quarter as many; -1 where there is none.
    """

    kind: str
    inputs: list[int]
    outputs: list[int]
    averages: list[int]

    def staged_at(self, line: int, x: int, dy: int, dx: int) -> int:
        """Where pixel `x` of `line` finds what tap (dy, dx) reads, each 0 to 2, in `inputs`."""
        if self.kind == "woven":  # lines are places of a block, row by row, of eight blocks
            return ((line // 4 + dy) * 6 + line % 4 + dx) * 8 + x
        return (line + IN_TURN[self.kind] * dy) * 10 + x + dx


def tiles_by_hand(mask: Tensor, block: int, high: bool) -> list[TileByHand]:
    """The tiles of the high or of the low blocks of a grid, in order."""
    kind = kinds_of(high)[block if high else block // 2]
    each = 128 // (SIZES[kind][0] * SIZES[kind][1])
    index, patches = buffer_index(mask, block), _patches(mask, block, kind, high)
    return [
        _tile(mask, index, block, kind, patches[start : start + each])
        for start in range(0, len(patches), each)
    ]


def tiles_of_patches_by_hand(mask: Tensor, block: int, triples: int) -> list[TileByHand]:
    """The tiles of 8×8 patches, of both resolutions where low blocks hold such; the first `triples`
    of three, the others of two. Behind them woven ones of other low blocks."""
    both, index = block % 16 == 0, buffer_index(mask, block)
    patches = _patches(mask, block, "pair", True)
    patches += _patches(mask, block, "pair", False) if both else []
    starts = [*range(0, 3 * triples, 3), *range(3 * triples, len(patches), 2)]
    tiles = [
        _tile(mask, index, block, "triple" if i < triples else "pair", patches[start:end])
        for i, (start, end) in enumerate(pairwise((*starts, len(patches))))
    ]
    woven = block // 2 in LOW_KINDS and not both
    return tiles + tiles_by_hand(mask, block, False) if woven else tiles


def _patches(mask: Tensor, block: int, kind: str, high: bool) -> list[tuple]:
    """Cell and corner of each patch, block by block and line by line."""
    side, (height, width) = block if high else block // 2, SIZES[kind]
    blocks = [cell for cell, is_high in stored_blocks(mask) if is_high == high]
    corners = list(product(range(0, side, height), range(0, side, width)))
    return [(cell, *corner) for cell in blocks for corner in corners]


def _tile(mask, index, block, kind, patches) -> TileByHand:
    half, turns = block // 2, IN_TURN.get(kind, 0)

    def read(patch: int, y: int, x: int) -> int:
        if patch >= len(patches):
            return index["zero"]
        cell, top, left = patches[patch]
        return read_row(mask, index, block, cell, top + y, left + x)

    def pixel(line: int, x: int) -> tuple[int, int, int]:
        """Patch, and place in it."""
        if kind == "woven":  # pixel by pixel in turn
            return x, line // 4, line % 4
        return line % turns, line // turns, x

    def average(line: int, x: int) -> int:
        patch, y, x = pixel(line, x)
        if patch >= len(patches) or not mask[patches[patch][0]]:
            return -1
        cell, top, left = patches[patch]
        y, x = (top + y) // 2, (left + x) // 2
        on_edge = y in (0, half - 1) or x in (0, half - 1)
        return index["mean", cell, y, x] if on_edge else -1

    if kind == "woven":
        inputs = [read(i, y, x) for y in range(-1, 5) for x in range(-1, 5) for i in range(8)]
    else:
        down = range(-1, SIZES[kind][0] + 1)
        inputs = [read(i, y, x) for y in down for i in range(turns) for x in range(-1, 9)]
    lines = 24 if kind == "triple" else 16
    outputs = [read(*pixel(line, x)) for line in range(lines) for x in range(WIDTH)]
    averages = [-1] * 32
    if kind != "woven":
        upper = upper_lines(kind)
        # Of eight averages, the even ones lie on one pair of lines and the odd ones on another.
        where = [(upper[n // 8 * 2 + n % 2], n % 8 // 2 * 2) for n in range(2 * lines)]
        averages = [average(*place) for place in where]
    return TileByHand(kind, inputs, outputs, averages)


def kinds_of(high: bool) -> dict[int, str]:
    return HIGH_KINDS if high else LOW_KINDS


def upper_lines(kind: str) -> list[int]:
    """The upper line of each pair of lines whose quads are averaged, in order."""
    return {
        "tall": [0, 2, 4, 6, 8, 10, 12, 14],
        "pair": [0, 1, 4, 5, 8, 9, 12, 13],
        "triple": [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20],
    }[kind]
