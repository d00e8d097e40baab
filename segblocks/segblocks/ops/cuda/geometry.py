"""What the launchers share: checks of their input, access widths, parameter structs."""

import struct

import torch
from torch import Tensor

from .. import library

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
ITEMS = 4  # of common.cuh
_INT32 = 2**31 - 1


def check(x: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int) -> None:
    """Raise unless `x` and the bookkeeping fit one another.

    Raises:
        TypeError: a dtype without a kernel.
        ValueError: device, layout, block side or number of blocks that does not fit.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"no CUDA kernel for {x.dtype}; use float16, bfloat16, float32 or float64")
    if slot.dtype != torch.int32 or cells.dtype != torch.int32:
        raise TypeError(
            f"slot and cells must be int32, as from build_slots; got {slot.dtype}, {cells.dtype}"
        )
    if not (slot.is_contiguous() and cells.is_contiguous()):
        raise ValueError("slot and cells must be contiguous; pass what build_slots returned")
    if not x.device == slot.device == cells.device:
        raise ValueError(
            f"tensors on different devices: {x.device}, {slot.device}, {cells.device}; move them "
            "to one"
        )
    if slot.dim() != 3 or slot.numel() != cells.shape[0]:
        raise ValueError(
            f"slot must be (N, Gh, Gw) and cells (N*Gh*Gw,); got {tuple(slot.shape)} and "
            f"{tuple(cells.shape)}"
        )
    if not 0 <= n_high <= cells.shape[0]:
        raise ValueError(f"n_high is {n_high}; the grid has {cells.shape[0]} blocks")
    if block < 2 or block % 2:
        raise ValueError(f"block side must be even and at least 2 pixels; got {block}")


def check_image(image: Tensor, slot: Tensor, block: int) -> None:
    """Raise ValueError unless the image (N, C, H, W) is covered by the grid."""
    n, gh, gw = slot.shape
    if image.dim() != 4 or image.shape[0] != n or image.shape[2:] != (gh * block, gw * block):
        raise ValueError(
            f"image must be ({n}, C, {gh * block}, {gw * block}) for a grid {(n, gh, gw)} of "
            f"{block}-pixel blocks; got {tuple(image.shape)}"
        )


def check_pixels(pixels: Tensor, rows: int) -> None:
    """Raise ValueError unless the pixel buffer is contiguous (rows, C)."""
    if pixels.dim() != 2 or pixels.shape[0] != rows:
        raise ValueError(f"pixel buffer must be ({rows}, C); got {tuple(pixels.shape)}")
    if not pixels.is_contiguous():
        raise ValueError(f"pixel buffer must be contiguous; got strides {pixels.stride()}")


def stored_pixels(slot: Tensor, n_high: int, block: int, more_y: int = 0, more_x: int = 0) -> int:
    """`library.stored_pixels` of the grid of `slot`."""
    return library.stored_pixels(n_high, slot.numel() - n_high, block, more_y, more_x)


def new_image(like: Tensor, slot: Tensor, block: int, channels_last: bool) -> Tensor:
    """An uninitialised image (N, C, Gh*block, Gw*block) for a pixel buffer (P, C)."""
    n, gh, gw = slot.shape
    return torch.empty(
        (n, like.shape[1], gh * block, gw * block),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def alignment(*pointers: int) -> int:
    """The largest of 16, 8, 4, 2, 1 that divides every address."""
    together = 16
    for pointer in pointers:
        together |= pointer
    return together & -together


def access_width(itemsize: int, aligned: int, *lengths: int) -> int:
    """Bytes per access: the largest power of two to 16 that divides all lengths (in elements)."""
    width = aligned
    while width > itemsize and any(length * itemsize % width for length in lengths):
        width //= 2
    return max(width, itemsize)


def needs_int64(*offsets: int) -> bool:
    """Whether a largest element offset calls for 64-bit index arithmetic."""
    return max(offsets) > _INT32


def divider(divisor: int) -> tuple[int, int, int]:
    """The struct Divider of common.cuh: n // divisor = (mulhi(n, multiplier) + n) >> shift.

    Granlund and Montgomery, "Division by invariant integers using multiplication" (1994), figure
    4.1, for dividends below 2^31, where the sum cannot overflow.
    """
    divisor = max(divisor, 1)
    shift = (divisor - 1).bit_length()
    multiplier = (2**32 * (2**shift - divisor)) // divisor + 1
    return divisor, multiplier, shift


def chunks(work: int, per_thread_block: int) -> int:
    """Thread blocks for the vectors of one stored block.

    Raises:
        ValueError: a single block so large that positions in it overflow.
    """
    if work + 2**16 > _INT32:
        raise ValueError(f"one block holds {work} elements; at most 2^31 fit, use smaller blocks")
    return -(-work // per_thread_block)


def items_per_thread(work: int, multiprocessors: int) -> int:
    """Accesses per thread: many where the tensor is large, one where it must fill the device."""
    return min(ITEMS, max(1, work // (1024 * multiprocessors)))


def frame(
    lines: int, line: int, margins: tuple[int, int, int, int], vectors: int, threads: int
) -> list[int]:
    """The struct Frame of frame.cuh, for `lines` lines of `line` pixels of `vectors` vectors.

    `margins` are the pixels between the block's edges and the inside: top, bottom, left, right.
    """
    top, bottom, left, right = margins
    rows, inside = lines - top - bottom, (line - left - right) * vectors
    row = line * vectors
    full, sides = (top + bottom) * row, (left + right) * vectors
    size = full + rows * sides
    return [
        *(top, rows, left * vectors, inside, full, size, chunks(size, threads)),
        *divider(row),
        *divider(sides),
        *divider(inside),
    ]


def frame_chunks(frame: list[int], per_thread_block: int) -> int:
    """Thread blocks for a stored block: of its frame, then of its inside."""
    _, rows, _, inside, _, _, of_frame = frame[:7]
    return of_frame + chunks(rows * inside, per_thread_block)


def place(
    grid: tuple[int, int, int],
    n_high: int,
    block: int,
    channels: int,
    vector: int,
    chunks_high: int,
    chunks_low: int,
    items: int = 1,
) -> list[int]:
    """The struct Place of common.cuh."""
    _, gh, gw = grid
    vectors = channels // vector
    return [
        *(n_high, gh, gw, block, channels, vectors, chunks_high, chunks_low, items),
        *divider(gw),
        *divider(gh),
        *divider(vectors),
        *divider(chunks_high),
        *divider(chunks_low),
    ]


def pack(wide: list[int] | list[float], integers: list[int]) -> bytes:
    """Parameters after the pointers: 8-byte values (int64 or double), then 32-bit integers."""
    kind = "d" if wide and isinstance(wide[0], float) else "q"
    integers = integers + [0] * (len(integers) % 2)  # the struct is a multiple of 8 bytes
    words = [i & 0xFFFFFFFF for i in integers]
    return struct.pack(f"<{len(wide)}{kind}{len(words)}I", *wide, *words)
