"""The Hopper 3×3 convolution that fetches pixels once for nine taps: how it cuts the work, and its
launch. `patch_sm90.cu` says what the kernel does."""

import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..ops.cuda.launch import launch
from ..ops.cuda.module import defines, multiprocessors, prepare
from .hopper import load, pack_weights
from .tables import Scale, pack_blocks

_TALL, _PAIR, _WOVEN, _ROWS = 0, 1, 2, 3  # kinds of tiles
_TILE = 128  # pixels
_SLICE = 64  # output channels of a thread block, and input channels of a stage
_STAGE_BYTES = _SLICE * _SLICE * 2
# Bytes of eight channels of a slot's pixels: 16 more than a multiple of 128, so that banks differ.
_PLANES = {_TALL: 2960, _PAIR: 3216, _WOVEN: 4624, _ROWS: 2064}
_SHARED = 232448 - 2048  # dynamic shared memory, less alignment and the barriers
_MAX_PARTS, _MAX_RING, _STREAMED = 8, 8, 8
_TILE_PITCH = 448  # of the table of tiles
_ENTRIES = 4  # tables a launch can fill


@dataclass(frozen=True)
class Tiling:
    """Tiles of 128 pixels at one scale; attributes as in the kernel's `Tiling`."""

    high_tiles: int
    tiles: int
    high_kind: int
    low_kind: int
    first_row: int

    @classmethod
    def of(cls, scale: Scale) -> "Tiling":
        high_kind, low_kind = _high_kind(scale.block), _low_kind(scale.block // 2)
        high_rows, low_rows = scale.high_rows, scale.rows - scale.high_rows
        if high_kind == _ROWS or not high_rows:
            # One range of rows: whatever their resolution, or low ones alone.
            high_rows, low_rows = 0, scale.rows
            high_kind = low_kind
        elif not low_rows:
            low_kind = high_kind
        # Blocks are whole patches, so that rows tell their number.
        high_tiles, low_tiles = -(-high_rows // _TILE), -(-low_rows // _TILE)
        return cls(high_tiles, high_tiles + low_tiles, high_kind, low_kind, high_rows)

    @property
    def plane(self) -> int:
        """Bytes of eight channels of a tile's pixels in shared memory."""
        return max(_PLANES[self.high_kind], _PLANES[self.low_kind])

    @property
    def slot(self) -> int:
        """Bytes of 64 channels of a tile's pixels, and of its output rows, in shared memory."""
        return 8 * self.plane + (_TILE + 32) * 4

    @property
    def has_patches(self) -> bool:
        return self.high_kind != _ROWS

    @property
    def packed(self) -> bytes:
        sizes = (self.high_tiles, self.tiles, self.high_kind, self.low_kind, self.first_row)
        return struct.pack("5i", *sizes)


def build_patches(
    slot: Tensor, cells: Tensor, n_high: int, blocks: Iterable[int]
) -> dict[int, Tensor]:
    """For each side of a high block, what the tiles of stride 1 read and write (patch_tables.cu).

    Args:
        slot (N, Gh, Gw), cells (N·Gh·Gw,) int32: as from `build_slots`.
    """
    tables = new_patches(slot, n_high, blocks)
    made = [pack_patches(slot, n_high, *entry) for entry in tables.items()]
    for start in range(0, len(made), _ENTRIES):
        some = made[start : start + _ENTRIES]
        record = b"".join(some).ljust(48 * _ENTRIES, b"\0")
        sizes = [len(table) for table in list(tables.values())[start : start + _ENTRIES]]
        prepare(
            "patch_tables.cu",
            "build_patches",
            ("-std=c++17",),
            slot.device.index,
            max(sizes),
            192,
            pack_blocks(slot, n_high) + record,
            pointers=2,
            rows=len(some),
        ).launch(slot.device, slot.data_ptr(), cells.data_ptr())
    return tables


def new_patches(slot: Tensor, n_high: int, blocks: Iterable[int]) -> dict[int, Tensor]:
    """The tables of `build_patches`, yet to be filled in."""
    tables: dict[int, Tensor] = {}
    for block in blocks:
        tiling = Tiling.of(Scale.of(block, n_high, slot.numel()))
        if tiling.has_patches:
            shape = (tiling.tiles, _TILE_PITCH)
            tables[block] = torch.empty(shape, dtype=torch.int32, device=slot.device)
    return tables


def pack_patches(slot: Tensor, n_high: int, block: int, table: Tensor) -> bytes:
    """The struct TileEntry of patch_tables.cuh."""
    scale = Scale.of(block, n_high, slot.numel())
    at = (scale.block, scale.high_rows, scale.rows, scale.zero)
    return struct.pack("Q4i", table.data_ptr(), *at) + Tiling.of(scale).packed + bytes(4)


@dataclass(frozen=True)
class Division:
    """How the work of one convolution is shared; attributes as in the kernel's `Arguments`."""

    tiling: Tiling
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
    def shared(self) -> int:
        return self.stages * _STAGE_BYTES + self.ring * self.tiling.slot + 1024

    @property
    def blocks(self) -> int:
        return self.lanes * self.slices * self.parts


def applies(weight: Tensor, block: int, extra: Tensor | None) -> bool:
    """Whether the kernel is to do a convolution (COUT, CIN, 3, 3) that makes high blocks with sides
    of `block`, with a 1×1 one beside it. It could do smaller blocks, but would fetch their pixels
    several times, which `convolve` does faster."""
    if block < 8 or needs_table(block):
        return False
    whole = weight.shape[0] % _SLICE == 0 and weight.shape[1] % _SLICE == 0
    return weight.shape[2] == 3 and whole and (extra is None or extra.shape[1] % _SLICE == 0)


def needs_table(block: int) -> bool:
    """Whether any tile of an output with that side of a high block reads the neighbour table."""
    return _ROWS in (_high_kind(block), _low_kind(block // 2))


def pack_patch_weights(matrix: Tensor, taps: int = 1) -> Tensor:
    """`pack_weights` with output channels in the order in which the kernel's threads hold them, and
    taps column by column."""
    place = torch.arange(16)
    order = 4 * (place % 8 // 2) + place % 2 + 2 * (place // 8)
    columns = torch.arange(matrix.shape[1]).view(-1, 16)[:, order].flatten()
    matrix = matrix[:, columns.to(matrix.device)]
    if taps == 9:  # column by column
        matrix = matrix.view(3, 3, -1, matrix.shape[1]).transpose(0, 1).flatten(0, 2)
    return pack_weights(matrix.contiguous(), taps)


def identity(channels: int) -> Tensor:
    """(64, channels): weights that pass a residual on, each 64 channels their own."""
    return torch.eye(_SLICE).repeat(1, channels // _SLICE)


@functools.cache
def divide(tiling: Tiling, channels: tuple[int, int, int], processors: int) -> Division:
    """Share a convolution among thread blocks: tiles, output channels, the inner dimension.

    Args:
        channels: input, second input, output.
    """
    slices = channels[2] // _SLICE
    taps = [9] * (channels[0] // _SLICE) + [1] * (channels[1] // _SLICE)
    slot = tiling.slot
    resident, stages, chunk_of = True, sum(taps), (0, len(taps))
    # Products hold a slot until those after them are issued, so fewer than three do not do.
    if stages * _STAGE_BYTES + 3 * slot > _SHARED:
        parts = _balance(taps, (_SHARED - 3 * slot) // _STAGE_BYTES)
        # Parts pay where each thread block has one tile or none: adding them up takes time.
        if parts is None or tiling.tiles * slices * (len(parts) - 1) > processors:
            resident, stages = False, _STREAMED
        else:
            chunk_of, stages = parts, max(sum(taps[a:b]) for a, b in pairwise(parts))
    ring = min(_MAX_RING, (_SHARED - stages * _STAGE_BYTES) // slot)
    lanes = max(1, min(processors // (slices * (len(chunk_of) - 1)), tiling.tiles))
    return Division(tiling, chunk_of, resident, stages, ring, lanes, slices)


def _high_kind(side: int) -> int:
    if side % 8:
        return _ROWS
    return _TALL if side % 16 == 0 else _PAIR


def _low_kind(side: int) -> int:
    return _WOVEN if side == 4 else _high_kind(side)


def _balance(taps: list[int], most: int) -> tuple[int, ...] | None:
    """Boundaries of as few runs of chunks as `most` stages each allow, of nearly the same size;
    None where that would take too many."""
    for parts in range(1, _MAX_PARTS + 1):
        share, bounds, total = sum(taps) / parts, [0], 0
        for i, count in enumerate(taps):
            if len(bounds) < parts and total + count / 2 > share * len(bounds):
                bounds.append(i)
            total += count
        bounds.append(len(taps))
        if max(sum(taps[a:b]) for a, b in pairwise(bounds)) <= most:
            return tuple(bounds)
    return None


def convolve_patches(
    division: Division,
    scale: Scale,
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    out: Tensor,
    channels: tuple[int, int, int],
    own: Tensor,
    table: Tensor | None,
    patches: Tensor | None,
    x2: Tensor | None = None,
    step2: int = 0,
    stride2: int = 1,
    post: Tensor | None = None,
    relu: bool = False,
    count: Tensor | None = None,
) -> None:
    """Enqueue one convolution; the kernel's header says what each tensor holds."""
    d, work = division, None
    if d.parts > 1:
        size = d.tiling.tiles * d.slices * d.parts * _SLICE * _TILE
        work = torch.empty(size, dtype=torch.float32, device=x.device)
    tensors = (
        x,
        packed,
        bias,
        x2,
        table,
        own,
        patches,
        post,
        out,
        work,
        count,
    )
    pointers = struct.pack("11Q", *(0 if t is None else t.data_ptr() for t in tensors))
    cin, _, cout = channels
    width2 = 0 if x2 is None else x2.shape[1]
    sizes = struct.pack("4i", scale.block, scale.high_rows, scale.rows, scale.zero)
    sizes += d.tiling.packed
    sizes += struct.pack(
        "21i",
        *(scale.pitch, cin, cout, packed.shape[1], width2, step2, stride2),
        *(d.parts, *d.chunk_of, *(0,) * (_MAX_PARTS - d.parts)),
        *(d.stages, d.ring, d.tiling.plane, 0),
    )
    flags = {"post": post is not None, "relu": relu, "resident": d.resident}
    options = defines(dtype=x.dtype == torch.bfloat16, vector=8, index64=0, **flags)
    kernel = load("patch_sm90.cu", "patch_conv", options, x.device.index, _SHARED + 1024)
    launch(kernel, (d.blocks, 1), (512,), d.shared, pointers + sizes, x.device, follows=True)


def plan(scale: Scale, channels: tuple[int, int, int], device: torch.device) -> Division:
    """`divide` on a device."""
    return divide(Tiling.of(scale), channels, multiprocessors(device.index))
