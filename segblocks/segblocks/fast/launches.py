"""The launches of eager operations: what of them does not change is worked out once.

A launch then takes the addresses of what it reads and writes, nothing else.
"""

import functools

import torch
from torch import Tensor

from ..grid import BlockGrid
from ..ops.cuda.launch import Kernel, put
from ..ops.cuda.module import multiprocessors
from . import pending
from .buffers import new_rows
from .grid_tables import Key, table
from .norms import NormPlan, norm_plan, places
from .pending import Pending
from .pool_kernels import averages_kernel, pool_kernel
from .row_conv import Fused, Late, prepare_late
from .row_tiles import divide
from .sources import Source, hold
from .tables import Scale
from .weights import Packed

_new = tuple.__new__
_NO_NORM = (0, 0, 0, 0)


class Plan:
    """One convolution or pooling at one scale, in one precision on one device.

    Attributes:
        source, scale: sizes of what it reads and of what it makes; block: side of its high blocks.
        wide: it reads neighbours.
        own, table: keys of the neighbour tables that it reads; here: of the table that tells where
            the input's own pixels are, for averages.
        averages: rows that follow those of the input.
        channels: input, output.
        takes: `places` of batch norms that may follow.
        stored, extended: shapes of its output; tail: bytes of it before its averages.
    """

    name = "conv2d"

    def __init__(
        self,
        block: int,
        n_high: int,
        n_blocks: int,
        stride: int,
        kernel: int,
        channels: tuple[int, int],
        dtype: torch.dtype,
        index: int,
        device: torch.device,
    ):
        self.source = Scale.of(block, n_high, n_blocks)
        self.scale = Scale.of(block // stride, n_high, n_blocks)
        self.wide = kernel > 1
        self.taps = kernel * kernel
        self.own: Key = (self.scale.block, 1, True)
        self.table: Key = (block, stride, not self.wide)
        self.here: Key = (block, 1, True)
        self.averages = self.source.zero - self.source.rows + 1
        self.channels = channels
        self.dtype = dtype
        self.index = index
        self.device = device
        self.block = self.scale.block
        self.stored = (self.scale.rows, channels[1])
        self.extended = (self.scale.zero + 1, channels[1])
        self.tail = self.scale.rows * channels[1] * dtype.itemsize
        self.takes = places(channels[1], index, dtype)
        self._kernels: dict[tuple, Kernel] = {}
        self._normalised: NormPlan | None = None

    def reads(self, cell: Pending) -> bool:
        """Whether pixels fit this convolution."""
        made = cell.plan
        same = made.dtype is self.dtype and made.index == self.index
        return same and made.stored[1] == self.channels[0]

    def locate(self, value: Tensor | Pending, grid: BlockGrid) -> Source:
        """What the launch will read."""
        return locate(value, grid, self)

    def tables(self, grid: BlockGrid, stream: int) -> tuple[int, int]:
        """Addresses, for a launch on this stream, of the tables of where pixels are read and where
        they are written."""
        tables = grid.tables
        there, own = tables.get(self.table), tables.get(self.own)
        if there is None or own is None or stream not in grid.streams:
            there, own = table(grid, self.table, stream), table(grid, self.own, stream)
        return there, own

    def packed(self, weights: Packed) -> list[Tensor]:
        """What a launch reads that nobody but a cache holds."""
        return [weights.matrix, weights.shift]

    def normalised(self) -> "NormPlan":
        """A batch norm of what this one makes."""
        if self._normalised is None:
            self._normalised = norm_plan(self.stored, self.dtype, self.index, self.device)
        return self._normalised

    def run(self, cell: Pending, job: tuple, extend: bool) -> None:
        """A convolution and the steps behind it, see `Pending`."""
        (source, weights, grid, stream, _), steps, norm, addend = job
        if stream and torch.cuda.is_current_stream_capturing():
            grid.buffers.extend(self.packed(weights))  # the grid has to outlive the graph
        if source.watched is not None:
            source.check()
        added = 0
        if addend is not None:
            addend.check()
            added = addend.address
        if norm is None:
            key, statistics = (steps[-1:] == "r", extend, False, 0.0), _NO_NORM
        else:
            norm.check()
            key, statistics = (steps[-1:] == "r", extend, norm.place[2], norm.eps), norm.addresses
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = self._prepare(*key)
        shape = self.extended if extend else self.stored
        out = new_rows(shape, self.dtype, self.index, self.device)
        address = out.data_ptr()
        there, own = self.tables(grid, stream)
        parameters = kernel.pack(
            source.address,
            there,
            weights.address,
            weights.shift_address,
            0,
            0,
            own,
            added,
            0,
            0,
            0,
            address,
            0,
            0,
            source.averages,
            *statistics,
        )
        put(kernel, parameters + kernel.constants, self.index)
        if extend:
            cell.averages = address + self.tail
            cell.written = cell.later.writes
        cell.address = address
        cell.buffer = out

    def _prepare(self, relu: bool, averages: bool, kind: torch.dtype | bool, eps: float) -> Kernel:
        cin, cout = self.channels
        fused = Fused(taps=self.taps, averages=False, separate=self.wide, late=True)
        late = Late(relu, averages, kind is self.dtype, eps)
        return self._prepare_for(fused, late, self.taps * cin // 64, (cin, 0, cout))

    def _prepare_for(
        self,
        fused: Fused,
        late: Late,
        steps: int,
        channels: tuple[int, int, int],
        lines: tuple[int, int] = (0, 0),
    ) -> Kernel:
        cout, processors = channels[2], multiprocessors(self.index)
        return prepare_late(
            fused,
            late,
            divide(self.scale.rows, cout, steps, processors, may_split=False),
            self.scale,
            channels,
            -(-cout // 128) * 128,
            self.source.rows,
            self.dtype,
            self.index,
            lines,
        )


plan = functools.lru_cache(maxsize=4096)(Plan)


def locate(value: Tensor | Pending, grid: BlockGrid, wanted: Plan) -> Source:
    """The input of a convolution or pooling, computed by now, with averages if they are read."""
    wide = wanted.wide
    if type(value) is Pending:
        value.locate(wide)
        if wide and not value.averages:
            value.keep(averages_of(value.address, grid, wanted))
        return _new(Source, (value.address, value.averages, (value.buffer, value.kept), None, 0))
    found = hold(value)
    if not wide:
        return found
    made = averages_of(found.address, grid, wanted)
    return found._replace(averages=made.data_ptr(), holders=(value, made))


def averages_of(address: int, grid: BlockGrid, wanted: Plan) -> Tensor:
    """2×2 averages of the high blocks and a row of zeros: what follows in an extended buffer."""
    channels = wanted.channels[0]
    out = new_rows((wanted.averages, channels), wanted.dtype, wanted.index, wanted.device)
    kernel = averages_kernel(wanted.dtype, wanted.index, wanted.source.high_rows, channels)
    own = table(grid, wanted.here, pending.raw_stream(wanted.index))
    kernel.enqueue(wanted.index, address, own, out.data_ptr())
    return out


def pool(value: Tensor | Pending, grid: BlockGrid, wanted: Plan) -> Tensor:
    """3×3 max pooling with stride 2 into an extended buffer."""
    source = locate(value, grid, wanted)
    out = new_rows(wanted.extended, wanted.dtype, wanted.index, wanted.device)
    channels = wanted.channels[0]
    kernel = pool_kernel(wanted.dtype, wanted.index, wanted.source, wanted.scale, channels)
    there, own = wanted.tables(grid, pending.raw_stream(wanted.index))
    kernel.enqueue(wanted.index, source.address, there, own, out.data_ptr(), source.averages)
    return out
