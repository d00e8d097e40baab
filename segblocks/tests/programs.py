"""Recorded programs and fused steps, executed with ordinary functions on block tensors."""

import math

import torch
import torch.nn.functional as F
from agreement import TOLERANCE, distance, make_grid, make_image
from torch import Tensor

from segblocks import BlockGrid, DualResTensor, execute_with_grid, to_blocks
from segblocks.fast.cpu import CpuNetwork
from segblocks.fast.fuse import fuse
from segblocks.fast.portable import PortableNetwork
from segblocks.fast.steps import DepthwiseStep, PlainStep, PoolStep, StemStep
from segblocks.fast.trace import Program, Ref, recording
from segblocks.structure import find, map_structure


@torch.no_grad()
def record(net, image: Tensor, mask: Tensor) -> Program:
    """What `net` does to `image` on grid `mask`."""
    with recording() as recorder:
        blocks = to_blocks(image, BlockGrid.from_mask(mask))
        recorder.add(blocks)
        recorder.finish(net(blocks))
    return recorder.program


@torch.no_grad()
def replay(program: Program, image: Tensor, mask: Tensor):
    """The program's output for other blocks; each call must leave its arguments as they are."""
    values = {0: to_blocks(image, BlockGrid.from_mask(mask))}
    for node in program.nodes:
        before = {value: values[value].pixels.clone() for value in node.inputs}
        call_node(node, values)
        for value, pixels in before.items():
            assert torch.equal(values[value].pixels, pixels), f"'{node.name}' wrote in place"
        for value in node.outputs:
            assert values[value].block == program.blocks[value]
            assert values[value].pixels.shape[1] == program.channels[value]
            assert values[value].layout == program.layouts[value]
            assert values[value].dtype == program.dtypes[value]
    return outputs_of(program, values)


def call_node(node, values: dict[int, DualResTensor]) -> None:
    """Run one recorded call on the values and note what it makes."""
    args, kwargs = map_structure((node.args, node.kwargs), Ref, lambda ref: values[ref.value])
    made = find(node.function(*args, **kwargs), DualResTensor)
    assert len(made) == len(node.outputs)
    values.update(zip(node.outputs, made))


def outputs_of(program: Program, values: dict[int, DualResTensor]):
    """What the network returned, combined."""
    return map_structure(program.output, Ref, lambda ref: values[ref.value].combine())


def names(program: Program) -> list[str]:
    return [node.name for node in program.nodes]


@torch.no_grad()
def execute(program, steps, image, grid):
    """The output of fused steps by ordinary functions on block tensors."""
    values = {0: to_blocks(image, grid)}
    for step in steps:
        assert all(value in values for value in step.inputs), "read before it is made"
        if isinstance(step, PlainStep):
            call_node(step.node, values)
        elif isinstance(step, PoolStep):
            values[step.output] = F.max_pool2d(values[step.source], 3, 2, 1)
        elif isinstance(step, StemStep):
            y = F.conv2d(values[0], step.weight, step.bias, 2, step.weight.shape[2] // 2)
            values[step.output] = activate(y, step)
        elif isinstance(step, DepthwiseStep):
            settings = (step.stride, step.weight.shape[2] // 2, 1, step.weight.shape[0])
            y = F.conv2d(values[step.source], step.weight, step.bias, *settings)
            values[step.output] = activate(y, step)
        else:
            values[step.output] = convolve(step, values)
    return outputs_of(program, values)


def convolve(step, values):
    x = values[step.source]
    if step.pre is not None:
        x = affine_relu(x, step.pre)
    y = F.conv2d(x, step.weight, step.bias, step.stride, step.weight.shape[2] // 2)
    if step.extra is not None:
        y = y + F.conv2d(values[step.extra], step.extra_weight, None, step.extra_stride)
    if step.residual is not None:
        y = y + values[step.residual]
    if step.enlarged is not None:
        y = y + F.interpolate(values[step.enlarged], scale_factor=2, mode="bilinear")
    y = activate(y, step)
    return y if step.post is None else affine_relu(y, step.post)


def activate(x, step):
    return F.hardtanh(x, 0, step.limit) if step.relu else x


def affine_relu(x, affine):
    return F.relu(x * affine.scale.view(-1, 1, 1) + affine.shift.view(-1, 1, 1))


def describe(step) -> str:
    """A step in a few words: what is in it, in the order in which it happens."""
    if isinstance(step, PlainStep):
        return step.node.name.strip("_")
    kind = type(step).__name__.removesuffix("Step").lower()
    if isinstance(step, PoolStep):
        return kind
    bounded = step.relu and step.limit < math.inf
    if isinstance(step, StemStep):
        return f"{kind} below {step.limit:g}" if bounded else kind
    size, stride = step.weight.shape[2], step.stride
    window = f"{size}x{size}" + f"/{stride}" * (stride > 1)
    relu = ["relu"] * step.relu + [f"below {step.limit:g}"] * bounded
    if isinstance(step, DepthwiseStep):
        return " ".join([kind, window, *relu])
    parts = ["pre"] * (step.pre is not None) + [window]
    for name in ("extra", "residual", "enlarged"):
        if getattr(step, name) is not None:
            parts.append(name)
    parts += relu + ["post"] * (step.post is not None)
    return " ".join(parts)


def check_fused(net, block, mask_shape=(2, 2, 3)):
    """The fused steps, run plainly and by PyTorch, equal the network on several grids."""
    first = make_grid("one", mask_shape)
    program = record(net, make_image(first, 3, block), first)
    assert program.obstacle is None
    steps = fuse(program)
    ways = PortableNetwork(program, steps).run, CpuNetwork(program, steps, mask_shape).run
    for kind in ("mixed", "all", "none"):
        mask = make_grid(kind, mask_shape, seed=3)
        image, grid = make_image(mask, 3, block, seed=5), BlockGrid.from_mask(mask)
        with torch.no_grad():
            expected = find(execute_with_grid(net, image, grid), torch.Tensor)
            for run in (lambda *args: execute(program, steps, *args), *ways):
                found = find(run(image, grid), torch.Tensor)
                assert len(found) == len(expected) > 0
                for mine, theirs in zip(found, expected):
                    assert distance(mine, theirs) < TOLERANCE * max(1, theirs.abs().max())
    return [describe(step) for step in steps]
