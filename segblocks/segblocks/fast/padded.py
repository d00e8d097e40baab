"""Padded blocks on the CPU: one gather through an index that is built once per grid and scale."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import BlockGrid
from ..tensor import DualResTensor

_ZERO = -1  # in an index being built: beyond the image; -2 - row: the mean of the quad at that row


@dataclass(frozen=True)
class PaddedIndex:
    """Where each pixel of the padded blocks comes from.

    Attributes:
        rows: (Q,) int32 rows of the pixel buffer: padded high blocks row by row, then low ones.
        outside: (Z,) int64 places among the Q that lie beyond the image.
        means: (M,) int64 places that hold the mean of four pixels; quads: (4 M,) int32 their rows.
    """

    rows: Tensor
    outside: Tensor
    means: Tensor
    quads: Tensor


class Scratch:
    """Memory for padded blocks, which live for one operation: used again, so mapped only once."""

    def __init__(self):
        self._memory = torch.empty(0)

    def rows(self, count: int, like: Tensor) -> Tensor:
        """(count, C) of like's dtype; what was handed out before is overwritten."""
        wanted = count * like.shape[1]
        if self._memory.numel() < wanted or self._memory.dtype != like.dtype:
            self._memory = like.new_empty(wanted)
        return self._memory[:wanted].view(count, like.shape[1])


