"""Which block is where: bookkeeping of one grid, built once and shared by a forward pass."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .fast.later import Later
from .ops import build_slots
from .ops.library import stored_pixels


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """Bookkeeping of a block grid, compared by identity: one object serves one forward pass.

    Attributes:
        mask: (N, Gh, Gw) bool, True = high (full) resolution.
        slot: (N, Gh, Gw) int32; the rank of a high block among the high blocks in raster order,
            -1 - rank among the low blocks for a low one.
        cells: (N*Gh*Gw,) int32; the flat cell of each stored block, the high ones first.
        n_high: number of high blocks, known on the host because it sets the shapes.
        legacy_upsample: bilinear resizing inside each block alone, as the published release did.
        tables: addresses of the neighbour tables that have been made for this grid so far;
            buffers: what holds them; streams: the one that they were made on, then those that have
            waited for it.
        shape: N, Gh, Gw; n_blocks: their product.
    """

    mask: Tensor
    slot: Tensor
    cells: Tensor
    n_high: int
    legacy_upsample: bool = False
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)
    buffers: list[Tensor] = field(default_factory=list, repr=False)
    streams: list[int] = field(default_factory=list, repr=False)
    shape: tuple[int, int, int] = field(init=False)
    n_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        n, gh, gw = self.mask.shape
        object.__setattr__(self, "shape", (n, gh, gw))
        object.__setattr__(self, "n_blocks", n * gh * gw)

    @classmethod
    def from_mask(
        cls, mask: Tensor, n_high: int | None = None, legacy_upsample: bool = False
    ) -> "BlockGrid":
        """Build the bookkeeping of `mask` on its own device.

        Args:
            mask: (N, Gh, Gw) bool, True = high resolution.
            n_high: the number of True cells where the caller knows it (a fixed budget); without
                it, one value is read back from the device.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3:
            given = (
                f"{mask.dtype} of shape {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else type(mask).__name__
            )
            raise TypeError(f"grid must be a bool tensor (N, Gh, Gw); got {given}")
        if mask.numel() == 0:
            raise ValueError(f"grid has no blocks: shape {tuple(mask.shape)}")
        slot, cells = build_slots(mask)
        if n_high is None:
            n_high = int(mask.sum())
        return cls(mask, slot, cells, n_high, legacy_upsample)

    @property
    def n_low(self) -> int:
        return self.n_blocks - self.n_high

    @cached_property
    def later(self) -> Later:
        """Operations on tensors of this grid that have been put off."""
        return Later()

    @cached_property
    def image_of_block(self) -> Tensor:
        """(N*Gh*Gw,) int64: the image in the batch that each stored block belongs to."""
        return (self.cells // (self.shape[1] * self.shape[2])).long()

    def stored_pixels(self, block: int, more_y: int = 0, more_x: int = 0) -> int:
        """P, for high blocks of `block` pixels a side; see `library.stored_pixels`."""
        return stored_pixels(self.n_high, self.n_low, block, more_y, more_x)

    def image_of_pixel(self, block: int) -> Tensor:
        """(P,) int64: the image in the batch that each stored pixel belongs to."""
        high = self.image_of_block[: self.n_high].repeat_interleave(block * block)
        low = self.image_of_block[self.n_high :].repeat_interleave((block // 2) ** 2)
        return torch.cat((high, low))
