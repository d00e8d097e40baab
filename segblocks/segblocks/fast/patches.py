"""The Hopper 3×3 convolution that fetches pixels once for nine taps: how it cuts the work, and its
launch. `patch_sm90.cu` says what the kernel does."""

import functools
import struct
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from ..ops.cuda.module import Kernel, defines, import_cupy, multiprocessors, source
from .hopper import cubin, pack_weights
from .tables import Scale

_TALL, _PAIR, _ROWS = 0, 1, 2  # kinds of tiles
_TILE = 128  # pixels
_SLICE = 64  # output channels of a thread block, and input channels of a stage
_STAGE_BYTES = _SLICE * _SLICE * 2
_PLANES = {_TALL: 2960, _PAIR: 3216, _ROWS: 2064}  # bytes; 16 more than a multiple of 128
_SHARED = 232448 - 2048  # dynamic shared memory, less alignment and the barriers
_INDEX_BYTES = 9 * _TILE * 4
_MAX_PARTS, _MAX_RING, _STREAMED = 8, 8, 10


@dataclass(frozen=True)
class Division:
    """How one convolution is cut; attributes as in the kernel's `Arguments`."""

    high_kind: int
    low_kind: int
    high_tiles: int
    tiles: int
    first_row: int
    chunk_of: tuple[int, ...]
    resident: bool
    stages: int
    ring: int
    lanes: int
    slices: int

    @property
    def parts(self) -> int:
        return len(self.chunk_of) - 1

    @property
    def plane(self) -> int:
        return _plane(self.high_kind, self.low_kind)

    @property
    def shared(self) -> int:
        rows = _INDEX_BYTES * (1 if self.resident else 2)
        return self.stages * _STAGE_BYTES + self.ring * 8 * self.plane + rows + 1024

    @property
    def blocks(self) -> int:
        return self.lanes * self.slices * self.parts


def applies(weight: Tensor, extra: Tensor | None) -> bool:
    """Whether the kernel does this convolution (COUT, CIN, 3, 3), with a 1×1 one beside it."""
    whole = weight.shape[0] % _SLICE == 0 and weight.shape[1] % _SLICE == 0
    return weight.shape[2] == 3 and whole and (extra is None or extra.shape[1] % _SLICE == 0)


def needs_table(block: int, stride: int) -> bool:
    """Whether any of its tiles reads the neighbour table of blocks with sides of `block`."""
    return stride != 1 or block % 16 != 0


