"""`split`: image → pixel buffer. High blocks keep their pixels, low ones hold 2×2 averages."""

import torch
from torch import Tensor

from .library import define, define_gradient, stored_pixels

_PLACE = "Tensor slot, Tensor cells, int n_high, int block"


def _fake_split(image, slot, cells, n_high, block):
    return image.new_empty((stored_pixels(n_high, cells.shape[0] - n_high, block), image.shape[1]))


def _fake_split_backward(grad, slot, cells, n_high, block, channels_last):
    n, gh, gw = slot.shape
    return torch.empty(
        (n, grad.shape[1], gh * block, gw * block),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


_split = define("split", f"(Tensor image, {_PLACE}) -> Tensor", _fake_split)
_split_backward = define(
    "split_backward", f"(Tensor grad, {_PLACE}, bool channels_last) -> Tensor", _fake_split_backward
)


def _setup_context(ctx, inputs, output):
    image, slot, cells, ctx.n_high, ctx.block = inputs
    ctx.channels_last = image.is_contiguous(memory_format=torch.channels_last)
    ctx.save_for_backward(slot, cells)


def _backward(ctx, grad):
    slot, cells = ctx.saved_tensors
    grad = grad.contiguous()
    image = _split_backward(grad, slot, cells, ctx.n_high, ctx.block, ctx.channels_last)
    return image, None, None, None, None


define_gradient("split", _setup_context, _backward)


def split(image: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int) -> Tensor:
    """Cut an image into blocks of two resolutions (paper section 3.2).

    Args:
        image: (N, C, Gh*block, Gw*block), contiguous or channels_last.
        slot, cells, n_high: as from `build_slots`.
        block: side of a high block in pixels, even.

    Returns:
        (P, C) pixel buffer: high blocks block×block row by row, then low blocks at half the side.
    """
    return _split(image, slot, cells, n_high, block)
