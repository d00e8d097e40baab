"""Batch norm in training: statistics, what follows them in one launch, and the gradients.

A batch norm is kept as its table (4, C): mean and 1 / standard deviation of all pixels, and the
scale and shift that a pixel goes through, in float32 (float64 for float64 pixels). What it makes of
the pixels can be made again from them, bit by bit, so it need not be kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import batch_reference
from .library import define, stored_pixels

_SUMS = "Tensor grad, Tensor pixels, Tensor table"
_PLACE = "Tensor slot, Tensor cells, int n_high, int block"


def _table_dtype(pixels: Tensor) -> torch.dtype:
    return torch.float64 if pixels.dtype == torch.float64 else torch.float32


def _fake_statistics(pixels, weight, bias, running_mean, running_var, momentum, eps):
    return pixels.new_empty((4, pixels.shape[1]), dtype=_table_dtype(pixels))


def _fake_join(tables, rows, weight, bias, running_mean, running_var, momentum, eps):
    return tables.new_empty(tables.shape[1:]), tables.new_empty(())


def _fake_normalise(pixels, table, addend, relu):
    return torch.empty_like(pixels)


def _fake_sums(grad, pixels, table, output, relu):
    return pixels.new_empty((2, pixels.shape[1]), dtype=_table_dtype(pixels))


def _fake_backward(grad, pixels, table, sums, output, relu, masked):
    return torch.empty_like(pixels), torch.empty_like(pixels) if masked else pixels.new_empty(0)


def _fake_blockpad(pixels, table, relu, slot, cells, n_high, block, left, right, top, bottom):
    rows = stored_pixels(n_high, cells.shape[0] - n_high, block, top + bottom, left + right)
    return pixels.new_empty((rows, pixels.shape[1]))


_statistics = define(
    "batch_statistics",
    "(Tensor pixels, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps) -> Tensor",
    _fake_statistics,
    batch_reference,
)
_join = define(
    "batch_join",
    "(Tensor tables, int rows, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps) -> (Tensor, Tensor)",
    _fake_join,
    batch_reference,
)
_normalise = define(
    "batch_normalise",
    "(Tensor pixels, Tensor table, Tensor? addend, bool relu) -> Tensor",
    _fake_normalise,
    batch_reference,
)
_gradient_sums = define(
    "batch_gradient_sums",
    f"({_SUMS}, Tensor? output, bool relu) -> Tensor",
    _fake_sums,
    batch_reference,
)
_normalise_backward = define(
    "batch_normalise_backward",
    f"({_SUMS}, Tensor sums, Tensor? output, bool relu, bool masked) -> (Tensor, Tensor)",
    _fake_backward,
    batch_reference,
)
_blockpad_normalised = define(
    "blockpad_normalised",
    f"(Tensor pixels, Tensor table, bool relu, {_PLACE}, "
    "int left, int right, int top, int bottom) -> Tensor",
    _fake_blockpad,
    batch_reference,
)


def batch_statistics(
    pixels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """The table (4, C) of a batch norm of all pixels; no autograd.

    Args:
        pixels: (P, C) contiguous; P at least 2 with `running_var`. On CUDA float16, bfloat16 or
            float32.
        weight, bias, running_mean, running_var: (C) or None, on CUDA float32. The running
            statistics are moved by `momentum` towards the mean and the unbiased variance.

    Returns:
        Rows mean, invstd, scale = weight * invstd and shift = bias - mean * scale. The same bits
        every time.
    """
    return _statistics(pixels, weight, bias, running_mean, running_var, momentum, eps)


def batch_join(
    tables: Tensor,
    rows: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One table from those of several processes' pixels; no autograd.

    Args:
        tables: (W, 4, C) contiguous, of `batch_statistics` with the same eps and without weight and
            bias; but the last row holds how many rows of pixels each process has.
        rows: those of this process.

    Returns:
        The table (4, C) of the pixels of all processes, and this one's share of them, 0-d; in the
        dtype of the tables. The same bits in every process.
    """
    return _join(tables, rows, weight, bias, running_mean, running_var, momentum, eps)


def batch_normalise(pixels: Tensor, table: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
    """pixels (P, C) * scale + shift, + addend (P, C), then a ReLU: rounded once; no autograd."""
    return _normalise(pixels, table, addend, relu)


def batch_gradients(
    grad: Tensor,
    pixels: Tensor,
    table: Tensor,
    output: Tensor | None,
    relu: bool,
    for_pixels: bool,
    masked: bool,
    of_all: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of `batch_normalise` and of the statistics behind it.

    Args:
        grad: (P, C) contiguous, of what it made; `output`: that itself, where there was an addend
            and a ReLU. Without an addend the ReLU's mask is made again from the pixels.
        for_pixels, masked: whether the gradients of pixels and of an addend are wanted.
        of_all: where others' pixels are in the statistics too, makes of the sums over these pixels
            those over all, times the share of these.

    Returns:
        Gradients of pixels and addend (P, C), and of bias and weight (2, C) in the table's dtype.
    """
    sums = _gradient_sums(grad, pixels, table, output, relu)
    if not for_pixels and not masked:
        return None, None, sums
    behind = sums if of_all is None else of_all(sums)
    inputs, addend = _normalise_backward(grad, pixels, table, behind, output, relu, masked)
    return inputs, addend if masked else None, sums


def blockpad_normalised(
    pixels: Tensor,
    table: Tensor,
    relu: bool,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
) -> Tensor:
    """`blockpad` of what `batch_normalise` makes of the pixels, which is not stored; no autograd.

    Beyond the image a pixel is 0. Pads as `pads_normalised` allows.
    """
    where = (slot, cells, n_high, block)
    return _blockpad_normalised(pixels, table, relu, *where, left, right, top, bottom)


def pads_normalised(sides: tuple[int, int, int, int], block: int) -> bool:
    """Whether `blockpad_normalised` takes these pads: none negative or wider than a low block."""
    return min(sides) >= 0 and max(sides) <= block // 2
