"""Runs the fused steps of a network with PyTorch's own functions: float32, and GPUs
before Ampere.

Batch norm is folded into the convolutions and everything point-wise works in place.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import BlockGrid
from ..structure import map_structure
from ..tensor import DualResTensor, to_blocks
from .steps import (
    Affine,
    Convolution,
    ConvStep,
    DepthwiseStep,
    ExcursionStep,
    PoolStep,
    StemStep,
    Step,
    last_uses,
)
from .trace import Program, Ref


class PortableNetwork:
    """A recorded, fused network; `run` executes it for any grid.

    Args:
        program, steps: from `trace` and `fuse`; the steps' weights are laid out for convolving.
    """

    def __init__(self, program: Program, steps: list[Step]):
        for step in steps:
            if isinstance(step, (Convolution, StemStep)):
                step.weight = step.weight.to(memory_format=torch.channels_last)
        self.program = program
        self.steps = steps
        self.last_use = last_uses(program, steps)
        self.reads_split_image = program.is_output(0) or any(0 in step.inputs for step in steps)

    def run(self, image: Tensor, grid: BlockGrid) -> Any:
        """The network's output, block tensors combined; image (N, C, H, W)."""
        values = {0: to_blocks(image, grid)} if self.reads_split_image else {}
        for i, step in enumerate(self.steps):
            if isinstance(step, ConvStep):
                values[step.output] = self.convolve(step, values, i)
            elif isinstance(step, StemStep):
                values[step.output] = self.stem(step, image, grid)
            elif isinstance(step, DepthwiseStep):
                values[step.output] = self.depthwise(step, values[step.source])
            elif isinstance(step, PoolStep):
                values[step.output] = self.pool(step, values[step.source])
            elif isinstance(step, ExcursionStep):
                (source,), (output,) = step.node.inputs, step.node.outputs
                values[output] = to_blocks(step.function(self.combine(values[source])), grid)
            else:
                _call(step.node, values)
            for value in step.inputs:
                if self.last_use[value] == i:
                    values.pop(value, None)
        return map_structure(self.program.output, Ref, lambda ref: self.combine(values[ref.value]))

    def convolve(self, step: ConvStep, values: dict[int, DualResTensor], i: int) -> DualResTensor:
        """Run step number i."""
        return _convolve(step, values)

    def depthwise(self, step: DepthwiseStep, x: DualResTensor) -> DualResTensor:
        weight, bias = step.weight.to(x.dtype), step.bias.to(x.dtype)
        y = F.conv2d(x, weight, bias, step.stride, weight.shape[2] // 2, groups=weight.shape[0])
        _activate(y.pixels, step)
        return y

    def stem(self, step: StemStep, image: Tensor, grid: BlockGrid) -> DualResTensor:
        return _stem(step, to_blocks(image, grid))

    def pool(self, step: PoolStep, x: DualResTensor) -> DualResTensor:
        return F.max_pool2d(x, 3, 2, 1)

    def combine(self, x: DualResTensor) -> Tensor:
        return x.combine()


def _convolve(step: ConvStep, values: dict[int, DualResTensor]) -> DualResTensor:
    x = values[step.source]
    if step.pre is not None:
        x = normalise(x, step.pre, in_place=False)
    dtype = x.dtype
    weight, bias = step.weight.to(dtype), step.bias.to(dtype)
    y = F.conv2d(x, weight, bias, step.stride, weight.shape[2] // 2)
    if step.residual is not None:
        y.pixels.add_(values[step.residual].pixels)
    if step.enlarged is not None:
        y.pixels.add_(F.interpolate(values[step.enlarged], scale_factor=2, mode="bilinear").pixels)
    if step.extra is not None:
        shortcut = step.extra_weight.to(dtype)
        y.pixels.add_(F.conv2d(values[step.extra], shortcut, None, step.extra_stride).pixels)
    _activate(y.pixels, step)
    return y if step.post is None else normalise(y, step.post, in_place=True)


def _stem(step: StemStep, image: DualResTensor) -> DualResTensor:
    weight, bias = step.weight.to(image.dtype), step.bias.to(image.dtype)
    y = F.conv2d(image, weight, bias, 2, weight.shape[2] // 2)
    _activate(y.pixels, step)
    return y


def _activate(pixels: Tensor, step: Convolution | StemStep) -> None:
    """The ReLU of a step, in place."""
    if step.relu:
        pixels.relu_() if step.limit == math.inf else pixels.clamp_(0, step.limit)


def normalise(x: DualResTensor, affine: Affine, in_place: bool) -> DualResTensor:
    """relu(x * scale + shift), per channel."""
    scale, shift = affine.scale.to(x.dtype), affine.shift.to(x.dtype)
    pixels = x.pixels.mul_(scale) if in_place else x.pixels * scale
    return x.like(pixels.add_(shift).relu_())


def _call(node, values: dict[int, DualResTensor]) -> None:
    """The recorded function itself."""
    args = map_structure(node.args, Ref, lambda ref: values[ref.value])
    kwargs = map_structure(node.kwargs, Ref, lambda ref: values[ref.value])
    made: list[DualResTensor] = []
    map_structure(node.function(*args, **kwargs), DualResTensor, made.append)
    values.update(zip(node.outputs, made))
