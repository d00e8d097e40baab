"""What every windowed operation shares: its halo, and running it on both resolutions at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import blockpad
from ..tensor import DualResTensor, Padding


@dataclass(frozen=True)
class Window:
    """One axis of a sliding window, in pixels."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int = 1

    @property
    def reach(self) -> int:
        return self.dilation * (self.kernel - 1)

    @property
    def halo_after(self) -> int:
        """Pixels past the block's last that its last output reads; negative: some are unread."""
        return self.reach - self.before - self.stride + 1


def axes(
    x: DualResTensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Window, Window]:
    """The vertical and the horizontal window, with what `F.pad` asked for added to `padding`."""
    extra = x.padding or Padding(0, 0, 0, 0)
    top, bottom, left, right = (
        padding[0] + extra.top,
        padding[0] + extra.bottom,
        padding[1] + extra.left,
        padding[1] + extra.right,
    )
    vertical = Window(kernel[0], stride[0], top, bottom, dilation[0])
    return vertical, Window(kernel[1], stride[1], left, right, dilation[1])


def output_block(
    x: DualResTensor, windows: tuple[Window, Window], name: str, ceil_mode: bool = False
) -> int:
    """Side of a high block after the operation.

    Raises:
        NotImplementedError: the output does not line up with the grid (as without padding).
        ValueError: the block is too small for the stride.
    """
    extra = (x.padding.bottom, x.padding.right) if x.padding else (0, 0)
    for window, cells, more in zip(windows, x.grid.mask.shape[1:], extra):
        size = cells * x.block
        span = size + window.before + window.after - window.reach - 1
        outputs = -(-span // window.stride) + 1 if ceil_mode else span // window.stride + 1
        if ceil_mode and (outputs - 1) * window.stride >= size + window.before + more:
            outputs -= 1  # the last window must start before the pooling's own trailing padding
        if outputs * window.stride != size and size % window.stride == 0:
            raise NotImplementedError(
                f"'{name}' with kernel {window.kernel}, stride {window.stride}, padding "
                f"({window.before}, {window.after}), dilation {window.dilation} turns {size} "
                f"pixels into {outputs}, which blocks cannot line up with; pad so that the output "
                f"has {size // window.stride}, or wrap it in segblocks.no_blocks"
            )
    stride = windows[0].stride
    if stride != windows[1].stride:
        raise NotImplementedError(
            f"'{name}' with stride {(stride, windows[1].stride)} would make blocks that are not "
            "square; wrap it in segblocks.no_blocks"
        )
    if x.block % (2 * stride):
        raise ValueError(
            f"'{name}' with stride {stride} on blocks of {x.block} pixels at this layer: a low "
            f"block of {x.block // 2} cannot be divided; choose a block_size that is a multiple "
            "of twice the network's stride, or wrap it in segblocks.no_blocks"
        )
    return x.block // stride


def with_halo(
    x: DualResTensor, windows: tuple[Window, Window], fill: float = 0.0
) -> tuple[Tensor, Tensor]:
    """High blocks (n_high, C, h, w) and low blocks, padded with the pixels the windows read."""
    vertical, horizontal = windows
    sides = (horizontal.before, horizontal.halo_after, vertical.before, vertical.halo_after)
    replicate = False
    if x.padding:
        replicate, fill = _agree_on_fill(x.padding, fill, sides)
    if max(sides) <= 0 and not (vertical.before or horizontal.before):
        return x.highres, x.lowres  # the windows stay inside the block
    return padded_blocks(x, sides, replicate, fill)


def padded_blocks(
    x: DualResTensor, sides: tuple[int, int, int, int], replicate: bool, fill: float
) -> tuple[Tensor, Tensor]:
    """`blockpad` by left, right, top, bottom, as views (n_high, C, h, w) and (n_low, C, h, w)."""
    left, right, top, bottom = sides
    grid, channels = x.grid, x.pixels.shape[1]
    height, width = x.block + top + bottom, x.block + left + right
    padded = blockpad(
        x.pixels.contiguous(),
        grid.slot,
        grid.cells,
        grid.n_high,
        x.block,
        *sides,
        replicate,
        fill,
    )
    rows = grid.n_high * height * width
    high = padded[:rows].view(grid.n_high, height, width, channels)
    half = x.block // 2
    low = padded[rows:].view(grid.n_low, height - half, width - half, channels)
    return high.permute(0, 3, 1, 2), low.permute(0, 3, 1, 2)


def _agree_on_fill(
    padding: Padding, fill: float, sides: tuple[int, int, int, int]
) -> tuple[bool, float]:
    """One kind of padding for a halo in which `F.pad` and the operation itself take part."""
    left, right, top, bottom = sides
    alone = (left, top) == (padding.left, padding.top)
    alone = alone and right <= padding.right and bottom <= padding.bottom
    # What F.pad crops, padding again would bring back.
    crops = min(padding.left, padding.right, padding.top, padding.bottom) < 0
    if alone or (padding.fill == fill and not padding.replicate and not crops):
        return padding.replicate, padding.fill
    kind = "replicate" if padding.replicate else "crop" if crops else padding.fill
    raise NotImplementedError(
        f"F.pad ({kind}) followed by an operation that pads again with {fill}; pad once, or wrap "
        "both in segblocks.no_blocks"
    )


def map_blocks(
    x: DualResTensor,
    function: Callable[[Tensor], Tensor],
    high: Tensor,
    low: Tensor,
    block: int,
) -> DualResTensor:
    """Apply `function` to the high and to the low blocks and store both in one buffer."""
    parts = [function(part) for part in (high, low) if part.shape[0]]
    rows = [part.permute(0, 2, 3, 1).reshape(-1, part.shape[1]) for part in parts]
    pixels = rows[0] if len(rows) == 1 else torch.cat(rows)
    return DualResTensor(pixels, x.grid, block)
