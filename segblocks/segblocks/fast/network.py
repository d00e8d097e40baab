"""Chooses how a compiled model runs its network: fused kernels, fused PyTorch, or as it is."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import BlockGrid
from ..model import execute_with_grid
from ..structure import map_structure
from ..tensor import to_blocks
from .cpu import CpuNetwork
from .dense_run import DenseFunction
from .dense_trace import record_dense
from .fuse import fuse
from .generation import HOPPER, generation
from .portable import PortableNetwork
from .row_tiles import tiles_of
from .steps import ExcursionStep, PlainStep, Step, read_by_kernels
from .trace import Node, Program, Ref, recording

Run = Callable[[Tensor, BlockGrid], Any]


def build_network(
    net: nn.Module, image: Tensor, grid_shape: tuple[int, int, int], legacy_upsample: bool
) -> tuple[Run, str]:
    """A function (image, grid) -> what `execute_with_grid(net, image, grid)` returns; and its name.

    It takes images of `image`'s dtype.

    The network runs once on `image` to be recorded. One that cannot be replayed from a recording
    runs as it is, with a warning that says which operation stood in the way.

    Args:
        net: in evaluation mode, of the working dtype.
        image: (N, C, H, W) of the working dtype; its values do not matter.
        legacy_upsample: the published resizing, which the fused kernels do not have.
    """
    program = record(net, image, grid_shape, legacy_upsample)
    obstacle = not_replayable(program, net)
    if obstacle:
        warnings.warn(f"{obstacle}; the network runs unfused", stacklevel=6)
        return (lambda x, grid: execute_with_grid(net, x, grid)), "unfused"
    steps = fuse(program)
    half = image.dtype in (torch.float16, torch.bfloat16)
    kernels = generation(image.device) if half and not legacy_upsample else 0
    if kernels:
        obstacle = not_for_kernels(program, steps)
        if obstacle is None:
            steps = fuse_excursions(program, steps, net, grid_shape, image, kernels=True)
            run = _by_kernels(program, steps, image.dtype, image.device)
            return run, f"fused {'Hopper' if kernels == HOPPER else 'Ampere'} kernels"
        warnings.warn(f"{obstacle}; the network runs without the fused kernels", stacklevel=5)
    steps = fuse_excursions(program, steps, net, grid_shape, image)
    if image.device.type == "cpu":
        return CpuNetwork(program, steps, grid_shape).run, "fused"
    return PortableNetwork(program, steps).run, "fused"


def record(
    net: nn.Module, image: Tensor, grid_shape: tuple[int, int, int], legacy_upsample: bool = False
) -> Program:
    """Run the network once on a grid of both kinds and note what it does."""
    mask = torch.zeros(grid_shape, dtype=torch.bool, device=image.device)
    mask.view(-1)[::2] = True
    with recording() as recorder:
        blocks = to_blocks(image, BlockGrid.from_mask(mask, legacy_upsample=legacy_upsample))
        recorder.add(blocks)
        recorder.finish(net(blocks))
    return recorder.program


def not_replayable(program: Program, net: nn.Module) -> str | None:
    """Why a recording does not hold for other images, or None.

    Dense tensors between the recorded calls are not recorded themselves. Parameters and buffers
    may take part; anything else was computed, perhaps from the image.
    """
    if program.obstacle:
        return program.obstacle
    own = _storages(net)
    foreign: list[str] = []
    for node in program.nodes:

        def check(x: Tensor, name: str = node.name) -> None:
            if x.untyped_storage().data_ptr() not in own:
                foreign.append(name)

        map_structure((node.args, node.kwargs), Tensor, check)
    if foreign:
        return f"'{foreign[0]}' takes a dense tensor that is computed outside segblocks' sight"
    dense: list[Tensor] = []
    map_structure(program.output, Tensor, dense.append)
    return "the network returns a dense tensor" if dense else None


def not_for_kernels(program: Program, steps: list[Step]) -> str | None:
    """Why the fused kernels cannot hold a program's buffers, or None."""
    if any(0 in step.inputs for step in steps):
        first = next(node.name for node in program.nodes if 0 in node.inputs)
        return f"'{first}' is not a first convolution of three channels with stride 2"
    half = (torch.float16, torch.bfloat16)
    for value in sorted(read_by_kernels(steps)):
        channels, layout = program.channels[value], program.layouts[value]
        if channels % 8 or layout != "NCHW" or program.dtypes[value] not in half:
            maker = next(node.name for node in program.nodes if value in node.outputs)
            return f"'{maker}' makes {channels} channels of {program.dtypes[value]} in {layout}"
    return None


def fuse_excursions(
    program: Program,
    steps: list[Step],
    net: nn.Module,
    grid_shape: tuple[int, int, int],
    image: Tensor,
    kernels: bool = False,
) -> list[Step]:
    """The steps with the dense functions of `no_blocks` calls fused where they can be recorded.

    Args:
        kernels: use the kernels for small dense maps, in half precision.
    """

    def fused(step: Step) -> Step:
        node = step.node if isinstance(step, PlainStep) else None
        if node is None or node.name != "no_blocks" or not _maps_one_to_one(program, node):
            return step
        value, (n, rows, columns) = node.inputs[0], grid_shape
        block, channels = program.blocks[value], program.channels[value]
        example = torch.zeros(
            (n, channels, rows * block, columns * block),
            dtype=program.dtypes[value],
            device=image.device,
        ).contiguous(memory_format=torch.channels_last)
        dense = record_dense(node.function.__wrapped__, example, _storages(net))
        if dense is None:
            return step
        return ExcursionStep(node, step.place, DenseFunction(dense, kernels))

    return [fused(step) for step in steps]


def _maps_one_to_one(program: Program, node: Node) -> bool:
    """Whether a call takes one block tensor alone, channels first, and returns one."""
    whole = len(node.args) == 1 and isinstance(node.args[0], Ref) and not node.kwargs
    return whole and isinstance(node.result, Ref) and program.layouts[node.inputs[0]] == "NCHW"


def _storages(net: nn.Module) -> set[int]:
    """Where a network's own tensors lie."""
    return {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}


def _by_kernels(
    program: Program, steps: list[Step], dtype: torch.dtype, device: torch.device
) -> Run:
    from .run import Network

    network = Network(program, steps, dtype, tiles_of(device))

    def run(image: Tensor, grid: BlockGrid) -> Any:
        network.prepare(grid.n_high, grid.mask.numel(), image.device)
        return network.run(image, grid)

    return run
