"""Bilinear enlargement of blocks by a whole factor, as eager networks repeat it."""

import functools

import torch

from ..grid import BlockGrid
from ..ops.cuda.upsample import plan as plan_upsample
from ..ops.library import stored_pixels
from ..rules.resize import find_scale
from . import pending
from .buffers import new_rows
from .norms import NormPlan, norm_plan, places
from .pending import Pending


class Enlargement:
    """An enlargement at one scale, in one precision on one device.

    Attributes:
        block: side of a high block of the output; stored: its shape.
    """

    def __init__(
        self,
        block: int,
        shape: tuple[int, int, int],
        n_high: int,
        scale: int,
        channels: int,
        dtype: torch.dtype,
        index: int,
        device: torch.device,
    ):
        n_low = shape[0] * shape[1] * shape[2] - n_high
        rows = stored_pixels(n_high, n_low, block) * scale**2
        self.block = block * scale
        self.stored = (rows, channels)
        self.dtype = dtype
        self.index = index
        self.device = device
        self.takes = places(channels, index, dtype)
        self._kernel = plan_upsample(
            "upsample", index, dtype, shape, channels, n_high, block, scale, False, 16
        )

    def normalised(self) -> NormPlan:
        """A batch norm of what this one makes."""
        return norm_plan(self.stored, self.dtype, self.index, self.device)

    def run(self, address: int, grid: BlockGrid) -> Pending:
        """The enlarged pixels of those at an address."""
        cell = Pending(self, grid.later, None, stream=pending.raw_stream(self.index))
        out = new_rows(self.stored, self.dtype, self.index, self.device)
        cell.buffer, cell.address = out, out.data_ptr()
        slot, cells = grid.slot.data_ptr(), grid.cells.data_ptr()
        self._kernel.enqueue(self.index, address, cell.address, slot, cells)
        return cell


@functools.lru_cache(maxsize=1024)
def enlargement(
    block: int,
    shape: tuple[int, int, int],
    n_high: int,
    size: tuple | int | None,
    factor: float | tuple | None,
    channels: int,
    dtype: torch.dtype,
    index: int,
    device: torch.device,
) -> Enlargement | None:
    """`F.interpolate` to a size or by a factor; None where that is no whole factor above 1."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    scale = find_scale(block, *shape[1:], size, factor)
    if scale.denominator != 1 or scale == 1:
        return None
    return Enlargement(block, shape, n_high, scale.numerator, channels, dtype, index, device)
