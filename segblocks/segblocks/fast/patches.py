"""The Hopper 3×3 convolution that fetches pixels once for nine taps: weights, tables, launch.

`patch_sm90.cu` says what the kernel does, `tilings.py` how the work is shared.
"""

import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops.cuda.launch import launch
from ..ops.cuda.module import defines, prepare
from .hopper import load
from .row_conv import pack_weights
from .tables import Scale, pack_blocks
from .tilings import MAX_PARTS, SHARED, SLICE, Cut, Division, needs_table

_TILE_PITCH = 540  # of the table of tiles
_ENTRIES = 4  # tables a launch can fill


def build_patches(
    slot: Tensor, cells: Tensor, n_high: int, cuts: Iterable[Cut]
) -> dict[Cut, Tensor]:
    """What the tiles of stride 1 read and write (patch_tables.cu); nothing of those that are rows.

    Args:
        slot (N, Gh, Gw), cells (N·Gh·Gw,) int32: as from `build_slots`.
    """
    tables = new_patches(slot, cuts)
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


def new_patches(slot: Tensor, cuts: Iterable[Cut]) -> dict[Cut, Tensor]:
    """The tables of `build_patches`, yet to be filled in."""
    return {
        cut: torch.empty((cut.tiling.tiles, _TILE_PITCH), dtype=torch.int32, device=slot.device)
        for cut in cuts
        if cut.tiling.has_patches
    }


def pack_patches(slot: Tensor, n_high: int, cut: Cut, table: Tensor) -> bytes:
    """The struct TileEntry of patch_tables.cuh."""
    scale = Scale.of(cut.block, n_high, slot.numel())
    at = (scale.block, scale.high_rows, scale.rows, scale.zero)
    return struct.pack("Q4i", table.data_ptr(), *at) + cut.tiling.packed


def applies(weight: Tensor, block: int, extra: Tensor | None) -> bool:
    """Whether the kernel is to do a convolution (COUT, CIN, 3, 3) that makes high blocks with sides
    of `block`, with a 1×1 one beside it. It could do smaller blocks, but would fetch their pixels
    several times, which `convolve` does faster."""
    if block < 8 or needs_table(block):
        return False
    whole = weight.shape[0] % SLICE == 0 and weight.shape[1] % SLICE == 0
    return weight.shape[2] == 3 and whole and (extra is None or extra.shape[1] % SLICE == 0)


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
    return torch.eye(SLICE).repeat(1, channels // SLICE)


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
        size = d.tiling.tiles * d.slices * d.parts * SLICE * d.tiling.most_pixels
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
        "20i",
        *(scale.pitch, cin, cout, packed.shape[1], width2, step2, stride2),
        *(d.parts, *d.chunk_of, *(0,) * (MAX_PARTS - d.parts)),
        *(d.stages, d.ring, d.tiling.plane),
    )
    flags = {"post": post is not None, "relu": relu, "resident": d.resident}
    flags["triples"] = d.tiling.triples > 0
    options = defines(dtype=x.dtype == torch.bfloat16, vector=8, index64=0, **flags)
    kernel = load("patch_sm90.cu", "patch_conv", options, x.device.index, SHARED + 1024)
    launch(kernel, (d.blocks, 1), (512,), d.shared, pointers + sizes, x.device, follows=True)
