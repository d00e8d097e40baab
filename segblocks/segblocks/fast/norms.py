"""Batch norms that have been put off: their tensors, and launches of their own."""

import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.cuda.launch import Kernel
from ..ops.cuda.normalise import normalise
from ..ops.cuda.normalise import plan as plan_normalise
from .buffers import new_rows
from .grid_tables import table
from .pending import Pending
from .sources import ALIGNED

_new = tuple.__new__  # in place of a NamedTuple's own, which is a Python function
Place = tuple[int, int, torch.dtype]


def places(channels: int, index: int, dtype: torch.dtype) -> frozenset[Place]:
    """Of a batch norm that a kernel can apply to pixels of `dtype`."""
    return frozenset(((channels, index, dtype), (channels, index, torch.float32)))


class Norm(NamedTuple):
    """A batch norm in evaluation.

    Attributes:
        tensors: mean, variance, weight, bias; the last two may be None.
        place: channels, index of the device, dtype: one of those that a plan `takes`.
        addresses: theirs, 0 for none; versions: the sum of theirs, which any change makes larger.
    """

    tensors: tuple
    eps: float
    place: Place
    addresses: tuple[int, int, int, int]
    versions: int

    def apply(self, pixels: Tensor, relu: bool) -> Tensor:
        """In a launch of its own."""
        self.check()
        return normalise(pixels, *self.tensors, self.eps, relu)

    def check(self) -> None:
        """Raise RuntimeError if its tensors are not what they were when it was called."""
        mean, variance, weight, bias = self.tensors
        if weight is None or bias is None:
            now = norm_of(*self.tensors, self.eps)
            same = now is not None and now[3:] == self[3:]
        else:
            versions = mean._version + variance._version + weight._version + bias._version
            at = (mean.data_ptr(), variance.data_ptr(), weight.data_ptr(), bias.data_ptr())
            same = versions == self.versions and at == self.addresses
        if not same:
            raise RuntimeError(
                "the parameters or statistics of a batch norm on blocks were changed before its "
                "result was read; combine the blocks, or read their pixels, before the change"
            )


# By the id of the mean: references to the four tensors of a batch norm, and the rest of its `Norm`
# when they were last examined.
_KNOWN: dict[int, tuple[tuple[weakref.ref, ...], Place, tuple, int]] = {}


def norm_of(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Norm | None:
    """A batch norm that a kernel can read; None where its tensors do not suit.

    They have one dtype and device, lie element by element, and count their changes.
    """
    found = _KNOWN.get(id(mean))
    if found is not None and weight is not None and bias is not None:
        (first, second, third, fourth), place, at, versions = found
        if (
            first() is mean
            and second() is variance
            and third() is weight
            and fourth() is bias
            and versions == mean._version + variance._version + weight._version + bias._version
            and at == (mean.data_ptr(), variance.data_ptr(), weight.data_ptr(), bias.data_ptr())
        ):
            return _new(Norm, ((mean, variance, weight, bias), eps, place, at, versions))
    norm = _examine(mean, variance, weight, bias, eps)
    if norm is not None and weight is not None and bias is not None:
        _remember(norm)
    return norm


def _remember(norm: Norm) -> None:
    name = id(norm.tensors[0])

    def forget(reference: weakref.ref) -> None:
        if name in _KNOWN and _KNOWN[name][0][0] is reference:
            del _KNOWN[name]

    mean, *others = norm.tensors
    references = (weakref.ref(mean, forget), *map(weakref.ref, others))
    _KNOWN[name] = (references, *norm[2:])


def _examine(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Norm | None:
    index, shape = mean.get_device(), mean.shape
    for tensor in (variance, weight, bias):
        if tensor is not None and (tensor.get_device() != index or tensor.shape != shape):
            return None
    kind, at = mean.dtype, mean.data_ptr()
    to = variance.data_ptr()
    if variance.dtype is not kind or not (mean.is_contiguous() and variance.is_contiguous()):
        return None
    scale = shift = 0
    try:
        versions = mean._version + variance._version
        if weight is not None:
            if weight.dtype is not kind or not weight.is_contiguous():
                return None
            scale = weight.data_ptr()
            versions += weight._version
        if bias is not None:
            if bias.dtype is not kind or not bias.is_contiguous():
                return None
            shift = bias.data_ptr()
            versions += bias._version
    except RuntimeError:  # inference tensors do not count their changes
        return None
    if (at | to | scale | shift) & ALIGNED:
        return None
    tensors = (mean, variance, weight, bias)
    place = (shape[0], index, kind)
    return _new(Norm, (tensors, eps, place, (at, to, scale, shift), versions))


class NormPlan:
    """A batch norm, and perhaps a ReLU, of (P, C) pixels in one precision on one device."""

    name = "batch_norm"

    def __init__(
        self, stored: tuple[int, int], dtype: torch.dtype, index: int, device: torch.device
    ):
        self.stored = stored
        self.dtype = dtype
        self.index = index
        self.device = device
        self.takes = places(stored[1], index, dtype)
        self._kernels: dict[tuple, Kernel | None] = {}

    def normalised(self) -> "NormPlan":
        """A batch norm of what this one makes."""
        return self

    def kernel(self, norm: Norm, relu: bool, high: tuple[int, int] | None = None) -> Kernel | None:
        """The launch; None where there is no kernel for it. `high`: as for `normalise.plan`."""
        key = (norm.place[2], norm.eps, relu, high)
        found = self._kernels.get(key)
        if found is None:
            kind, *rest = key
            found = plan_normalise(self.dtype, kind, self.index, *self.stored, *rest)
            self._kernels[key] = found
        return found

    def run(self, cell: Pending, job: tuple, extend: bool) -> None:
        """See `Pending`."""
        (source, grid, block, stream, _), steps, norm, _ = job
        source.check()
        norm.check()
        (rows, channels), relu = self.stored, steps[-1:] == "r"
        if extend:
            high = grid.n_high * block**2
            out = new_rows((rows + high // 4 + 1, channels), self.dtype, self.index, self.device)
            address = out.data_ptr()
            kernel = self.kernel(norm, relu, (high, block))
            own = table(grid, (block, 1, True), stream)
            kernel.enqueue(self.index, source.address, *norm.addresses, address, own)
            cell.averages = address + rows * channels * self.dtype.itemsize
            cell.written = cell.later.writes
        else:
            out = new_rows(self.stored, self.dtype, self.index, self.device)
            address = out.data_ptr()
            kernel = self.kernel(norm, relu)
            kernel.enqueue(self.index, source.address, *norm.addresses, address)
        cell.address = address
        cell.buffer = out


norm_plan = functools.lru_cache(maxsize=4096)(NormPlan)
