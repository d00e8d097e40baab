"""What a convolution on blocks is, besides its tensors, and what that makes of their buffers."""

from typing import NamedTuple

from torch import Tensor

from ..grid import BlockGrid
from ..ops.batch_norm import blockpad_normalised, pads_normalised
from ..ops.blockpad import blockpad_backward
from ..ops.windows import Windows
from .window import Halo, pad_pixels, split_blocks


class Setting(NamedTuple):
    """What a convolution is, besides its tensors.

    Attributes:
        block, out_block: side of a high block before and after.
        halo: what the windows read around a block.
        stride, dilation, groups: as in PyTorch.
    """

    grid: BlockGrid
    block: int
    out_block: int
    halo: Halo | None
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1

    def padded(self, pixels: Tensor, norm: tuple[Tensor, bool] | None = None) -> Tensor:
        """Blocks with their halo, of what a batch norm makes of the pixels if there is one."""
        if norm is None:
            return pad_pixels(pixels, self.grid, self.block, self.halo).contiguous()
        where = (self.grid.slot, self.grid.cells, self.grid.n_high, self.block)
        return blockpad_normalised(pixels, *norm, *where, *self.halo.sides)

    def takes_prologue(self) -> bool:
        """Whether padding can make the pixels on its way."""
        halo = self.halo
        if halo is None or halo.replicate or halo.fill:
            return False
        return pads_normalised(halo.sides, self.block)

    def outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """High and low blocks of a buffer of outputs."""
        return split_blocks(pixels, self.grid, self.out_block)

    def new_output(self, like: Tensor, channels: int) -> Tensor:
        """An uninitialised buffer of outputs."""
        return like.new_empty((self.grid.stored_pixels(self.out_block), channels))

    def new_padded(self, like: Tensor, channels: int) -> Tensor:
        """An uninitialised buffer of blocks with their halo."""
        return like.new_empty((self.grid.stored_pixels(self.block, *self._more()), channels))

    def blocks(self, padded: Tensor) -> tuple[Tensor, Tensor]:
        """High and low blocks of a buffer of blocks with their halo."""
        return split_blocks(padded, self.grid, self.block, self.halo)

    def windows(self, kernel: tuple[int, int]) -> Windows:
        """What the outputs read of the padded blocks."""
        blocks = (self.grid.n_high, self.grid.n_low, self.block, *self._more())
        return Windows(*blocks, self.out_block, kernel, self.stride, self.dilation)

    def _more(self) -> tuple[int, int]:
        """Rows and columns of the halo."""
        left, right, top, bottom = self.halo.sides if self.halo else (0, 0, 0, 0)
        return top + bottom, left + right

    def gradient(self, padded: Tensor) -> Tensor:
        """Gradient of the pixel buffer from that of the blocks with their halo."""
        if self.halo is None:
            return padded
        where = (self.grid.slot, self.grid.cells, self.grid.n_high, self.block)
        return blockpad_backward(padded, *where, *self.halo.sides, self.halo.replicate)