def padded(
    x: DualResTensor, before: int, after: int, fill: float | None, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """High blocks (n_high, C, b', b') and low blocks (n_low, C, b'', b''), channels_last.

    The values of `ops.blockpad` by `before` pixels at the left and the top and `after` at the
    right and the bottom; beyond the image lies `fill`, or the nearest pixel if that is None.
    They lie in `scratch`.
    """
    grid, more = x.grid, before + after
    key = (PaddedIndex, x.block, before, after, fill is None)
    if key not in grid.tables:
        grid.tables[key] = _index(grid, x.block, before, after, fill is None)
    index = grid.tables[key]
    pixels = x.pixels.contiguous()
    out = scratch.rows(index.rows.shape[0], pixels)
    torch.index_select(pixels, 0, index.rows, out=out)
    if index.means.numel():
        quads = pixels.index_select(0, index.quads).view(-1, 4, pixels.shape[1])
        out.index_copy_(0, index.means, quads.mean(1))
    if index.outside.numel():
        out[index.outside] = fill
    high, low, channels = x.block + more, x.block // 2 + more, pixels.shape[1]
    first = grid.n_high * high**2
    return (
        out[:first].view(grid.n_high, high, high, channels).permute(0, 3, 1, 2),
        out[first:].view(grid.n_low, low, low, channels).permute(0, 3, 1, 2),
    )


def padded_image(image: Tensor, grid: BlockGrid, pad: int) -> tuple[Tensor, Tensor]:
    """The blocks of an image (N, C, H, W), split and padded with zeros by `pad`: high and low.

    Split and pad in one: the pictures that blocks read are built whole and cut with their halo.
    """
    height, width = image.shape[2:]
    block = height // grid.mask.shape[1]
    image = image.contiguous(memory_format=torch.channels_last)
    # The mean of every four pixels, several times as fast as average pooling of three channels.
    half = F.interpolate(image, scale_factor=0.5, mode="bilinear")
    full = F.pad(image, (pad,) * 4).permute(0, 2, 3, 1)
    tiles = full[:, pad : pad + height, pad : pad + width]
    tiles = tiles.unflatten(1, (-1, block)).unflatten(3, (-1, block)).transpose(2, 3)
    place = _places(grid, grid.cells[grid.n_high :])
    low = half.permute(0, 2, 3, 1).unflatten(1, (-1, block // 2)).unflatten(3, (-1, block // 2))
    low = low.transpose(2, 3)[place]  # n_low,b/2,b/2,C
    rim = min(block // 2, -(-pad // 2))  # more of a low block is not read
    for start, stop in ((0, rim), (block // 2 - rim, block // 2)):
        small, large = slice(start, stop), slice(2 * start, 2 * stop)
        tiles[:, :, :, large][place] = _repeat(low[:, small])
        tiles[:, :, :, :, large][place] = _repeat(low[:, :, small])
    half = F.pad(half, (pad,) * 4).permute(0, 2, 3, 1)
    cut = (
        _windows(full, block, pad)[_places(grid, grid.cells[: grid.n_high])],
        _windows(half, block // 2, pad)[place],
    )
    return tuple(x.permute(0, 3, 1, 2) for x in cut)


def join(x: DualResTensor, scratch: Scratch) -> Tensor:
    """`x.combine()` of floating-point pixels with their channels first: (N, C, H, W)."""
    (n, gh, gw), channels = x.grid.mask.shape, x.pixels.shape[1]
    pixels = x.pixels.new_empty((n, gh, x.block, gw, x.block, channels))
    tiles = pixels.transpose(2, 3)
    cells, n_high = x.grid.cells, x.grid.n_high
    tiles[_places(x.grid, cells[:n_high])] = x.highres.permute(0, 2, 3, 1)
    if x.grid.n_low:
        tiles[_places(x.grid, cells[n_high:])] = _enlarge(padded(x, 1, 1, None, scratch)[1])
    return pixels.view(n, gh * x.block, gw * x.block, channels).permute(0, 3, 1, 2)


def double(x: DualResTensor, scratch: Scratch) -> DualResTensor:
    """Bilinear ×2 without seams, in a buffer of its own."""
    parts = [
        _enlarge(part).flatten(0, 2) for part in padded(x, 1, 1, None, scratch) if part.shape[0]
    ]
    return x.like(torch.cat(parts), 2 * x.block)


def _enlarge(blocks: Tensor) -> Tensor:
    """Blocks (n, C, h+2, h+2), padded by one, enlarged to (n, 2h, 2h, C)."""
    large = F.interpolate(blocks, scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
    return large[:, 2:-2, 2:-2]


def _repeat(blocks: Tensor) -> Tensor:
    return blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)


def _places(grid: BlockGrid, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of cells in the grid."""
    _, gh, gw = grid.mask.shape
    cells = cells.long()
    return cells // (gh * gw), cells // gw % gh, cells % gw


def _windows(picture: Tensor, side: int, pad: int) -> Tensor:
    """Views (N, Gh, Gw, side+2·pad, side+2·pad, C) of a picture (N, H+2·pad, W+2·pad, C)."""
    n, height, width, channels = picture.shape
    gh, gw = (height - 2 * pad) // side, (width - 2 * pad) // side
    image, row, column, channel = picture.stride()
    return picture.as_strided(
        (n, gh, gw, side + 2 * pad, side + 2 * pad, channels),
        (image, side * row, side * column, row, column, channel),
    )


def _index(grid: BlockGrid, block: int, before: int, after: int, replicate: bool) -> PaddedIndex:
    """Both pictures as rows of the buffer, padded, cut into windows, and what is special."""
    half, slot = block // 2, grid.slot[:, :, None, :, None]  # N,Gh,1,Gw,1
    high = slot >= 0
    side = torch.arange(block, dtype=torch.int32)
    inside_high = _offsets(side, side, block)
    inside_low = _offsets(side // 2, side // 2, half)
    start = torch.where(high, slot * block**2, grid.n_high * block**2 + (-1 - slot) * half**2)
    full = start + torch.where(high, inside_high, inside_low)  # N,Gh,b,Gw,b
    side = side[:half]
    quad = -2 - start - _offsets(2 * side, 2 * side, block)
    small = torch.where(high, quad, start + _offsets(side, side, half))  # N,Gh,b/2,Gw,b/2

    parts = []
    cells = (grid.cells[: grid.n_high], grid.cells[grid.n_high :])
    for picture, part, length in zip((full, small), cells, (block, half)):
        picture = _surround(picture.flatten(1, 2).flatten(2, 3), before, after, replicate)
        n, gh, gw = grid.mask.shape
        image, row, _ = picture.stride()
        window = length + before + after
        shape, strides = (n, gh, gw, window, window), (image, length * row, length, row, 1)
        parts.append(picture.as_strided(shape, strides)[_places(grid, part)].flatten())
    rows = torch.cat(parts)
    special = (rows < 0).nonzero()[:, 0]
    code = rows[special]
    is_mean = code != _ZERO
    corners = (-2 - code[is_mean])[:, None] + rows.new_tensor([0, 1, block, block + 1])
    rows[special] = 0
    return PaddedIndex(rows, special[~is_mean], special[is_mean], corners.flatten())


def _offsets(y: Tensor, x: Tensor, width: int) -> Tensor:
    """(len(y), 1, len(x)): the row of each pixel inside a block `width` pixels wide."""
    return (y[:, None] * width + x)[:, None]


def _surround(picture: Tensor, before: int, after: int, replicate: bool) -> Tensor:
    """(N, H, W) rows with those beyond the image around them."""
    if not replicate:
        return F.pad(picture, (before, after, before, after), value=_ZERO)
    for dim in (1, 2):
        length = picture.shape[dim]
        place = torch.arange(-before, length + after).clamp_(0, length - 1)
        picture = picture.index_select(dim, place)
    return picture
