"""Runs the fused steps of a network on our own kernels, for one grid on the device."""

import math
from typing import Any

import torch
from torch import Tensor

from ..grid import BlockGrid
from ..ops.cuda.module import multiprocessors
from ..structure import map_structure
from ..tensor import DualResTensor, to_blocks
from . import row_tiles
from .depthwise import convolve_depthwise, pack_depthwise
from .front import Front, begin
from .packing import Packed, pack
from .patches import convolve_patches
from .row_conv import Fused, convolve
from .row_tiles import ON_HOPPER, STEP, Tiles
from .stem import (
    convolve_stem,
    extend,
    fill_averages,
    has_adjacent_channels,
    max_pool,
    padded_lines,
    split_extended,
    stem_places,
)
from .steps import (
    ConvStep,
    DepthwiseStep,
    ExcursionStep,
    PlainStep,
    PoolStep,
    StemStep,
    Step,
    last_uses,
    read_beyond_blocks,
)
from .tables import Scale, TableKey
from .tilings import Cut, Division, plan
from .trace import Program, Ref


class Network:
    """A recorded, fused network with packed weights; `run` executes it for any grid.

    Args:
        program, steps: from `trace` and `fuse`, recorded in the half-precision `dtype`.
        block: side of a high block of the image in pixels.
        tiles: of the convolution that goes row by row. With ON_HOPPER, `patch_sm90.cu` and
            `stem_sm90.cu` take the steps that fit them.
    """

    def __init__(
        self, program: Program, steps: list[Step], dtype: torch.dtype, tiles: Tiles = ON_HOPPER
    ):
        self.program = program
        self.steps = steps
        self.dtype = dtype
        self.block = program.blocks[0]
        self.tiles = tiles
        self.packed = {
            id(step): pack(step, program.blocks[step.output], dtype, tiles is ON_HOPPER)
            for step in steps
            if isinstance(step, (ConvStep, StemStep))
        }
        self.depthwise = {
            id(step): (pack_depthwise(step.weight, dtype), step.bias.float())
            for step in steps
            if isinstance(step, DepthwiseStep)
        }
        self.last_use = last_uses(program, steps)
        self.beyond_blocks = read_beyond_blocks(steps)
        # Of which kernels read the rows that follow the stored pixels.
        self.extended = self.beyond_blocks | {
            value
            for step in steps
            if isinstance(step, ConvStep)
            for value in (step.extra, step.residual if self.by_patches(step) else None)
            if value is not None
        }
        self.keys = sorted(self._table_keys(), key=repr)
        self.stems = [step for step in steps if isinstance(step, StemStep)]
        self.places: dict[int, Tensor] = {}
        self.counters: Tensor | None = None

    def by_patches(self, step: Step) -> bool:
        """Whether `patch_sm90.cu` runs the step."""
        return isinstance(step, ConvStep) and self.packed[id(step)].by_patches

    def divisions(self, grid: BlockGrid) -> dict[int, Division]:
        """How the work of each patch convolution is shared, by the value that it makes."""
        n_blocks, processors = grid.mask.numel(), multiprocessors(grid.mask.device.index)
        found = {}
        for step in filter(self.by_patches, self.steps):
            scale = Scale.of(self.program.blocks[step.output], grid.n_high, n_blocks)
            found[step.output] = plan(scale, self.packed[id(step)].channels, processors)
        return found

    def prepare(self, n_high: int, n_blocks: int, device: torch.device) -> None:
        """What is the same for every grid of this many high blocks; call before capturing."""
        if self.counters is None:
            self.counters = torch.zeros(4096, dtype=torch.int32, device=device)
        by_rows = any(not self.packed[id(step)].by_patches for step in self.stems)
        if by_rows and n_high not in self.places:
            scale = Scale.of(self.block // 2, n_high, n_blocks)
            self.places[n_high] = stem_places(scale, n_high, n_blocks, self.block, device)

    def run(self, image: Tensor, grid: BlockGrid) -> Any:
        """The network's output, block tensors combined; image (N, 3, H, W)."""
        blocks, divisions = self.program.blocks, self.divisions(grid)
        cuts = dict.fromkeys(Cut(blocks[value], d.tiling) for value, d in divisions.items())
        front = begin(image, grid, self.block, self.dtype, self.keys, cuts)
        frame = _Frame(self, front, grid, divisions)
        for i, step in enumerate(self.steps):
            frame.step(step)
            for value in step.inputs:
                if self.last_use[value] == i:
                    frame.buffers.pop(value, None)
        return map_structure(self.program.output, Ref, frame.combine)

    def _table_keys(self) -> set[TableKey]:
        blocks = self.program.blocks
        keys: set[TableKey] = set()
        for step in self.steps:
            if isinstance(step, PlainStep):
                made = self.extended.intersection(step.node.outputs)
                keys.update(TableKey(blocks[v], centre=True) for v in made)
                continue
            if isinstance(step, StemStep) and self.packed[id(step)].by_patches:
                continue
            if isinstance(step, DepthwiseStep) and step.output not in self.beyond_blocks:
                continue
            keys.add(TableKey(blocks[step.output], centre=True))
            if isinstance(step, PoolStep):
                keys.add(TableKey(blocks[step.source], 2))
            if isinstance(step, ConvStep):
                if step.weight.shape[2] == 3 and not self.by_patches(step):
                    keys.add(TableKey(blocks[step.source], step.stride))
                if step.enlarged is not None:
                    keys.add(TableKey(blocks[step.enlarged]))
                if step.extra is not None and not self.by_patches(step):
                    keys.add(TableKey(blocks[step.extra], step.extra_stride, centre=True))
        # The middle tap of a full table serves where only that is wanted.
        return {k for k in keys if not k.centre or TableKey(k.block, k.stride) not in keys}


class _Frame:
    """One execution: the grid, its tables and the buffers that are alive."""

    def __init__(
        self,
        network: Network,
        front: Front,
        grid: BlockGrid,
        divisions: dict[int, Division],
    ):
        self.network = network
        self.padded: Tensor | None = front.padded
        self.grid = grid
        self.n_blocks = grid.mask.numel()
        self.divisions = divisions
        self.tables = front.tables
        self.tiles = front.tiles
        self.buffers: dict[int, Tensor] = {}

    def scale(self, value: int) -> Scale:
        return Scale.of(self.network.program.blocks[value], self.grid.n_high, self.n_blocks)

    def middle(self, block: int, stride: int = 1) -> Tensor:
        """The middle tap: where a pixel itself is stored."""
        full = self.tables.get(TableKey(block, stride))
        return full[4] if full is not None else self.tables[TableKey(block, stride, True)][0]

    def step(self, step: Step) -> None:
        if isinstance(step, ConvStep):
            self.buffers[step.output] = self.conv(step)
        elif isinstance(step, DepthwiseStep):
            self.depthwise(step)
        elif isinstance(step, StemStep):
            self.buffers[step.output] = self.stem(step)
        elif isinstance(step, PoolStep):
            source, scale = self.scale(step.source), self.scale(step.output)
            table = self.tables[TableKey(source.block, 2)]
            own = self.middle(scale.block)
            self.buffers[step.output] = max_pool(
                self.buffers[step.source], table, own, source, scale
            )
        elif isinstance(step, ExcursionStep):
            self.excursion(step)
        else:
            self.plain(step)

    def stem(self, step: StemStep) -> Tensor:
        packed, grid = self.network.packed[id(step)], self.grid
        block = self.network.block
        x = self.padded
        if step is self.network.stems[-1]:
            self.padded = None  # its memory serves others
        scale = self.scale(step.output)
        out = x.new_empty((scale.zero + 1, packed.channels[2]))
        if packed.by_patches:
            weights, bias = packed.weights, packed.bias
            convolve_stem(x, weights, bias, out, scale, self.n_blocks, step.relu)
            return out
        places = self.network.places[grid.n_high]
        convolve(
            Fused(taps=1, relu=step.relu, limited=step.limit < math.inf, stem=True),
            self.divide(scale, packed, 4),
            scale,
            x,
            packed.weights,
            packed.bias,
            out,
            packed.channels,
            self.middle(scale.block),
            places,
            lines=padded_lines(block),
            limit=step.limit,
        )
        return out

    def conv(self, step: ConvStep) -> Tensor:
        return self.patch_conv(step) if self.network.by_patches(step) else self.row_conv(step)

    def patch_conv(self, step: ConvStep) -> Tensor:
        packed, scale = self.network.packed[id(step)], self.scale(step.output)
        x = self.buffers[step.source]
        out = x.new_empty((scale.zero + 1, packed.channels[2]))
        division = self.divisions[step.output]
        more: dict[str, Any] = {}
        if step.extra is not None:
            more = {"x2": self.buffers[step.extra], "stride2": step.extra_stride}
        elif step.residual is not None:
            more = {"x2": self.buffers[step.residual], "step2": 64}
        convolve_patches(
            division,
            scale,
            x,
            packed.weights,
            packed.bias,
            out,
            packed.channels,
            self.middle(scale.block),
            self.tables.get(TableKey(scale.block)),
            self.tiles.get(Cut(scale.block, division.tiling)),
            post=packed.post,
            relu=step.relu,
            count=self.network.counters,
            **more,
        )
        return out

    def row_conv(self, step: ConvStep) -> Tensor:
        packed, scale = self.network.packed[id(step)], self.scale(step.output)
        x = self.buffers[step.source]
        out = x.new_empty((scale.zero + 1, packed.channels[2]))
        taps = step.weight.shape[2] ** 2
        own = self.middle(scale.block)
        source = self.scale(step.source)
        table = own if taps == 1 else self.tables[TableKey(source.block, step.stride)]
        more: dict[str, Any] = {}
        if step.extra is not None:
            more["x2"] = self.buffers[step.extra]
            more["table2"] = self.middle(self.scale(step.extra).block, step.extra_stride)
        if step.enlarged is not None:
            small = self.scale(step.enlarged)
            more["up_scale"] = small
            more["up_table"] = self.tables[TableKey(small.block)]
        addend = step.residual if step.residual is not None else step.enlarged
        convolve(
            Fused(
                taps=taps,
                extra=step.extra is not None,
                add=1 if step.residual is not None else 2 * (step.enlarged is not None),
                pre=step.pre is not None,
                post=step.post is not None,
                relu=step.relu,
                limited=step.limit < math.inf,
                ragged=packed.channels[0] % STEP > 0,
            ),
            self.divide(scale, packed, packed.weights.shape[0]),
            scale,
            x,
            packed.weights,
            packed.bias,
            out,
            packed.channels,
            own,
            table,
            addend=None if addend is None else self.buffers[addend],
            pre=packed.pre,
            post=packed.post,
            count=self.network.counters,
            limit=step.limit,
            **more,
        )
        return out

    def divide(self, scale: Scale, packed: Packed, steps: int) -> row_tiles.Division:
        """How the work of a convolution that goes row by row is shared."""
        processors = multiprocessors(self.grid.mask.device.index)
        return row_tiles.divide(
            scale.rows, packed.channels[2], steps, processors, tiles_there=self.network.tiles
        )

    def depthwise(self, step: DepthwiseStep) -> None:
        weights, bias = self.network.depthwise[id(step)]
        x, source, made = (
            self.buffers[step.source],
            self.scale(step.source),
            self.scale(step.output),
        )
        out = x.new_empty((made.zero + 1, x.shape[1]))
        limit = step.limit if step.relu else None
        convolve_depthwise(x, weights, bias, out, self.grid, source.block, step.stride, limit)
        if step.output in self.network.beyond_blocks:
            fill_averages(out, self.middle(made.block), out[made.rows :], made)
        self.buffers[step.output] = out

    def plain(self, step: PlainStep) -> None:
        """Run the function itself on block tensors, and extend what kernels will read of it."""
        node = step.node
        args = map_structure(node.args, Ref, lambda ref: self.blocks(ref.value))
        kwargs = map_structure(node.kwargs, Ref, lambda ref: self.blocks(ref.value))
        result = node.function(*args, **kwargs)
        made: list[DualResTensor] = []
        map_structure(result, DualResTensor, made.append)
        for value, tensor in zip(node.outputs, made):
            self.keep(value, tensor.pixels)

    def keep(self, value: int, pixels: Tensor) -> None:
        """A pixel buffer as kernels will read it: contiguous, and extended where that is read."""
        if value in self.network.extended:
            scale = self.scale(value)
            pixels = extend(pixels, self.middle(scale.block), scale)
        self.buffers[value] = pixels.contiguous()

    def excursion(self, step: ExcursionStep) -> None:
        """Combine, run the fused dense function, split into an extended buffer."""
        (source,), (output,) = step.node.inputs, step.node.outputs
        dense = step.function(self.blocks(source).combine())
        grid = self.grid
        if has_adjacent_channels(dense):
            scale, shape = self.scale(output), tuple(grid.mask.shape)
            self.buffers[output] = split_extended(dense, grid.cells, shape, scale)
        else:
            self.keep(output, to_blocks(dense, grid).pixels)

    def blocks(self, value: int) -> DualResTensor:
        program = self.network.program
        rows = self.scale(value).rows
        pixels = self.buffers[value][:rows, : program.channels[value]]
        return DualResTensor(pixels, self.grid, program.blocks[value], program.layouts[value])

    def combine(self, ref: Ref) -> Tensor:
        program, scale = self.network.program, self.scale(ref.value)
        pixels = self.buffers[ref.value][: scale.rows]
        layout, channels = program.layouts[ref.value], program.channels[ref.value]
        dense = DualResTensor(pixels, self.grid, scale.block, layout).combine()
        # Channels padded for the kernels are combined too and cut off by a view.
        return dense[:, :channels] if pixels.shape[1] != channels else dense
