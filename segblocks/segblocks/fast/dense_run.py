"""Runs a fused dense excursion, on the kernels for small maps or with PyTorch's functions."""

import struct
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.cuda import geometry as geo
from ..ops.cuda.module import defines, prepare
from ..structure import find, map_structure
from .dense_fuse import CallStep, DenseStep, PointStep, PooledStep, fuse_dense, last_dense_uses
from .dense_trace import DenseProgram
from .small_conv import MOST_PARTS, SmallConv, round_up
from .trace import Ref

_MOST_CHANNELS = 2048  # of excursion.cu


class DenseFunction:
    """A recorded function of one dense tensor, fused: call it as the function itself.

    Args:
        program: from `record_dense`.
        kernels: use the kernels for small maps where they fit; half precision.
    """

    def __init__(self, program: DenseProgram, kernels: bool):
        self.program = program
        self.steps = fuse_dense(program)
        self.last_use = last_dense_uses(program, self.steps)
        self.packed: dict[int, SmallConv | list[_Level]] = {}
        made: set[int] = set()  # by kernels: channels are padded to 8 with zeros
        for step in self.steps if kernels else ():
            if self._fits(step, made):
                self.packed[id(step)] = _pack(step, program.dtypes[step.inputs[0]])
                outputs = step.levels if isinstance(step, PooledStep) else [step]
                made.update(one.output for one in outputs)

    def __call__(self, x: Tensor) -> Tensor:
        frame = _Frame(self, x)
        for i, step in enumerate(self.steps):
            frame.step(step)
            for value in step.inputs:
                if self.last_use[value] == i:
                    frame.values.pop(value, None)
                    frame.maps.pop(value, None)
        return frame.values[self.program.output]

    def _fits(self, step: DenseStep, made: set[int]) -> bool:
        """Whether the kernels can run a step."""
        if isinstance(step, CallStep):
            return False
        shapes, dtypes = self.program.shapes, self.program.dtypes
        levels = step.levels if isinstance(step, PooledStep) else [step]
        half = all(dtypes[v] in (torch.float16, torch.bfloat16) for v in step.inputs)
        alike = len({dtypes[v] for v in (*step.inputs, *(one.output for one in levels))}) == 1
        whole = all(shapes[v][1] % 8 == 0 or v in made for v in step.inputs)
        narrow = isinstance(step, PointStep) or shapes[step.source][1] <= _MOST_CHANNELS
        return half and alike and whole and narrow


class _Frame:
    """One execution: the values that are alive, and those of kernels also as (N, H, W, C) maps."""

    def __init__(self, function: DenseFunction, x: Tensor):
        self.function = function
        self.values = {0: x}
        self.maps: dict[int, Tensor] = {}

    def step(self, step: DenseStep) -> None:
        packed = self.function.packed.get(id(step))
        if isinstance(step, CallStep):
            node = step.node
            args, kwargs = map_structure((node.args, node.kwargs), Ref, self._value)
            self.values.update(zip(node.outputs, find(node.function(*args, **kwargs), Tensor)))
        elif packed is None:
            self.values.update(run_portable(step, self.values))
        elif isinstance(packed, SmallConv):
            maps = [self._map(value) for value in step.sources]
            self._put(step, packed(*maps, size=tuple(step.size)))
        else:
            for level, made in zip(step.levels, pooled_conv(self._map(step.source), packed)):
                self._put(level, made)

    def _value(self, ref: Ref) -> Tensor:
        return self.values[ref.value]

    def _map(self, value: int) -> Tensor:
        found = self.maps.get(value)
        return self.values[value].permute(0, 2, 3, 1).contiguous() if found is None else found

    def _put(self, step: PointStep, made: Tensor) -> None:
        self.maps[step.output] = made
        self.values[step.output] = made.permute(0, 3, 1, 2)[:, : step.weight.shape[0]]


