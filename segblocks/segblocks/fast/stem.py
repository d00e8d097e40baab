"""The first layers: image to padded blocks, 7×7 convolution, and max pooling."""

import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.cuda import geometry as geo
from ..ops.cuda.launch import launch
from ..ops.cuda.module import Kernel, multiprocessors, prepare
from .hopper import load
from .tables import Scale

_HALO = 3  # pixels round a block that the 7×7 window reads
# Weights, a ring of two tiles, alignment; and room behind the last line, because compute-sanitizer
# takes columns that overlap for columns that follow each other.
_STEM_SHARED = 4 * 8192 + 2 * 22528 + 1024 + 2048


def stem_matrix(weight: Tensor) -> Tensor:
    """(256, COUT): a 3×3 or 7×7 kernel as eight rows of eight pixels of four channels."""
    cout, cin, size, _ = weight.shape
    edge = (7 - size) // 2
    whole = weight.new_zeros((cout, 4, 8, 8))
    whole[:, :cin, edge : edge + size, edge : edge + size] = weight
    return whole.permute(2, 3, 1, 0).reshape(256, cout)  # dy,dx,c -> cout


def stem_applies(channels: int, block: int) -> bool:
    """Whether `convolve_stem` makes that many channels of high blocks with sides of `block`."""
    return channels % 64 == 0 and block in (32, 64)


