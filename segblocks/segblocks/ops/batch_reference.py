"""Batch norm in training in plain PyTorch: what the kernels of `batch_norm.py` must equal.

As in `reference.py`, each function has the name and signature of the registered operation.
"""

import torch
from torch import Tensor

from .reference import _accumulate, blockpad


def batch_statistics(
    pixels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    moments = torch.var_mean(_accumulate(pixels), 0, correction=0)
    settings = (running_mean, running_var, momentum, eps)
    return _make_table(*moments, pixels.shape[0], weight, bias, *settings)


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
    means, invstds, _, counts = tables.double().unbind(1)  # W,C each
    total = counts.sum(0)
    shares = counts / total
    mean = (shares * means).sum(0)
    variances = invstds**-2 - eps + (means - mean) ** 2
    variance = (shares * variances).sum(0).clamp(min=0)
    settings = (running_mean, running_var, momentum, eps)
    table = _make_table(variance, mean, total, weight, bias, *settings)
    return table.to(tables.dtype), (rows / total[0]).to(tables.dtype)


def _make_table(
    variance: Tensor,
    mean: Tensor,
    rows: int | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """What `batch_statistics` makes of the moments (C) of so many rows."""
    invstd = (variance + eps).rsqrt()
    scale = invstd if weight is None else weight * invstd
    shift = -mean * scale if bias is None else bias - mean * scale
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((variance * (rows / (rows - 1))).to(running_var.dtype), momentum)
    return torch.stack((mean, invstd, scale, shift))


def batch_normalise(pixels: Tensor, table: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
    out = _accumulate(pixels) * table[2] + table[3]
    if addend is not None:
        out = out + addend
    return (out.relu() if relu else out).to(pixels.dtype)


def batch_gradient_sums(
    grad: Tensor, pixels: Tensor, table: Tensor, output: Tensor | None, relu: bool
) -> Tensor:
    grad = _accumulate(_masked(grad, pixels, table, output, relu))
    return torch.stack((grad.sum(0), (grad * _standardised(pixels, table)).sum(0)))


def batch_normalise_backward(
    grad: Tensor,
    pixels: Tensor,
    table: Tensor,
    sums: Tensor,
    output: Tensor | None,
    relu: bool,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    behind = _masked(grad, pixels, table, output, relu)
    lower, slope = sums / pixels.shape[0]
    out = table[2] * (_accumulate(behind) - lower - _standardised(pixels, table) * slope)
    return out.to(pixels.dtype), behind.clone() if masked else pixels.new_empty(0)


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
    stored = batch_normalise(pixels, table, None, relu)
    return blockpad(stored, slot, cells, n_high, block, left, right, top, bottom, False, 0.0)


def _masked(
    grad: Tensor, pixels: Tensor, table: Tensor, output: Tensor | None, relu: bool
) -> Tensor:
    """The gradient of what goes into the ReLU."""
    if not relu:
        return grad
    if output is None:
        output = batch_normalise(pixels, table, None, False)
    return grad.masked_fill(output <= 0, 0)


def _standardised(pixels: Tensor, table: Tensor) -> Tensor:
    return (_accumulate(pixels) - table[0]) * table[1]
