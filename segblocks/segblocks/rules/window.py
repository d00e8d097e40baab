"""What every windowed operation shares: its halo, and running it on both resolutions at once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..grid import BlockGrid
from ..ops import blockpad
from ..tensor import DualResTensor, Padding


@dataclass(frozen=True)
class Window:
    """One axis of a sliding window, in pixels."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int = 1

    @property
    def reach(self) -> int:
        return self.dilation * (self.kernel - 1)

    @property
    def halo_after(self) -> int:
        """Pixels past the block's last that its last output reads; negative: some are unread."""
        return self.reach - self.before - self.stride + 1


class Halo(NamedTuple):
    """How blocks are padded: left, right, top, bottom pixels, and what lies beyond the image."""

    sides: tuple[int, int, int, int]
    replicate: bool = False
    fill: float = 0.0


class Plan(NamedTuple):
    """A windowed operation at one scale: what it reads and what it makes.

    Attributes:
        windows: the vertical and the horizontal one, with what `F.pad` asked for in their padding.
        halo: None where the windows stay inside their block.
        block: side of a high block of the output.
    """

    windows: tuple[Window, Window]
    halo: Halo | None
    block: int


def plan_windows(
    x: DualResTensor,
    name: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    fill: float = 0.0,
    ceil_mode: bool = False,
) -> Plan:
    """How the operation `name` acts on `x`; worked out once for every scale and setting.

    Raises:
        NotImplementedError: the output does not line up with the grid (as without padding), or
            `F.pad` and the operation pad differently.
        ValueError: the block is too small for the stride; padding "same" with a stride.
    """
    # Dynamo warns of caches that it passes by.
    plan = _plan.__wrapped__ if torch.compiler.is_compiling() else _plan
    _, gh, gw = x.grid.shape
    setting = (name, kernel, stride, padding, dilation, fill, ceil_mode)
    return plan(x.block, (gh, gw), x.padding, *setting)


@functools.lru_cache(maxsize=4096)
def _plan(
    block: int,
    cells: tuple[int, int],
    extra: Padding | None,
    name: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    fill: float,
    ceil_mode: bool,
) -> Plan:
    windows = _axes(extra or Padding(0, 0, 0, 0), kernel, stride, padding, dilation)
    out = _output_block(block, cells, extra, windows, name, ceil_mode)
    vertical, horizontal = windows
    sides = (horizontal.before, horizontal.halo_after, vertical.before, vertical.halo_after)
    replicate = False
    if extra:
        replicate, fill = _agree_on_fill(extra, fill, sides)
    inside = max(sides) <= 0 and not (vertical.before or horizontal.before)
    return Plan(windows, None if inside else Halo(sides, replicate, fill), out)


