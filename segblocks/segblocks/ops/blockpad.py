"""`blockpad`: give every block a halo of its neighbours' pixels (BlockPad, paper section 3.3)."""

from torch import Tensor

from .library import define, define_gradient, stored_pixels

_PLACE = "Tensor slot, Tensor cells, int n_high, int block"
_SIDES = "int left, int right, int top, int bottom, bool replicate"


def _fake_blockpad(pixels, slot, cells, n_high, block, left, right, top, bottom, replicate, fill):
    rows = stored_pixels(n_high, cells.shape[0] - n_high, block, top + bottom, left + right)
    return pixels.new_empty((rows, pixels.shape[1]))


def _fake_blockpad_backward(grad, slot, cells, n_high, block, left, right, top, bottom, replicate):
    return grad.new_empty((stored_pixels(n_high, cells.shape[0] - n_high, block), grad.shape[1]))


_blockpad = define(
    "blockpad", f"(Tensor pixels, {_PLACE}, {_SIDES}, float fill) -> Tensor", _fake_blockpad
)
blockpad_backward = define(
    "blockpad_backward", f"(Tensor grad, {_PLACE}, {_SIDES}) -> Tensor", _fake_blockpad_backward
)


def _setup_context(ctx, inputs, output):
    _, slot, cells, ctx.n_high, ctx.block, *ctx.sides, _ = inputs
    ctx.save_for_backward(slot, cells)


def _backward(ctx, grad):
    slot, cells = ctx.saved_tensors
    pixels = blockpad_backward(grad.contiguous(), slot, cells, ctx.n_high, ctx.block, *ctx.sides)
    return (pixels, *(None,) * 10)


define_gradient("blockpad", _setup_context, _backward)


def blockpad(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    replicate: bool = False,
    fill: float = 0.0,
) -> Tensor:
    """Pad every block with the pixels that lie around it in the picture of its own resolution.

    A high block reads the full-resolution picture, in which stored low pixels repeat 2×2; a low
    block reads the half-resolution picture, in which stored high pixels are averaged 2×2. Beyond
    the image a pixel is `fill`, or with `replicate` the nearest pixel of the image.

    Args:
        pixels: (P, C) contiguous pixel buffer.
        slot, cells, n_high: as from `build_slots`.
        block: side of a high block in pixels, even.
        left, right, top, bottom: pixels to add at each side, in pixels of the block's own
            resolution; negative crops; may be wider than a block.

    Returns:
        (P', C): the padded high blocks, then the padded low blocks, each row by row.
    """
    return _blockpad(pixels, slot, cells, n_high, block, left, right, top, bottom, replicate, fill)
