"""Runs the fused steps of a network on the CPU: every convolution adds to its buffer in place.

Memory traffic is what blocks cost here. A padded copy of the input is gathered through an index,
and the convolution of either resolution writes straight into the rows of its blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import BlockGrid
from ..tensor import DualResTensor
from .onednn import AddedConvolution
from .padded import Scratch, double, join, padded, padded_image
from .portable import PortableNetwork, normalise
from .steps import Convolution, ConvStep, DepthwiseStep, ExcursionStep, PoolStep, StemStep, Step
from .trace import Program
from .windows import MOST, windows


class CpuNetwork(PortableNetwork):
    """A recorded, fused network for the CPU; `run` executes it for any grid.

    Args:
        grid_shape: (N, Gh, Gw) of the images to come.
    """

    def __init__(self, program: Program, steps: list[Step], grid_shape: tuple[int, int, int]):
        super().__init__(program, steps)
        self.scratch, self.windows, self.first = Scratch(), Scratch(), Scratch()
        self.blocks = math.prod(grid_shape)
        self.convolutions = {
            id(step): self._prepare(step)
            for step in steps
            if isinstance(step, Convolution | StemStep)
        }
        self.shortcuts = {
            id(step): step.extra_weight.flatten(1).t().to(program.dtypes[step.output]).contiguous()
            for step in steps
            if isinstance(step, ConvStep) and step.extra is not None
        }
        fused = (ConvStep, DepthwiseStep, StemStep, PoolStep)
        made = {step.output for step in steps if isinstance(step, fused)}
        seen = {v for s in steps if not isinstance(s, (*fused, ExcursionStep)) for v in s.inputs}
        # What only fused steps touch shares its memory with nothing else.
        self.own = made - seen

    def _prepare(self, step: Convolution | StemStep) -> AddedConvolution:
        stem = isinstance(step, StemStep)
        source, stride = (0, 2) if stem else (step.source, step.stride)
        dtype = self.program.dtypes[source]
        groups = step.weight.shape[0] if isinstance(step, DepthwiseStep) else 1
        cin, kernel = groups * step.weight.shape[1], step.weight.shape[2]
        side = self.program.blocks[source]
        weight, bias = step.weight.to(dtype), step.bias.to(dtype)
        shape = (self.blocks, cin, side + kernel - 1, side + kernel - 1)
        if self._by_windows(step):
            weight, stride = weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None], 1
            cin, kernel, side = 9 * cin, 1, self.program.blocks[step.output]
        if kernel == 1:
            shape = (1, cin, 1, self.blocks * side * side)
        return AddedConvolution(weight, bias, stride, shape, groups)

    def _by_windows(self, step: Convolution | StemStep) -> bool:
        """Whether a convolution is one product of both resolutions."""
        small = self.program.blocks[step.output] <= MOST
        return isinstance(step, ConvStep) and step.weight.shape[2] == 3 and small

    def stem(self, step: StemStep, image: Tensor, grid: BlockGrid) -> DualResTensor:
        block = image.shape[2] // grid.mask.shape[1] // 2
        channels = step.weight.shape[0]
        if step.output in self.own:  # the largest buffer of all: kept from call to call
            pixels = self.first.rows(
                grid.stored_pixels(block), image.new_empty((0, channels))
            ).zero_()
            out = DualResTensor(pixels, grid, block)
        else:
            out = _zeros(image, grid, block, channels)
        blocks = padded_image(image, grid, step.weight.shape[2] // 2)
        self._add(step, out, blocks)
        return _limited(out, step)

    def depthwise(self, step: DepthwiseStep, x: DualResTensor) -> DualResTensor:
        out = _zeros(x.pixels, x.grid, x.block // step.stride, x.pixels.shape[1])
        reach = step.weight.shape[2] // 2
        self._add(step, out, padded(x, reach, reach, 0.0, self.scratch))
        return _limited(out, step)

    def convolve(self, step: ConvStep, values: dict[int, DualResTensor], i: int) -> DualResTensor:
        out = self._addend(step, values, i)
        x = values[step.source]
        if step.pre is not None:
            x = normalise(x, step.pre, in_place=False)
        if step.weight.shape[2] == 1:
            self.convolutions[id(step)](_line(out.pixels), _line(x.pixels.contiguous()), step.relu)
        elif self._by_windows(step):
            rows = windows(x, step.stride, self.scratch, self.windows)
            self.convolutions[id(step)](_line(out.pixels), _line(rows), step.relu)
        else:
            self._add(step, out, padded(x, 1, 1, 0.0, self.scratch))
        _limited(out, step)
        return out if step.post is None else normalise(out, step.post, in_place=True)

    def pool(self, step: PoolStep, x: DualResTensor) -> DualResTensor:
        block, channels = x.block // 2, x.pixels.shape[1]
        out = x.like(x.pixels.new_empty((x.grid.stored_pixels(block), channels)), block)
        for part, rows in zip(padded(x, 1, 0, -torch.inf, self.scratch), (out.highres, out.lowres)):
            if part.shape[0]:
                rows.copy_(F.max_pool2d(part, 3, 2))
        return out

    def combine(self, x: DualResTensor) -> Tensor:
        plain = x.pixels.is_floating_point() and x.layout == "NCHW"
        return join(x, self.scratch) if plain and not x.grid.legacy_upsample else x.combine()

    def _add(self, step: Convolution | StemStep, out: DualResTensor, blocks: tuple) -> None:
        for part, rows in zip(blocks, (out.highres, out.lowres)):
            self.convolutions[id(step)](rows, part, step.relu)

    def _addend(self, step: ConvStep, values: dict[int, DualResTensor], i: int) -> DualResTensor:
        """A buffer that may be written, with what the convolution is added to."""
        if step.residual is not None:
            x, value = values[step.residual], step.residual
            free = self.last_use[value] == i and value in self.own
            alone = value not in (step.source, step.extra)
            return x if free and alone else x.like(x.pixels.clone())
        if step.enlarged is not None:
            x = values[step.enlarged]
            if not x.grid.legacy_upsample:
                return double(x, self.scratch)
            return F.interpolate(x, scale_factor=2, mode="bilinear")
        x = values[step.source]
        block = x.block // step.stride
        if step.extra is None:
            return _zeros(x.pixels, x.grid, block, step.weight.shape[0])
        weight, every = self.shortcuts[id(step)], step.extra_stride
        out = x.like(x.pixels.new_empty((x.grid.stored_pixels(block), weight.shape[1])), block)
        extra = values[step.extra]
        for part, rows in zip((extra.highres, extra.lowres), (out.highres, out.lowres)):
            read = part[:, :, ::every, ::every].permute(0, 2, 3, 1).reshape(-1, part.shape[1])
            torch.mm(read, weight, out=rows.permute(0, 2, 3, 1).view(-1, weight.shape[1]))
        return out


def _line(pixels: Tensor) -> Tensor:
    """A pixel buffer as one picture (1, C, 1, P), on which a 1×1 convolution acts alike."""
    return pixels.t()[None, :, None]


def _limited(x: DualResTensor, step: Convolution | StemStep) -> DualResTensor:
    """Behind the ReLU that a convolution has taken along, its upper limit; in place."""
    if step.limit < math.inf:
        x.pixels.clamp_(max=step.limit)
    return x


def _zeros(like: Tensor, grid: BlockGrid, block: int, channels: int) -> DualResTensor:
    return DualResTensor(like.new_zeros((grid.stored_pixels(block), channels)), grid, block)
