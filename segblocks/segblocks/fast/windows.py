"""3×3 windows of small blocks as the rows of a matrix product, on the CPU."""

import torch
from torch import Tensor

from ..grid import BlockGrid
from ..tensor import DualResTensor
from .padded import Scratch, padded

# Side of a high block of the output. A convolution of blocks that small is mostly halo, and one for
# each resolution reads all weights again. From 4 on, products are no faster.
MOST = 2


def windows(x: DualResTensor, stride: int, scratch: Scratch, own: Scratch) -> Tensor:
    """(rows of the output, 9 C): what each output pixel of a 3×3 convolution reads, padded with 1,
    tap by tap; blocks in the order of the pixel buffer. It lies in `own`; `scratch` is used."""
    high, low = padded(x, 1, 1, 0.0, scratch)
    rows = high.shape[0] * high.shape[2] ** 2 + low.shape[0] * low.shape[2] ** 2
    blocks = scratch.rows(rows, x.pixels)  # where `padded` left them
    key = (windows, x.block, stride)
    if key not in x.grid.tables:
        x.grid.tables[key] = _index(x.grid, x.block, stride)
    index = x.grid.tables[key]
    found = own.rows(index.shape[0], blocks)
    torch.index_select(blocks, 0, index, out=found)
    return found.view(-1, 9 * blocks.shape[1])


def _index(grid: BlockGrid, block: int, stride: int) -> Tensor:
    """(rows · 9,) int32: the row of the padded blocks that each tap reads."""
    parts, start = [], 0
    for count, side in ((grid.n_high, block), (grid.n_low, block // 2)):
        width, tap = side + 2, torch.arange(3)
        place = torch.arange(0, side, stride)[:, None] + tap  # outputs of a line, taps
        inside = place[:, None, :, None] * width + place[None, :, None, :]  # y,x,dy,dx
        first = start + torch.arange(count) * width**2
        parts.append((first[:, None] + inside.flatten()).flatten())
        start += count * width**2
    return torch.cat(parts).int()