def _axes(
    extra: Padding, kernel: tuple, stride: tuple, padding: tuple | str, dilation: tuple
) -> tuple[Window, Window]:
    around = ((extra.top, extra.bottom), (extra.left, extra.right))
    if padding == "same" and stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1; got {stride}")
    windows = []
    for i, (before, after) in enumerate(around):
        if padding == "same":  # PyTorch puts the odd pixel of padding behind
            reach = dilation[i] * (kernel[i] - 1)
            own = (reach // 2, reach - reach // 2)
        else:
            own = (0, 0) if padding == "valid" else (padding[i], padding[i])
        windows.append(Window(kernel[i], stride[i], before + own[0], after + own[1], dilation[i]))
    return tuple(windows)


def _output_block(
    block: int,
    cells: tuple[int, int],
    extra: Padding | None,
    windows: tuple[Window, Window],
    name: str,
    ceil_mode: bool,
) -> int:
    """Side of a high block after the operation."""
    behind = (extra.bottom, extra.right) if extra else (0, 0)
    for window, count, more in zip(windows, cells, behind):
        size = count * block
        span = size + window.before + window.after - window.reach - 1
        outputs = -(-span // window.stride) + 1 if ceil_mode else span // window.stride + 1
        if ceil_mode and (outputs - 1) * window.stride >= size + window.before + more:
            outputs -= 1  # the last window must start before the pooling's own trailing padding
        if outputs * window.stride != size and size % window.stride == 0:
            raise NotImplementedError(
                f"'{name}' with kernel {window.kernel}, stride {window.stride}, padding "
                f"({window.before}, {window.after}), dilation {window.dilation} turns {size} "
                f"pixels into {outputs}, which blocks cannot line up with; pad so that the output "
                f"has {size // window.stride}, or wrap it in segblocks.no_blocks"
            )
    stride = windows[0].stride
    if stride != windows[1].stride:
        raise NotImplementedError(
            f"'{name}' with stride {(stride, windows[1].stride)} would make blocks that are not "
            "square; wrap it in segblocks.no_blocks"
        )
    if block % (2 * stride):
        raise ValueError(
            f"'{name}' with stride {stride} on blocks of {block} pixels at this layer: a low "
            f"block of {block // 2} cannot be divided; choose a block_size that is a multiple "
            "of twice the network's stride, or wrap it in segblocks.no_blocks"
        )
    return block // stride


def padded_blocks(x: DualResTensor, halo: Halo | None) -> tuple[Tensor, Tensor]:
    """High blocks (n_high, C, h, w) and low blocks (n_low, C, h', w') of `x` with their halo."""
    return split_blocks(pad_pixels(x.stored, x.grid, x.block, halo), x.grid, x.block, halo)


def pad_pixels(pixels: Tensor, grid: BlockGrid, block: int, halo: Halo | None) -> Tensor:
    """`blockpad` of a (P, C) buffer."""
    if halo is None:
        return pixels
    where = (grid.slot, grid.cells, grid.n_high, block)
    return blockpad(pixels.contiguous(), *where, *halo.sides, halo.replicate, halo.fill)


def split_blocks(
    pixels: Tensor, grid: BlockGrid, block: int, halo: Halo | None = None
) -> tuple[Tensor, Tensor]:
    """Views (n_high, C, h, w) and (n_low, C, h', w') of a buffer of blocks, padded or not."""
    left, right, top, bottom = halo.sides if halo else (0, 0, 0, 0)
    height, width, channels = block + top + bottom, block + left + right, pixels.shape[1]
    rows, half = grid.n_high * height * width, block // 2
    # One operation, so that the gradients of both are joined in one.
    high, low = pixels.split((rows, pixels.shape[0] - rows))
    high = high.view(grid.n_high, height, width, channels)
    low = low.view(grid.n_low, height - half, width - half, channels)
    return high.permute(0, 3, 1, 2), low.permute(0, 3, 1, 2)


def _agree_on_fill(
    padding: Padding, fill: float, sides: tuple[int, int, int, int]
) -> tuple[bool, float]:
    """One kind of padding for a halo in which `F.pad` and the operation itself take part."""
    left, right, top, bottom = sides
    alone = (left, top) == (padding.left, padding.top)
    alone = alone and right <= padding.right and bottom <= padding.bottom
    # What F.pad crops, padding again would bring back.
    crops = min(padding.left, padding.right, padding.top, padding.bottom) < 0
    if alone or (padding.fill == fill and not padding.replicate and not crops):
        return padding.replicate, padding.fill
    kind = "replicate" if padding.replicate else "crop" if crops else padding.fill
    raise NotImplementedError(
        f"F.pad ({kind}) followed by an operation that pads again with {fill}; pad once, or wrap "
        "both in segblocks.no_blocks"
    )


def map_blocks(
    x: DualResTensor,
    function: Callable[[Tensor], Tensor],
    blocks: tuple[Tensor, Tensor],
    block: int,
) -> DualResTensor:
    """Apply `function` to the high and to the low blocks and store both in one buffer."""
    parts = [function(part) for part in blocks if part.shape[0]]
    pixels = join_blocks(parts)
    return DualResTensor(pixels, x.grid, block)


def join_blocks(parts: list[Tensor]) -> Tensor:
    """(P, C) of the blocks (n, C, h, w) of each resolution that has any."""
    rows = [part.permute(0, 2, 3, 1).reshape(-1, part.shape[1]) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
