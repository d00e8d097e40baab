"""What the tiles of the patch convolution read and write, by plain indexing (patch_tiles.cuh)."""

from dataclasses import dataclass
from itertools import product

from neighbours import buffer_index, read_row, stored_blocks
from torch import Tensor

# How blocks with sides of so many pixels are cut; other sides are rows of the neighbour table.
HIGH_KINDS = {32: "tall", 16: "tall", 24: "pair", 8: "pair"}
LOW_KINDS = HIGH_KINDS | {4: "woven"}
LINES, WIDTH = 16, 8  # of a tile


@dataclass
class TileByHand:
    """One tile of 128 pixels.

    Attributes:
        kind: "tall", "pair" or "woven".
        inputs: rows of the input in the order in which they are staged.
        outputs: (128,) row of each pixel, the row of zeros where there is none.
        averages: (32,) row of each average, -1 where there is none.
    """

    kind: str
    inputs: list[int]
    outputs: list[int]
    averages: list[int]

    def staged_at(self, line: int, x: int, dy: int, dx: int) -> int:
        """Where pixel `x` of `line` finds what tap (dy, dx) reads, each 0 to 2, in `inputs`."""
        if self.kind == "woven":  # lines are places of a block, row by row, of eight blocks
            return ((line // 4 + dy) * 6 + line % 4 + dx) * 8 + x
        lines_down = {"tall": 1, "pair": 2}[self.kind]
        return (line + lines_down * dy) * 10 + x + dx


def tiles_by_hand(mask: Tensor, block: int, high: bool) -> list[TileByHand]:
    """The tiles of the high or of the low blocks of a grid, in order."""
    side = block if high else block // 2
    kind = kinds_of(high)[side]
    blocks = [cell for cell, is_high in stored_blocks(mask) if is_high == high]
    size = {"tall": (16, 8), "pair": (8, 8), "woven": (4, 4)}[kind]
    corners = list(product(range(0, side, size[0]), range(0, side, size[1])))
    patches = [(cell, *corner) for cell in blocks for corner in corners]
    each = LINES * WIDTH // (size[0] * size[1])
    index = buffer_index(mask, block)
    return [
        _tile(mask, index, block, kind, high, patches[start : start + each])
        for start in range(0, len(patches), each)
    ]


def _tile(mask, index, block, kind, high, patches) -> TileByHand:
    half = block // 2

    def read(patch: int, y: int, x: int) -> int:
        if patch >= len(patches):
            return index["zero"]
        cell, top, left = patches[patch]
        return read_row(mask, index, block, cell, top + y, left + x)

    def pixel(line: int, x: int) -> tuple[int, int, int]:
        """Patch, and place in it."""
        if kind == "woven":  # pixel by pixel in turn
            return x, line // 4, line % 4
        if kind == "pair":
            return line % 2, line // 2, x
        return 0, line, x

    def average(line: int, x: int) -> int:
        patch, y, x = pixel(line, x)
        if patch >= len(patches):
            return -1
        cell, top, left = patches[patch]
        y, x = (top + y) // 2, (left + x) // 2
        on_edge = y in (0, half - 1) or x in (0, half - 1)
        return index["mean", cell, y, x] if on_edge else -1

    if kind == "tall":
        inputs = [read(0, y, x) for y in range(-1, 17) for x in range(-1, 9)]
    elif kind == "pair":
        inputs = [read(i, y, x) for y in range(-1, 9) for i in (0, 1) for x in range(-1, 9)]
    else:
        inputs = [read(i, y, x) for y in range(-1, 5) for x in range(-1, 5) for i in range(8)]
    outputs = [read(*pixel(line, x)) for line in range(LINES) for x in range(WIDTH)]
    averages = [-1] * 32
    if high:
        upper = upper_lines(kind)
        # Of eight averages, the even ones lie on one pair of lines and the odd ones on another.
        averages = [average(upper[n // 8 * 2 + n % 2], n % 8 // 2 * 2) for n in range(32)]
    return TileByHand(kind, inputs, outputs, averages)


def kinds_of(high: bool) -> dict[int, str]:
    return HIGH_KINDS if high else LOW_KINDS


def upper_lines(kind: str) -> list[int]:
    """The upper line of each of the eight pairs of lines whose quads are averaged, in order."""
    return {
        "tall": [0, 2, 4, 6, 8, 10, 12, 14],
        "pair": [0, 1, 4, 5, 8, 9, 12, 13],
    }[kind]


LINES_APART = {"tall": 1, "pair": 2}
