"""What a launch that has been put off reads: pixels, and the tensors of a batch norm."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.cuda.normalise import normalise
from .pending import Pending

_new = tuple.__new__  # in place of a NamedTuple's own, which is a Python function
ALIGNED = 15  # bits of an address that must be zero: kernels read 16 bytes at once


class Source(NamedTuple):
    """Pixels that a launch reads.

    Attributes:
        address, averages: where they and what follows them lie; averages 0 where nobody reads any.
        holders: what keeps them there, first the pixels.
        watched: a buffer that somebody else may have kept; version: its version by now.
    """

    address: int
    averages: int
    holders: tuple
    watched: Tensor | None = None
    version: int = 0

    def check(self) -> None:
        """Raise RuntimeError if the pixels were changed where nobody saw it."""
        if self.watched is not None and self.watched._version != self.version:
            raise RuntimeError(
                "pixels of blocks were changed in place before an operation that had read them was "
                "computed; take them from the block tensor (x.pixels) instead of keeping them"
            )


def hold(value: Tensor | Pending) -> Source:
    """Pixels alone, computed by now."""
    if type(value) is Pending:
        value.locate(False)
        return _new(Source, (value.address, 0, (value.buffer,), None, 0))
    if value.is_inference():
        return Source(value.data_ptr(), 0, (value,))
    return Source(value.data_ptr(), 0, (value,), value, value._version)


class Norm(NamedTuple):
    """A batch norm in evaluation.

    Attributes:
        tensors: mean, variance, weight, bias; the last two may be None.
        kind: their dtype.
        addresses: theirs, 0 for none; versions: the sum of theirs, which any change makes larger.
    """

    tensors: tuple
    eps: float
    kind: torch.dtype
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


def norm_of(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Norm | None:
    """A batch norm whose tensors lie element by element and count their changes; None if not."""
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
    return _new(Norm, (tensors, eps, kind, (at, to, scale, shift), versions))