def convolve_stem(
    x: Tensor, packed: Tensor, bias: Tensor, out: Tensor, scale: Scale, n_blocks: int, relu: bool
) -> None:
    """Enqueue the first convolution; the header of `stem_sm90.cu` says what each tensor holds.

    Args:
        x: from `split_padded`. scale: of the output.
    """
    n_high, cout = scale.high_rows // scale.block**2, out.shape[1]
    lines = [min(side, 512 // side) for side in (scale.block, scale.block // 2)]
    high_tiles = n_high * scale.block // lines[0]
    tiles = high_tiles + (n_blocks - n_high) * (scale.block // 2) // lines[1]
    record = struct.pack("4Q", *(t.data_ptr() for t in (x, packed, bias, out)))
    record += struct.pack("4i", scale.block, scale.high_rows, scale.rows, scale.zero)
    record += struct.pack("4i", n_high, n_blocks, cout, packed.shape[1])
    record += struct.pack("4i", high_tiles, tiles, relu, 0)
    slices = cout // 64
    blocks = slices * max(1, min(tiles, 2 * multiprocessors(x.device.index) // slices))
    kernel = load("stem_sm90.cu", "stem_conv", _options(x.dtype), x.device.index, _STEM_SHARED)
    launch(kernel, (blocks, 1), (288,), _STEM_SHARED, record, x.device, follows=True)


def padded_lines(block: int) -> tuple[int, int]:
    """Elements in a line of a padded high and of a padded low block."""
    return (block + 2 * _HALO) * 4, (block // 2 + 2 * _HALO) * 4


@dataclass(frozen=True)
class Split:
    """The launch of `split_padded`.

    Attributes:
        rows: padded pixels of all blocks.
        blocks: thread blocks of 256 threads.
        record: the struct Split of padded.cuh after its pointers.
    """

    rows: int
    options: tuple[str, ...]
    blocks: int
    record: bytes


def plan_split(
    shape: tuple[int, int, int],
    n_high: int,
    block: int,
    dtype: torch.dtype,
    strides: tuple[int, int, int, int],
    packed: bool,
) -> Split:
    """How an image becomes padded blocks.

    Args:
        shape: of the grid. strides, packed: of the image, see `is_packed`.
    """
    n, gh, gw = shape
    n_low = n * gh * gw - n_high
    sides = (block + 2 * _HALO, block // 2 + 2 * _HALO)
    pairs = [side // 2 + 1 for side in sides]  # that a line touches, the first and the last by half
    chunks = [-(-side * pair // 256) for side, pair in zip(sides, pairs)]
    record = struct.pack("4q", *strides)
    record += struct.pack("6i", gh, gw, n_high, block, *chunks)
    record += struct.pack("6I", *geo.divider(pairs[0]), *geo.divider(pairs[1]))
    options = _options(dtype, PACKED=packed)
    rows = n_high * sides[0] ** 2 + n_low * sides[1] ** 2
    return Split(rows, options, n_high * chunks[0] + n_low * chunks[1], record)


def split_padded(
    image: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, dtype: torch.dtype
) -> Tensor:
    """The image (N, 3, H, W) of any strides as padded blocks of four channels, in `dtype`."""
    image = image.to(dtype)
    setting = (tuple(slot.shape), n_high, block, dtype, image.device.index, image.stride())
    rows, kernel = prepare_padded(*setting, is_packed(image))
    out = torch.empty((rows, 4), dtype=dtype, device=image.device)
    kernel.launch(image.device, *(t.data_ptr() for t in (image, out, slot, cells)))
    return out


def prepare_padded(
    shape: tuple[int, int, int],
    n_high: int,
    block: int,
    dtype: torch.dtype,
    device: int | None,
    strides: tuple[int, int, int, int],
    packed: bool,
) -> tuple[int, Kernel]:
    """Rows of what `split_padded` makes, and its launch for image, output, slot and cells."""
    split = plan_split(shape, n_high, block, dtype, strides, packed)
    place = (split.options, device, split.blocks, 256, split.record)
    return split.rows, prepare("stem.cu", "split_padded", *place, pointers=4)


def is_packed(image: Tensor) -> bool:
    """Whether the values of a line of pixels lie side by side, every line on 16 bytes."""
    strides = [image.stride(i) * image.element_size() for i in (0, 2)]
    aligned = not any(address % 16 for address in (image.data_ptr(), *strides))
    return image.stride(1) == 1 and image.stride(3) == 3 and aligned


def stem_places(scale: Scale, n_high: int, n_blocks: int, block: int, device) -> Tensor:
    """(pitch,) int32: where each output row's window starts; the same for every grid."""
    table = torch.empty(scale.pitch, dtype=torch.int32, device=device)
    record = struct.pack("4i", n_high, n_blocks, block, scale.pitch)
    prepare(
        "stem.cu",
        "stem_places",
        _options(torch.float16, PACKED=0),
        device.index,
        -(-scale.pitch // 256),
        256,
        record,
        pointers=1,
    ).launch(device, table.data_ptr())
    return table


def max_pool(x: Tensor, table: Tensor, own: Tensor, source: Scale, scale: Scale) -> Tensor:
    """3×3 max pooling with stride 2 of an extended buffer, into an extended buffer."""
    channels = x.shape[1]
    out = torch.empty((scale.zero + 1, channels), dtype=x.dtype, device=x.device)
    sizes = (source.zero, scale.rows, scale.high_rows, scale.block, scale.pitch, channels)
    prepare(
        "pool.cu",
        "max_pool",
        _options(x.dtype),
        x.device.index,
        -(-(-(-scale.rows // 4) * channels // 8) // 256),
        256,
        struct.pack("6i", *sizes),
        pointers=4,
    ).launch(x.device, *(t.data_ptr() for t in (x, table, own, out)))
    return out


def extend(pixels: Tensor, own: Tensor, scale: Scale) -> Tensor:
    """A (P, C) pixel buffer as an extended one: with averages and the row of zeros."""
    out = pixels.new_empty((scale.zero + 1, pixels.shape[1]))
    out[: scale.rows] = pixels
    fill_averages(out, own, out[scale.rows :], scale)
    return out


def split_extended(image: Tensor, cells: Tensor, grid: tuple[int, ...], scale: Scale) -> Tensor:
    """A dense image (N, C, Gh·b, Gw·b) as the extended buffer of its blocks.

    Args:
        image: half precision, a multiple of 8 channels that are adjacent in memory, aligned to 16
            bytes (`has_adjacent_channels`).
        cells: as from `build_slots`; grid: (N, Gh, Gw).
    """
    channels, half = image.shape[1], scale.block // 2
    out = image.new_empty((scale.zero + 1, channels))
    items = (cells.numel() * half * half + 1) * channels // 8
    n_high = scale.high_rows // scale.block**2
    record = struct.pack("3q", *(image.stride(i) for i in (0, 2, 3)))
    record += struct.pack("6i", *grid[1:], n_high, cells.numel(), scale.block, channels)
    prepare(
        "excursion.cu",
        "split_extended",
        _options(image.dtype),
        image.device.index,
        -(-items // 256),
        256,
        record,
        pointers=3,
    ).launch(image.device, image.data_ptr(), out.data_ptr(), cells.data_ptr())
    return out


def has_adjacent_channels(image: Tensor) -> bool:
    """Whether 16-byte accesses to 8 half-precision channels of (N, C, H, W) are possible."""
    pitches = (image.stride(i) for i in (0, 2, 3))
    aligned = image.data_ptr() % 16 == 0 and not any(pitch % 8 for pitch in pitches)
    return (
        image.element_size() == 2 and image.shape[1] % 8 == 0 and image.stride(1) == 1 and aligned
    )


def fill_averages(pixels: Tensor, own: Tensor, out: Tensor, scale: Scale) -> None:
    """Averages of the high blocks and a row of zeros, (n_high·(b/2)² + 1, C), into `out`."""
    channels = pixels.shape[1]
    quads = scale.high_rows // 4 + 1
    prepare(
        "pool.cu",
        "averages",
        _options(pixels.dtype),
        pixels.device.index,
        -(-quads * channels // 8 // 256),
        256,
        struct.pack("2i", scale.high_rows, channels),
        pointers=3,
    ).launch(pixels.device, pixels.data_ptr(), own.data_ptr(), out.data_ptr())


@functools.cache
def _options(dtype: torch.dtype, **more: int) -> tuple[str, ...]:
    constants = {"DTYPE": dtype == torch.bfloat16, "VECTOR": 8, "INDEX64": 0, **more}
    return ("-std=c++17", *(f"-DSB_{name}={int(value)}" for name, value in constants.items()))
