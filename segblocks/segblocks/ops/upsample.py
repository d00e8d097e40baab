"""`upsample`: bilinear enlargement of every block by a whole factor, without seams."""

from torch import Tensor

from .library import define, define_gradient, stored_pixels

_PLACE = "Tensor slot, Tensor cells, int n_high, int block, int scale, bool legacy"


def _fake_upsample(pixels, slot, cells, n_high, block, scale, legacy):
    rows = stored_pixels(n_high, cells.shape[0] - n_high, block * scale)
    return pixels.new_empty((rows, pixels.shape[1]))


def _fake_upsample_backward(grad, slot, cells, n_high, block, scale, legacy):
    return grad.new_empty((stored_pixels(n_high, cells.shape[0] - n_high, block), grad.shape[1]))


_upsample = define("upsample", f"(Tensor pixels, {_PLACE}) -> Tensor", _fake_upsample)
_upsample_backward = define(
    "upsample_backward", f"(Tensor grad, {_PLACE}) -> Tensor", _fake_upsample_backward
)


def _setup_context(ctx, inputs, output):
    _, slot, cells, *ctx.rest = inputs
    ctx.save_for_backward(slot, cells)


def _backward(ctx, grad):
    slot, cells = ctx.saved_tensors
    return (_upsample_backward(grad.contiguous(), slot, cells, *ctx.rest), *(None,) * 6)


define_gradient("upsample", _setup_context, _backward)


def upsample(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    scale: int,
    legacy: bool = False,
) -> Tensor:
    """Bilinear enlargement (align_corners=False) of the picture of each block's own resolution.

    Neighbours count across block borders and the image border clamps; `legacy` resizes each block
    alone, clamped at the block's own edge, as the published release did.

    Args:
        pixels: (P, C) contiguous pixel buffer at `block` pixels a high block side.
        slot, cells, n_high: as from `build_slots`.
        scale: 2 or more.

    Returns:
        (P', C) pixel buffer at block*scale pixels a high block side.
    """
    return _upsample(pixels, slot, cells, n_high, block, scale, legacy)