def pack_patch_weights(matrix: Tensor, taps: int = 1) -> Tensor:
    """`pack_weights` with output channels in the order in which the kernel's threads hold them."""
    place = torch.arange(16)
    order = 4 * (place % 8 // 2) + place % 2 + 2 * (place // 8)
    columns = torch.arange(matrix.shape[1]).view(-1, 16)[:, order].flatten()
    return pack_weights(matrix[:, columns.to(matrix.device)].contiguous(), taps)


@functools.cache
def divide(
    block: int,
    stride: int,
    n_high: int,
    n_low: int,
    channels: tuple[int, int, int],
    processors: int,
) -> Division:
    """Cut a convolution into tiles, parts of its inner dimension, and thread blocks.

    Args:
        block: side of a high block of the output in pixels.
        channels: input, second input, output.
    """
    high_kind, low_kind = _kind(block, stride), _kind(block // 2, stride)
    if n_low == 0:
        low_kind = high_kind
    high_rows, low_rows = n_high * block**2, n_low * (block // 2) ** 2
    first_row = high_rows
    if high_kind == _ROWS:  # then all rows are one range, whatever their resolution
        first_row, low_rows, high_rows, low_kind = 0, high_rows + low_rows, 0, _ROWS
    elif not high_rows:
        high_kind = low_kind
    high_tiles, low_tiles = _tiles(high_rows, high_kind), _tiles(low_rows, low_kind)
    tiles = high_tiles + low_tiles
    slices = channels[2] // _SLICE
    taps = [9] * (channels[0] // _SLICE) + [1] * (channels[1] // _SLICE)
    slot = 8 * _plane(high_kind, low_kind)
    space = _SHARED - _INDEX_BYTES
    resident, stages = True, sum(taps)
    chunk_of = (0, len(taps))
    if stages * _STAGE_BYTES + 2 * slot > space:
        if tiles * slices >= 3 * processors:
            resident, stages, space = False, _STREAMED, space - _INDEX_BYTES
        else:
            most = (space - 3 * slot) // _STAGE_BYTES
            chunk_of = _balance(taps, most)
            stages = max(sum(taps[a:b]) for a, b in zip(chunk_of, chunk_of[1:]))
    ring = min(_MAX_RING, (space - stages * _STAGE_BYTES) // slot)
    lanes = max(1, min(processors // (slices * (len(chunk_of) - 1)), tiles))
    return Division(
        high_kind,
        low_kind,
        high_tiles,
        tiles,
        first_row,
        chunk_of,
        resident,
        stages,
        ring,
        lanes,
        slices,
    )


def _kind(side: int, stride: int) -> int:
    if stride != 1 or side % 8:
        return _ROWS
    return _TALL if side % 16 == 0 else _PAIR


def _plane(high_kind: int, low_kind: int) -> int:
    return max(_PLANES[high_kind], _PLANES[low_kind])


def _tiles(rows: int, kind: int) -> int:
    # Pairs take patches of two blocks, and blocks are whole patches, so rows tell.
    return -(-rows // _TILE)


def _balance(taps: list[int], most: int) -> tuple[int, ...]:
    """Boundaries of as few runs of chunks as `most` stages each allow, of nearly the same size."""
    for parts in range(1, _MAX_PARTS + 1):
        share, bounds, total = sum(taps) / parts, [0], 0
        for i, count in enumerate(taps):
            if len(bounds) < parts and total + count / 2 > share * len(bounds):
                bounds.append(i)
            total += count
        bounds.append(len(taps))
        if max(sum(taps[a:b]) for a, b in zip(bounds, bounds[1:])) <= most:
            return tuple(bounds)
    raise ValueError(f"an inner dimension of {sum(taps)} stages of 64 does not fit in {_MAX_PARTS}")


def convolve_patches(
    division: Division,
    scale: Scale,
    grid: Any,
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    out: Tensor,
    channels: tuple[int, int, int],
    own: Tensor,
    table: Tensor | None,
    x2: Tensor | None = None,
    table2: Tensor | None = None,
    block2: int = 0,
    stride2: int = 1,
    addend: Tensor | None = None,
    post: Tensor | None = None,
    relu: bool = False,
    count: Tensor | None = None,
) -> None:
    """Enqueue one convolution; the kernel's header says what each tensor holds."""
    d = division
    work = None
    if d.parts > 1:
        size = d.tiles * d.slices * d.parts * _SLICE * _TILE
        work = torch.empty(size, dtype=torch.float32, device=x.device)
    tensors = (
        x,
        packed,
        bias,
        x2,
        table2,
        table,
        own,
        grid.slot,
        grid.cells,
        addend,
        post,
        out,
        work,
        count,
    )
    pointers = struct.pack("14Q", *(0 if t is None else t.data_ptr() for t in tensors))
    cin, cin2, cout = channels
    chunk_of = (*d.chunk_of, *(0,) * (_MAX_PARTS + 1 - len(d.chunk_of)))
    sizes = struct.pack(
        "36i",
        *(scale.block, scale.high_rows, scale.rows, scale.zero),
        *(*grid.slot.shape[1:], grid.n_high, grid.cells.numel(), scale.pitch),
        *(d.high_tiles, d.tiles, d.high_kind, d.low_kind, d.first_row),
        *(cin, cin2, cout, packed.shape[1], block2, stride2),
        *(d.parts, *chunk_of),
        *(d.resident, d.stages, d.ring, d.plane, relu, 1),
    )
    record = numpy.dtype((numpy.void, len(pointers) + len(sizes)))
    kernel = _kernel(x.dtype, x.device.index)
    Kernel(kernel, (d.blocks, 1), (416,), d.shared, pointers + sizes, record).launch(x.device)


@functools.cache
def _kernel(dtype: torch.dtype, device: int) -> Any:
    options = defines(dtype=dtype == torch.bfloat16, vector=8, index64=0)
    cupy = import_cupy()
    with cupy.cuda.Device(device):
        binary = cubin(source("patch_sm90.cu"), (*options, "-arch=sm_90a"))
        raw = cupy.RawModule(path=str(binary)).get_function("patch_conv")
        raw.max_dynamic_shared_size_bytes = _SHARED + 1024
        return raw.kernel


def plan(
    scale: Scale, stride: int, grid: Any, channels: tuple[int, int, int], device: torch.device
) -> Division:
    """`divide` for a grid on a device."""
    n_low = grid.cells.numel() - grid.n_high
    processors = multiprocessors(device.index)
    return divide(scale.block, stride, grid.n_high, n_low, channels, processors)
