"""The steps of a fused network: what they read and write, and their parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..structure import find
from .trace import Node, Program, Ref


@dataclass
class Affine:
    """A batch norm in evaluation: x * scale + shift, per channel, in float32 or wider."""

    scale: Tensor
    shift: Tensor


@dataclass
class Convolution:
    """What convolutions inside a network have in common.

    Attributes:
        source, output: values read and written.
        weight: (COUT, CIN / groups, k, k), batch norm folded in; bias: (COUT,); in float32 or
            wider.
        relu: behind it; limit: its upper one.
        place: index of the last node taken in; the step runs there.
    """

    source: int
    output: int
    weight: Tensor
    bias: Tensor
    stride: int
    place: int
    relu: bool = False
    limit: float = math.inf

    @property
    def inputs(self) -> list[int]:
        return [self.source]


@dataclass
class ConvStep(Convolution):
    """A convolution of 1×1 or 3×3 (padding 1) with what the kernel does around it.

    Attributes:
        pre: affine and ReLU before it. post: affine and ReLU after everything.
        residual: value added before the ReLU. enlarged: value added after bilinear ×2.
        extra: a value read by a second, 1×1 convolution that is added, with its weight and stride.
    """

    pre: Affine | None = None
    post: Affine | None = None
    residual: int | None = None
    enlarged: int | None = None
    extra: int | None = None
    extra_weight: Tensor | None = None
    extra_stride: int = 1

    @property
    def inputs(self) -> list[int]:
        found = (self.source, self.residual, self.enlarged, self.extra)
        return [value for value in found if value is not None]


@dataclass
class DepthwiseStep(Convolution):
    """A depthwise convolution with padding k // 2."""


@dataclass
class PoolStep:
    """Max pooling 3×3, stride 2, padding 1."""

    source: int
    output: int
    place: int

    @property
    def inputs(self) -> list[int]:
        return [self.source]


@dataclass
class StemStep:
    """The first convolution, 7×7 or 3×3 with stride 2 on three channels, batch norm and ReLU (with
    its upper limit)."""

    output: int
    weight: Tensor
    bias: Tensor
    relu: bool
    limit: float
    place: int

    @property
    def inputs(self) -> list[int]:
        return []


@dataclass
class PlainStep:
    """Anything else: the function itself, on block tensors."""

    node: Node
    place: int

    @property
    def inputs(self) -> list[int]:
        return self.node.inputs


@dataclass
class ExcursionStep(PlainStep):
    """A `no_blocks` call of one block tensor that returns one, its dense function fused."""

    function: Callable[[Tensor], Tensor]


Step = ConvStep | DepthwiseStep | PoolStep | StemStep | PlainStep


def read_by_kernels(steps: list[Step]) -> set[int]:
    """The values that fused steps read."""
    return {value for step in steps if not isinstance(step, PlainStep) for value in step.inputs}


def read_beyond_blocks(steps: list[Step]) -> set[int]:
    """Those of them of which a fused step reads what lies across the edges of a block."""
    found = {step.source for step in steps if isinstance(step, PoolStep)}
    for step in steps:
        if isinstance(step, ConvStep):
            wide = step.weight.shape[2] > 1
            found.update(v for v in (step.source if wide else None, step.enlarged) if v is not None)
    return found


def last_uses(program: Program, steps: list[Step]) -> dict[int, int]:
    """For each value the step that reads it last; past the end for what the network returns."""
    uses = {value: i for i, step in enumerate(steps) for value in step.inputs}
    return uses | {ref.value: len(steps) for ref in find(program.output, Ref)}
