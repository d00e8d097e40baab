"""Convolution, batch norm and max pooling of blocks outside a compiled model.

By the fast path's kernels, and put off until their result is read (`pending.py`): a convolution and
what follows it are one launch. For inference in half precision. `direct.py` is the short way in,
for what has been here before.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..dispatch import current_recorder
from ..grid import BlockGrid
from ..ops.library import launches_directly
from ..tensor import DualResTensor
from . import direct, pending  # noqa: F401 - direct fills the table of short ways
from .first import CHANNELS, stem_plan
from .launches import plan, pool
from .norms import Norm, norm_of, norm_plan, places
from .pending import MAY_FOLLOW, Pending
from .sources import ALIGNED, hold
from .weights import packed

_HALVES = (torch.float16, torch.bfloat16)
_MOST_PLANS = 32  # of one layer, each for another grid size


def conv2d(
    x: DualResTensor, weight: Tensor, bias: Tensor | None, stride: int, setting: tuple = ()
) -> DualResTensor | None:
    """A 3×3 (padding 1) or 1×1 convolution of stride 1 or 2; None where this way is not open.

    Of an image of three channels, one of 3×3 or 7×7 with stride 2.

    Args:
        setting: under which `direct` will find the plan.
    """
    value, grid = x._value, x.grid
    index = value.get_device()
    if not _applies(value, weight, bias, index):
        return None
    cout, cin, kernel, _ = weight.shape
    size, place = (x.block, grid.n_high, grid.n_blocks), (value.dtype, index, value.device)
    if cin == CHANNELS:
        # What a plan keeps is not made while a graph is captured, whose memory it would be.
        if type(value) is not Pending or stride != 2 or torch.cuda.is_current_stream_capturing():
            return None
        wanted = stem_plan(*size, kernel, cout, *place)
        if not wanted.reads(value):
            return None
    elif kernel > 3:
        return None
    else:
        wanted = plan(*size, stride, kernel, (cin, cout), *place)
    weights = packed(weight, bias)
    if weights.stream != pending.raw_stream(index):
        weights.wait()
    if setting:
        if len(weights.plans) >= _MOST_PLANS:
            weights.plans.clear()
        weights.plans[(*size, setting)] = wanted
    source = wanted.locate(value, grid)
    cell = put_off(wanted, grid, (source, weights, grid), "", None, value)
    return DualResTensor(cell, grid, wanted.block)


def batch_norm(
    x: DualResTensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> DualResTensor | None:
    """Batch norm in evaluation, without gradient; None where it cannot be put off."""
    value = x._value
    norm = norm_of(mean, variance, weight, bias, eps) if _is_plain(value) else None
    allowed = places(value.shape[1], value.get_device(), value.dtype)
    if norm is None or norm.place not in allowed:
        return None
    job = value.job if type(value) is Pending else None
    fits = job is not None and "n" in MAY_FOLLOW[value.steps]
    if fits and job[0][-1] == torch.is_inference_mode_enabled():
        return x.like(value.after("n", norm, None))
    wanted = norm_plan(tuple(value.shape), value.dtype, value.get_device(), value.device)
    if not _in_order(value) or wanted.kernel(norm, False) is None:
        return None
    # Behind it only a ReLU fits into the launch.
    return x.like(put_off(wanted, x.grid, (hold(value), x.grid, x.block), "na", norm, value))


def max_pool2d(x: DualResTensor) -> DualResTensor | None:
    """3×3 max pooling of stride 2 and padding 1; None where this way is not open."""
    value, grid = x._value, x.grid
    channels, index = value.shape[1], value.get_device()
    if value.dtype not in _HALVES or not _is_plain(value) or not _in_order(value):
        return None
    if channels % 8 or _generation(index) < 8:
        return None
    size = (x.block, grid.n_high, grid.n_blocks)
    wanted = plan(*size, 2, 3, (channels, channels), value.dtype, index, value.device)
    cell = Pending(wanted, grid.later, None, stream=pending.raw_stream(index))
    cell.buffer = pool(value, grid, wanted)
    cell.address = cell.buffer.data_ptr()
    cell.averages = cell.address + wanted.tail
    cell.written = grid.later.writes
    return DualResTensor(cell, grid, wanted.block)


def put_off(
    wanted: Any, grid: BlockGrid, call: tuple, steps: str, norm: Norm | None, value: Any
) -> Pending:
    """A launch that reads `value`, now or later."""
    stream = pending.raw_stream(wanted.index)
    call = (*call, stream, torch.is_inference_mode_enabled())
    cell = Pending(wanted, grid.later, (call, steps, norm, None), steps)
    # A recorder tells values apart by their memory; an inference tensor does not count changes.
    unseen = type(value) is not Pending and value.is_inference()
    if unseen or current_recorder() is not None:
        cell.compute()
    else:
        grid.later.add(cell, stream)
    return cell


def _applies(value: Tensor | Pending, weight: Tensor, bias: Tensor | None, index: int) -> bool:
    dtype, (cout, cin, *_) = value.dtype, weight.shape
    if dtype not in _HALVES or weight.dtype is not dtype or cout % 64:
        return False
    if cin % 64 and (cin != CHANNELS or weight.shape[2] == 1):
        return False
    if not _is_plain(value) or not _in_order(value) or _generation(index) != 9:
        return False
    if weight.is_inference() or (bias is not None and bias.is_inference()):
        return False  # inference tensors do not count their changes
    if weight.get_device() != index or value.shape[1] != cin:
        return False
    if not torch.is_grad_enabled():
        return True
    return not weight.requires_grad and (bias is None or not bias.requires_grad)


def _is_plain(value: Tensor | Pending) -> bool:
    """Pixels on CUDA that no gradient, tracer or dispatch mode is interested in."""
    if type(value) is not Pending:
        return launches_directly(value)
    return not torch._C._len_torch_dispatch_stack() and not torch.compiler.is_compiling()


def _in_order(value: Tensor | Pending) -> bool:
    """Whether the pixels lie one after another, each on 16 bytes."""
    if type(value) is Pending:
        return True
    return value.is_contiguous() and not value.data_ptr() & ALIGNED


@functools.cache
def _generation(device: int) -> int:
    """8 for Ampere and Ada, 9 for Hopper, ..."""
    return torch.cuda.get_device_capability(device)[0]
