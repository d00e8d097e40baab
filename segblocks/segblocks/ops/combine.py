"""`combine`: pixel buffer → image. High blocks as stored, low ones bilinear ×2."""

import torch
from torch import Tensor

from .library import define, define_gradient, stored_pixels

_PLACE = "Tensor slot, Tensor cells, int n_high, int block, bool legacy"


def _fake_combine(pixels, slot, cells, n_high, block, legacy, channels_last=True):
    n, gh, gw = slot.shape
    return torch.empty(
        (n, pixels.shape[1], gh * block, gw * block),
        dtype=pixels.dtype,
        device=pixels.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _fake_combine_backward(grad, slot, cells, n_high, block, legacy):
    return grad.new_empty((stored_pixels(n_high, cells.shape[0] - n_high, block), grad.shape[1]))


_combine = define(
    "combine", f"(Tensor pixels, {_PLACE}, bool channels_last=True) -> Tensor", _fake_combine
)
_combine_backward = define(
    "combine_backward", f"(Tensor grad, {_PLACE}) -> Tensor", _fake_combine_backward
)


def _setup_context(ctx, inputs, output):
    _, slot, cells, ctx.n_high, ctx.block, ctx.legacy, _ = inputs
    ctx.save_for_backward(slot, cells)


def _backward(ctx, grad):
    slot, cells = ctx.saved_tensors
    pixels = _combine_backward(grad, slot, cells, ctx.n_high, ctx.block, ctx.legacy)
    return pixels, None, None, None, None, None, None


define_gradient("combine", _setup_context, _backward)


def combine(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    legacy: bool = False,
    channels_last: bool = True,
) -> Tensor:
    """Join blocks of two resolutions into one image (paper section 3.2).

    A low block is resized by bilinear ×2 (align_corners=False) of the half-resolution picture, its
    neighbours' pixels included, clamped at the image border; `legacy` resizes each block alone,
    clamped at the block's own edge, as the published release did.

    Args:
        pixels: (P, C) contiguous pixel buffer.
        slot, cells, n_high: as from `build_slots`.
        block: side of a high block in pixels, even.

    Returns:
        (N, C, Gh*block, Gw*block), channels_last unless told otherwise.
    """
    return _combine(pixels, slot, cells, n_high, block, legacy, channels_last)
