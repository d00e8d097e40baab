"""Neighbour tables and padded blocks as the fast path's kernels have them, by plain indexing."""

from itertools import product

import torch
import torch.nn.functional as F
from definition import slow_blocks
from torch import Tensor

from segblocks import DualResTensor


def stored_blocks(mask: Tensor) -> list[tuple[tuple[int, int, int], bool]]:
    """((n, gy, gx), high) of each stored block: the high ones first, each kind in raster order."""
    cells = list(product(*(range(size) for size in mask.shape)))
    return [(c, True) for c in cells if mask[c]] + [(c, False) for c in cells if not mask[c]]


def pixel_order(mask: Tensor, block: int) -> list[tuple[tuple[int, int, int], int, int]]:
    """(cell, y, x) of each matrix row: high blocks by 2×2 quads, low ones row by row."""
    order = []
    for cell, high in stored_blocks(mask):
        side = block if high else block // 2
        for y, x in product(range(0, side, 1 + high), range(0, side, 1 + high)):
            inner = product((0, 1), (0, 1)) if high else [(0, 0)]
            order += [(cell, y + dy, x + dx) for dy, dx in inner]
    return order


def buffer_index(mask: Tensor, block: int) -> dict:
    """Row of the extended buffer of ("high" | "low" | "mean", cell, y, x), and of "zero"."""
    index, row = {}, 0
    for cell, high in stored_blocks(mask):
        side = block if high else block // 2
        for y, x in product(range(side), range(side)):
            index["high" if high else "low", cell, y, x] = row
            row += 1
    for cell in (cell for cell, high in stored_blocks(mask) if high):
        for y, x in product(range(block // 2), range(block // 2)):
            index["mean", cell, y, x] = row
            row += 1
    return {**index, "zero": row}


def own_rows(mask: Tensor, block: int) -> Tensor:
    """(P,): where each row of the matrix product is stored."""
    index = buffer_index(mask, block)
    kind = {True: "high", False: "low"}
    rows = [index[kind[bool(mask[c])], c, y, x] for c, y, x in pixel_order(mask, block)]
    return torch.tensor(rows)


def neighbour_table(mask: Tensor, block: int, stride: int = 1) -> Tensor:
    """(9, rows of the output): the extended input row that each tap of a 3×3 window reads."""
    index = buffer_index(mask, block)
    order = pixel_order(mask, block // stride)
    return torch.tensor([
        [read_row(mask, index, block, c, y * stride + dy, x * stride + dx) for c, y, x in order]
        for dy, dx in product((-1, 0, 1), (-1, 0, 1))
    ])  # fmt: skip


def read_row(mask: Tensor, index: dict, block: int, cell: tuple, y: int, x: int) -> int:
    """The row holding pixel (y, x), counted from the corner of `cell` at its own resolution."""
    n, gy, gx = cell
    high = bool(mask[cell])
    side = block if high else block // 2
    at_y, at_x = gy * side + y, gx * side + x
    if not (0 <= at_y < mask.shape[1] * side and 0 <= at_x < mask.shape[2] * side):
        return index["zero"]
    there, y, x = (n, at_y // side, at_x // side), at_y % side, at_x % side
    if mask[there]:
        return index["high" if high else "mean", there, y, x]
    return index["low", there, y // 2, x // 2] if high else index["low", there, y, x]


def extended(blocks: DualResTensor) -> Tensor:
    """Pixels, 2×2 averages of the high blocks, one row of zeros."""
    pixels = blocks.pixels
    means = (
        F.avg_pool2d(blocks.highres.double(), 2).permute(0, 2, 3, 1).reshape(-1, pixels.shape[1])
    )
    return torch.cat((pixels, means.to(pixels.dtype), pixels.new_zeros(1, pixels.shape[1])))


def padded_blocks(image: Tensor, mask: Tensor) -> Tensor:
    """(padded pixels, 4): every block of the image with three pixels round it, high ones first."""
    slow = slow_blocks(image, mask)
    pictures = {high: F.pad(x, (3, 3, 3, 3)) for high, x in ((True, slow.H), (False, slow.L))}
    rows = []
    for (n, gy, gx), high in stored_blocks(mask):
        side = image.shape[2] // mask.shape[1] // (1 if high else 2)
        top, left = gy * side, gx * side
        part = pictures[high][n, :, top : top + side + 6, left : left + side + 6]
        rows.append(part.permute(1, 2, 0).reshape(-1, image.shape[1]))
    return F.pad(torch.cat(rows), (0, 4 - image.shape[1]))


def stem_places(mask: Tensor, block: int) -> Tensor:
    """(rows of the stem's output,): half the padded pixel at which each window starts."""
    starts, start = {}, 0
    for cell, high in stored_blocks(mask):
        starts[cell] = start
        start += (block if high else block // 2) ** 2 + 12 * (block if high else block // 2) + 36
    places = []
    for cell, y, x in pixel_order(mask, block // 2):
        width = (block if mask[cell] else block // 2) + 6
        places.append((starts[cell] + 2 * y * width + 2 * x) // 2)
    return torch.tensor(places)
