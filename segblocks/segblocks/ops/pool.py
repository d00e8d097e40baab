"""`max_pool`: max pooling of every block with what lies around it, without a padded copy."""

import torch
from torch import Tensor

from .library import define, stored_pixels

TAPS = 256  # a window's positions are kept in a byte each

_PLACE = "Tensor slot, Tensor cells, int n_high, int block"
_SIDES = "int left, int right, int top, int bottom, bool replicate"
_WINDOW = "int[2] kernel, int stride, int[2] dilation"


def _fake_max_pool(pixels, slot, cells, n_high, block, *rest):
    side = block // rest[-2]
    out = pixels.new_empty((stored_pixels(n_high, cells.shape[0] - n_high, side), pixels.shape[1]))
    return out, out.new_empty(out.shape, dtype=torch.uint8)


def _fake_max_pool_backward(grad, taps, slot, cells, n_high, block, *rest):
    return grad.new_empty((stored_pixels(n_high, cells.shape[0] - n_high, block), grad.shape[1]))


_max_pool = define(
    "max_pool",
    f"(Tensor pixels, {_PLACE}, {_SIDES}, float fill, {_WINDOW}) -> (Tensor, Tensor)",
    _fake_max_pool,
)
_max_pool_backward = define(
    "max_pool_backward",
    f"(Tensor grad, Tensor taps, {_PLACE}, {_SIDES}, {_WINDOW}) -> Tensor",
    _fake_max_pool_backward,
)


def max_pool(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    sides: tuple[int, int, int, int],
    replicate: bool,
    fill: float,
    kernel: tuple[int, int],
    stride: int,
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The largest pixel of every window over blocks that are padded as by `blockpad`.

    Args:
        pixels: (P, C) contiguous pixel buffer.
        slot, cells, n_high: as from `build_slots`.
        block: side of a high block in pixels, a multiple of twice the stride.
        sides, replicate, fill: left, right, top and bottom pads and what lies beyond the image, as
            of `blockpad`; with the window they must give block / stride outputs a side.
        kernel: height and width of the window, at most `TAPS` positions.

    Returns:
        (P', C) pixel buffer at block / stride pixels a high block side, and (P', C) uint8: which
        position of its window, row by row, each came from. That is the first of equals; a NaN wins,
        the last one.
    """
    where = (slot, cells, n_high, block)
    return _max_pool(pixels, *where, *sides, replicate, fill, kernel, stride, dilation)


def max_pool_backward(
    grad: Tensor,
    taps: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    sides: tuple[int, int, int, int],
    replicate: bool,
    kernel: tuple[int, int],
    stride: int,
    dilation: tuple[int, int],
) -> Tensor:
    """Gradient (P', C) of the pooled pixels, contiguous → gradient (P, C) of the pixels.

    Arguments as of `max_pool`, `taps` as it returned them.
    """
    where = (slot, cells, n_high, block)
    return _max_pool_backward(grad, taps, *where, *sides, replicate, kernel, stride, dilation)
