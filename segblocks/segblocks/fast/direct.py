"""The short way of torch functions to pending launches, past the rules.

For what an eager network repeats at every layer, on block tensors that `eager.py` has made: a
convolution that went the long way before, a batch norm, a ReLU, a sum. Each function returns None
wherever anything is unusual, and the rule decides. Written for few Python steps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import DIRECT
from ..ops.library import launches_directly
from ..tensor import DualResTensor
from . import pending
from .enlarge import enlargement
from .norms import norm_of
from .pending import MAY_FOLLOW, Pending
from .sources import ALIGNED, hold
from .weights import _PACKED as PACKED

_inference = torch.is_inference_mode_enabled


def conv2d(args: tuple, kwargs: dict[str, Any]) -> DualResTensor | None:
    """`F.conv2d` as `nn.Conv2d` calls it, with seven arguments in order."""
    if len(args) != 7:
        return None
    x, weight, bias = args[:3]
    weights = PACKED.get(id(weight))
    if weights is None or type(x) is not DualResTensor:
        return None
    value, grid = x._value, x.grid
    if type(value) is not Pending or weights.weight() is not weight:
        return None
    wanted = weights.plans.get((x.block, grid.n_high, grid.n_blocks, args[3:]))
    if wanted is None or not weights.matches(weight, bias) or not wanted.reads(value):
        return None
    if torch.is_grad_enabled() and _learns(weight, bias):
        return None
    source, later = wanted.locate(value, grid), grid.later
    stream = pending.raw_stream(wanted.index)
    if stream != weights.stream:
        weights.wait()
    cell = Pending(wanted, later, ((source, weights, grid, stream, _inference()), "", None, None))
    later.add(cell, stream)
    return DualResTensor(cell, grid, wanted.block)


def batch_norm(args: tuple, kwargs: dict[str, Any]) -> DualResTensor | None:
    """`F.batch_norm` in evaluation, which hands the input and the statistics on in order."""
    if len(args) != 3 or kwargs.get("training"):
        return None
    x, mean, variance = args
    value = x._value if type(x) is DualResTensor else None
    if type(value) is not Pending or mean is None:
        return None
    weight, bias = kwargs.get("weight"), kwargs.get("bias")
    if torch.is_grad_enabled() and _learns(weight, bias):
        return None
    norm = norm_of(mean, variance, weight, bias, kwargs.get("eps", 1e-5))
    plan, job = value.plan, value.job
    if norm is None or norm.place not in plan.takes:
        return None
    if job is not None and value.steps == "" and job[0][-1] == _inference():
        return DualResTensor(value.after("n", norm, None), x.grid, x.block)
    wanted, later = plan.normalised(), x.grid.later
    if wanted.kernel(norm, False) is None:
        return None
    stream = pending.raw_stream(plan.index)
    call = (hold(value), x.grid, x.block, stream, _inference())
    cell = Pending(wanted, later, (call, "na", norm, None), "na")
    later.add(cell, stream)
    return DualResTensor(cell, x.grid, x.block)


def relu(args: tuple, kwargs: dict[str, Any]) -> DualResTensor | None:
    """`F.relu`, `torch.relu` and the like."""
    x = args[0] if args else None
    value = x._value if type(x) is DualResTensor else None
    if type(value) is not Pending or value.job is None or "r" not in MAY_FOLLOW[value.steps]:
        return None
    call, _, norm, addend = value.job
    if call[-1] != _inference():
        return None
    if kwargs.get("inplace"):
        value.become("r", norm, addend)
        return x
    return DualResTensor(value.after("r", norm, addend), x.grid, x.block)


def relu_(args: tuple, kwargs: dict[str, Any]) -> DualResTensor | None:
    """In place."""
    return relu(args, {"inplace": True})


def add(args: tuple, kwargs: dict[str, Any], in_place: bool = False) -> DualResTensor | None:
    """A sum of two block tensors, of which one is pending."""
    if len(args) != 2 or kwargs:
        return None
    x, y = args
    if type(x) is not DualResTensor or type(y) is not DualResTensor:
        return None
    if x.grid is not y.grid or x.block != y.block or x.layout != y.layout:
        return None
    a, b = x._value, y._value
    if not _takes_addend(a):
        if in_place or not _takes_addend(b):
            return None
        a, b, y = b, a, x
    if a is b or a.plan.stored != tuple(b.shape) or a.plan.dtype is not b.dtype or y.padding:
        return None
    if type(b) is not Pending:
        if not launches_directly(b) or not b.is_contiguous() or b.is_inference():
            return None
        if b.data_ptr() & ALIGNED or b.get_device() != a.plan.index:
            return None
    other = hold(b)  # which may compute a
    job = a.job
    if job is None:
        return None
    if in_place:
        a.become("a", job[2], other)
        return x
    return DualResTensor(a.after("a", job[2], other), x.grid, x.block)


def add_(args: tuple, kwargs: dict[str, Any]) -> DualResTensor | None:
    """In place."""
    return add(args, kwargs, True)


def interpolate(args: tuple, kwargs: dict[str, Any]) -> DualResTensor | None:
    """`F.interpolate`, bilinear by a whole factor, of pixels that are there or pending."""
    x = args[0]
    value = x._value if type(x) is DualResTensor else None
    if len(args) != 1 or kwargs.get("mode") != "bilinear" or x.grid.legacy_upsample or x.padding:
        return None
    if kwargs.get("align_corners") or kwargs.get("antialias") or x.layout != "NCHW":
        return None
    grid, size, factor = x.grid, kwargs.get("size"), kwargs.get("scale_factor")
    if type(value) is not Pending:
        if not launches_directly(value) or not value.is_contiguous():
            return None
        if value.data_ptr() & ALIGNED:
            return None
    size = size if size is None else tuple(size) if isinstance(size, (tuple, list)) else size
    wanted = enlargement(
        *(x.block, grid.shape, grid.n_high, size, factor),
        *(value.shape[1], value.dtype, value.get_device(), value.device),
    )
    if wanted is None:
        return None
    if type(value) is Pending:
        value.locate(False)
        address = value.address
    else:
        address = value.data_ptr()
    return DualResTensor(wanted.run(address, grid), grid, wanted.block)


def _learns(weight: Tensor | None, bias: Tensor | None) -> bool:
    learns = weight is not None and weight.requires_grad
    return learns or (bias is not None and bias.requires_grad)


def _takes_addend(value: Any) -> bool:
    """Another stream than the launch's may have made the addend, so it has to be the same."""
    if type(value) is not Pending or value.job is None or "a" not in MAY_FOLLOW[value.steps]:
        return False
    call = value.job[0]
    return call[-2] == pending.raw_stream(value.plan.index) and call[-1] == _inference()


DIRECT.update({torch.conv2d: conv2d, F.batch_norm: batch_norm, F.interpolate: interpolate})
DIRECT.update(dict.fromkeys((F.relu, torch.relu, Tensor.relu), relu))
DIRECT.update(dict.fromkeys((F.relu_, torch.relu_, Tensor.relu_), relu_))
DIRECT.update(dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), add))
DIRECT.update(dict.fromkeys((Tensor.add_, Tensor.__iadd__), add_))
