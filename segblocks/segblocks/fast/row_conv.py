"""The convolution that goes row by row: weights packed for it, compiled once, launched on PyTorch's
stream."""

import functools
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.cuda.launch import Kernel, launch
from ..ops.cuda.module import function
from .hopper import load
from .row_tiles import STEP, Division, Tile
from .tables import Scale


def pack_weights(matrix: Tensor, taps: int = 1) -> Tensor:
    """Lay weights out as the kernel's shared-memory tiles, swizzle included.

    Args:
        matrix: (taps * CIN, COUT), taps outermost, CIN a multiple of 64; zeros fill it up where
            the input has fewer channels.

    Returns:
        (K/64, COUT rounded up to 128, 64), taps innermost: of each output channel 64 consecutive
        input channels, whose 16-byte chunks are permuted by the output channel modulo 8.
    """
    k, cout = matrix.shape
    steps, padded = k // STEP, -(-cout // 128) * 128
    matrix = matrix.view(taps, -1, STEP, cout).transpose(0, 1).reshape(steps, STEP, cout)
    tiles = matrix.new_zeros((steps, padded, STEP))
    tiles[:, :cout] = matrix.transpose(1, 2)
    chunks = tiles.view(steps, padded, 8, 8)
    channel = torch.arange(padded, device=matrix.device)[:, None] % 8
    order = torch.arange(8, device=matrix.device)[None] ^ channel  # padded,8
    index = order[None, :, :, None].expand_as(chunks)
    return chunks.gather(2, index).view_as(tiles).contiguous()


@dataclass(frozen=True)
class Fused:
    """What one launch does besides the convolution; each set of flags is its own kernel.

    `limited`: the ReLU has an upper limit. `ragged`: input channels are a multiple of 8, not of 64.
    With `late`, batch norm, addend, ReLU and averages are arguments of the launch (`Late`).
    """

    taps: int = 9
    extra: bool = False
    add: int = 0
    pre: bool = False
    post: bool = False
    relu: bool = False
    limited: bool = False
    ragged: bool = False
    averages: bool = True
    stem: bool = False
    separate: bool = False
    late: bool = False


def convolve(
    fused: Fused,
    division: Division,
    scale: Scale,
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    out: Tensor,
    channels: tuple[int, int, int],
    own: Tensor,
    table: Tensor,
    x2: Tensor | None = None,
    table2: Tensor | None = None,
    addend: Tensor | None = None,
    up_table: Tensor | None = None,
    up_scale: Scale | None = None,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    count: Tensor | None = None,
    lines: tuple[int, int] = (0, 0),
    limit: float = 0.0,
) -> None:
    """Enqueue one convolution; the kernel's header says what each tensor holds.

    Args:
        channels: input, second input, output.
        lines: elements in a line of a padded high and low block, for the stem.
        count: (4096,) int32 zeros, for split tiles; they are zeros again afterwards.
        limit: of the ReLU, if it is `limited`.
    """
    cin, cin2, cout = channels
    work = None
    if division.work:
        work = torch.empty(division.work, dtype=torch.float32, device=x.device)
    tensors = (
        x,
        table,
        packed,
        bias,
        x2,
        table2,
        own,
        addend,
        up_table,
        pre,
        post,
        out,
        work,
        count,
    )
    # And nothing that eager inference alone gives.
    pointers = struct.pack("14Q", *(0 if t is None else t.data_ptr() for t in tensors)) + bytes(40)
    sizes = struct.pack(
        "17i2f4x",
        scale.rows,
        scale.high_rows,
        scale.block,
        scale.pitch,
        up_scale.high_rows if up_scale else 0,
        up_scale.pitch if up_scale else 0,
        up_scale.zero if up_scale else 0,
        cin,
        cin2,
        cout,
        packed.shape[1],
        division.whole,
        division.split,
        *lines,
        0,
        0,
        0.0,
        limit,
    )
    tile = division.tile
    kernel = _kernel(fused, tile, x.dtype, x.device.index)
    shape, threads = (division.blocks,), (256 + tile.producers,)
    # It reads tables early, which the launch ahead has not made.
    launch(kernel, shape, threads, tile.shared, pointers + sizes, x.device, follows=True)


class Late(NamedTuple):
    """What a `late` launch does besides the convolution.

    Attributes:
        relu: at the end. averages: `out` is an extended buffer and its averages are written.
        half: the statistics of the batch norm are of x's type, not float32; eps: its constant.
    """

    relu: bool = False
    averages: bool = False
    half: bool = False
    eps: float = 0.0


def prepare_late(
    fused: Fused,
    late: Late,
    division: Division,
    scale: Scale,
    channels: tuple[int, int, int],
    padded: int,
    stored: int,
    dtype: torch.dtype,
    device: int,
    lines: tuple[int, int] = (0, 0),
) -> Kernel:
    """The launch of a convolution for 19 addresses, in the order of the kernel's `Arguments`.

    Args:
        division: of whole tiles alone.
        channels, stored, lines: as for `convolve`. padded: output channels of the packed weights.
    """
    sizes = (scale.rows, scale.high_rows, scale.block, scale.pitch, 0, 0, 0, *channels, padded)
    flags = late.relu + 2 * late.averages + 4 * late.half
    shares = (division.whole, division.split)
    constants = struct.pack("17i2f4x", *sizes, *shares, *lines, stored, flags, late.eps, 0.0)
    tile = division.tile
    kernel = _kernel(fused, tile, dtype, device)
    shape, threads = (division.blocks,), (256 + tile.producers,)
    return Kernel(kernel, shape, threads, tile.shared, constants, pointers=19)


@functools.cache
def _kernel(fused: Fused, tile: Tile, dtype: torch.dtype, device: int) -> Any:
    constants = {
        "DTYPE": 1 if dtype == torch.bfloat16 else 0,
        "VECTOR": 8,
        "INDEX64": 0,
        "BM": tile.rows,
        "BN": tile.columns,
        "STAGES": tile.stages,
        "BLOCKS": tile.resident,
        "PRODUCERS": tile.producers,
        "TAPS": fused.taps,
        "EXTRA": fused.extra,
        "ADD": fused.add,
        "PRE": fused.pre,
        "POST": fused.post,
        "RELU": fused.relu + fused.limited,
        "RAGGED": fused.ragged,
        "AVERAGES": fused.averages,
        "STEM": fused.stem,
        "SEPARATE": fused.separate,
        "LATE": fused.late,
    }
    options = tuple(f"-DSB_{name}={int(value)}" for name, value in constants.items())
    given = ("block_conv", ("-std=c++17", *options), device, tile.shared)
    if tile.producers:
        return load("conv_sm90.cu", *given)
    return function("conv_sm80.cu", *given)
