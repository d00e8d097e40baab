"""The first convolution of eager networks, on the image itself: 3×3 or 7×7, stride 2."""

import functools

import torch
from torch import Tensor

from ..dispatch import current_recorder
from ..grid import BlockGrid
from ..ops import split
from ..ops.cuda.launch import Kernel
from ..ops.library import launches_directly
from . import pending
from .buffers import new_rows
from .grid_tables import table
from .launches import Plan
from .norms import NormPlan, Place, norm_plan, places
from .pending import Pending
from .row_conv import Fused, Late
from .sources import Source
from .stem import is_packed, padded_lines, prepare_padded, stem_places
from .weights import Packed

CHANNELS = 3
_WHOLE = "nar"  # steps behind which nothing joins the launch
_inference = torch.is_inference_mode_enabled


class Cut:
    """An image (N, 3, H, W) cut into blocks, as a plan."""

    name = "to_blocks"

    def __init__(self, image: Tensor, grid: BlockGrid, block: int):
        self.stored = (grid.stored_pixels(block), CHANNELS)
        self.dtype = image.dtype
        self.index = image.get_device()
        self.device = image.device

    @property
    def takes(self) -> frozenset[Place]:
        """`places` of batch norms of the pixels."""
        return places(CHANNELS, self.index, self.dtype)

    def normalised(self) -> NormPlan:
        """A batch norm of the pixels."""
        return norm_plan(self.stored, self.dtype, self.index, self.device)

    def run(self, cell: Pending, job: tuple, extend: bool) -> None:
        """See `Pending`."""
        image, version, grid, block, *_ = job[0]
        if image._version != version:
            raise RuntimeError(
                "the image was changed in place while the network that it was given to had not "
                "read it; wait for the output, or cut it beforehand (segblocks.to_blocks)"
            )
        cell.buffer = split(image.detach(), grid.slot, grid.cells, grid.n_high, block)
        cell.address = cell.buffer.data_ptr()


def cut(image: Tensor, grid: BlockGrid, block: int, at_once: bool) -> Tensor | Pending:
    """Pixels that know the image that they were cut from, while neither changes.

    Args:
        at_once: False: they may be cut when they are read.
    """
    if image.is_inference() or not launches_directly(image):
        return split(image, grid.slot, grid.cells, grid.n_high, block)
    later, plan = grid.later, Cut(image, grid, block)
    stream = pending.raw_stream(plan.index)
    call = (image, image._version, grid, block, stream, _inference())
    cell = Pending(plan, later, (call, _WHOLE, None, None), _WHOLE)
    cell.picture, cell.written = (image, image._version), later.writes
    if at_once or current_recorder() is not None:
        cell.compute()
    else:
        later.add(cell, stream)
    return cell


class StemPlan(Plan):
    """The first convolution at one size, in one precision on one device."""

    def __init__(
        self,
        block: int,
        n_high: int,
        n_blocks: int,
        kernel: int,
        cout: int,
        dtype: torch.dtype,
        index: int,
        device: torch.device,
    ):
        size = (block, n_high, n_blocks)
        super().__init__(*size, 2, kernel, (CHANNELS, cout), dtype, index, device)
        self.lines = padded_lines(block)
        # Where windows begin in the padded blocks, the same for every grid of this many high ones.
        self.places = stem_places(self.scale, n_high, n_blocks, block, device)
        if device.type == "cuda":  # the plan may serve other streams next
            torch.cuda.current_stream(device).synchronize()
        self._padded = functools.lru_cache(maxsize=64)(prepare_padded)

    def reads(self, cell: Pending) -> bool:
        """Whether these are pixels of an image that still is what they were cut from."""
        later, picture = cell.later, cell.picture
        if picture is None or later.exposed or later.writes != cell.written:
            return False
        image, version = picture
        return image.dtype is self.dtype and image._version == version and super().reads(cell)

    def locate(self, value: Pending, grid: BlockGrid) -> Source:
        """The image as padded blocks, made by now: it may change before the convolution runs."""
        image, block = value.picture[0], self.source.block
        setting = (grid.shape, grid.n_high, block, self.dtype, self.index)
        rows, kernel = self._padded(*setting, image.stride(), is_packed(image))
        out = new_rows((rows, 4), self.dtype, self.index, self.device)
        address = out.data_ptr()
        where = (grid.slot.data_ptr(), grid.cells.data_ptr())
        kernel.enqueue(self.index, image.data_ptr(), address, *where)
        return Source(address, 0, (out,))

    def tables(self, grid: BlockGrid, stream: int) -> tuple[int, int]:
        """See `Plan`."""
        return self.places.data_ptr(), table(grid, self.own, stream)

    def packed(self, weights: Packed) -> list[Tensor]:
        """See `Plan`."""
        return [*super().packed(weights), self.places]

    def _prepare(self, relu: bool, averages: bool, kind: torch.dtype | bool, eps: float) -> Kernel:
        fused = Fused(taps=1, averages=False, stem=True, late=True)
        late = Late(relu, averages, kind is self.dtype, eps)
        return self._prepare_for(fused, late, 4, (64, 0, self.channels[1]), self.lines)


stem_plan = functools.lru_cache(maxsize=16)(StemPlan)  # each holds a table on the device