def run_portable(step: PointStep | PooledStep, values: dict[int, Tensor]) -> dict[int, Tensor]:
    """What a step makes of values, with PyTorch's functions."""
    if isinstance(step, PooledStep):
        x = values[step.source]
        return {one.output: _point(one, [_average(x, one.size)]) for one in step.levels}
    maps = [values[value] for value in step.sources]
    return {step.output: _point(step, maps)}


def _average(x: Tensor, bins: tuple[int, int]) -> Tensor:
    """Averages over bins; without overlap in the form that runs fastest."""
    window = [size // count for size, count in zip(x.shape[2:], bins)]
    if [count * side for count, side in zip(bins, window)] == list(x.shape[2:]):
        return F.avg_pool2d(x, window)
    return F.adaptive_avg_pool2d(x, bins)


def _point(step: PointStep, maps: list[Tensor]) -> Tensor:
    def resized(x: Tensor) -> Tensor:
        same = tuple(x.shape[2:]) == tuple(step.size)
        return x if same else F.interpolate(x, step.size, mode="bilinear", align_corners=False)

    x = resized(maps[0]) if len(maps) == 1 else torch.cat([resized(x) for x in maps], 1)
    dtype = x.dtype
    if step.pre is not None:
        scale, shift = (v.to(dtype).view(-1, 1, 1) for v in (step.pre.scale, step.pre.shift))
        x = (x * scale).add_(shift).relu_()
    y = F.conv2d(x, step.weight.to(dtype), step.bias.to(dtype))
    return y.relu_() if step.relu else y


@dataclass(frozen=True)
class _Level:
    """A level of pooled_conv as the kernel reads it."""

    weights: Tensor
    bias: Tensor
    pre: Tensor | None
    bins: tuple[int, int]
    relu: bool


def _pack(step: PointStep | PooledStep, dtype: torch.dtype) -> "SmallConv | list[_Level]":
    if isinstance(step, PointStep):
        parts = tuple(step.parts)
        return SmallConv.pack(step.weight, step.bias, dtype, parts, pre=step.pre, relu=step.relu)
    return [_pack_level(level, dtype) for level in step.levels]


def _pack_level(level: PointStep, dtype: torch.dtype) -> _Level:
    matrix = level.weight.flatten(1)
    missing = -matrix.shape[1] % 8
    pre = None
    if level.pre is not None:
        pre = F.pad(torch.stack((level.pre.scale, level.pre.shift)).float(), (0, missing))
    return _Level(
        F.pad(matrix, (0, missing)).to(dtype).contiguous(),
        level.bias.float().contiguous(),
        None if pre is None else pre.contiguous(),
        (int(level.size[0]), int(level.size[1])),
        level.relu,
    )


def pooled_conv(x: Tensor, levels: list[_Level]) -> list[Tensor]:
    """Averages of a map (N, H, W, C) over each level's bins, convolved 1×1, all in one launch.

    Returns:
        (N, *bins, COUT) for each level, channels rounded up to 8.
    """
    n, height, width, pitch = x.shape
    record, first, made = b"", 0, []
    for level in levels:
        cout = level.weights.shape[0]
        out = x.new_empty((n, *level.bins, round_up(cout, 8)))
        pointers = (t.data_ptr() for t in (level.weights, level.bias))
        pre = 0 if level.pre is None else level.pre.data_ptr()
        record += struct.pack("4Q", *pointers, pre, out.data_ptr())
        record += struct.pack("6i", *level.bins, cout, out.shape[3], level.relu, first)
        first += n * level.bins[0] * level.bins[1]
        made.append(out)
    record += bytes(56 * (MOST_PARTS - len(levels)))
    record += struct.pack("6i", len(levels), n, height, width, pitch, 0)
    options = defines(dtype=geo.DTYPES[x.dtype], vector=8, index64=False)
    prepare(
        "excursion.cu", "pooled_conv", options, x.device.index, first, 256, record, pointers=1
    ).launch(x.device, x.data_ptr())
    return made
