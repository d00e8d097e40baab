"""Weights of eager convolutions, packed once and again when they have changed."""

import weakref
from typing import Any

import torch
from torch import Tensor

from . import pending
from .row_conv import pack_weights
from .stem import stem_matrix


class Packed:
    """Weights as the kernel wants them, and the versions of the tensors they were made from.

    Attributes:
        address, shift_address: where they lie.
        stream: on which they were packed.
        plans: what has been worked out for layers with these weights, by setting and grid size.
    """

    __slots__ = (
        "_made",
        "address",
        "matrix",
        "plans",
        "shift",
        "shift_address",
        "stream",
        "versions",
        "weight",
    )

    def __init__(self, weight: weakref.ref, versions: tuple, matrix: Tensor, shift: Tensor):
        self.weight = weight
        self.versions = versions
        self.matrix = matrix
        self.shift = shift
        self.address = matrix.data_ptr()
        self.shift_address = shift.data_ptr()
        self.plans: dict[tuple, Any] = {}
        place = matrix.device
        self.stream = pending.raw_stream(place.index) if matrix.is_cuda else 0
        self._made = torch.cuda.current_stream(place).record_event() if matrix.is_cuda else None

    def wait(self) -> None:
        """Make PyTorch's current stream, which is not that of the packing, wait for it."""
        if self._made is not None and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.matrix.device).wait_event(self._made)

    def matches(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the tensors are as they were."""
        versions = (weight.data_ptr(), weight._version, weight.dtype)
        if bias is not None:
            versions += (bias.data_ptr(), bias._version, bias.dtype)
        return versions == self.versions


# By the id of the weight, which the weak reference says is still the same tensor.
_PACKED: dict[int, Packed] = {}


def packed(weight: Tensor, bias: Tensor | None) -> Packed:
    """`weight` (COUT, CIN, k, k) and `bias` (COUT,) packed, as they are now.

    A convolution of three channels is packed for the stem, 3×3 or 7×7.
    Neither may be an inference tensor, whose changes are not counted. Those packed while a CUDA
    graph is captured serve this call alone: they are there once the graph is replayed.
    """
    versions = (weight.data_ptr(), weight._version, weight.dtype)
    if bias is not None:
        versions += (bias.data_ptr(), bias._version, bias.dtype)
    found = _PACKED.get(id(weight))
    if found is None or found.weight() is not weight or found.versions != versions:
        found = _pack(weight, bias, versions)
        if not (found.stream and torch.cuda.is_current_stream_capturing()):
            _PACKED[id(weight)] = found
    return found


def _pack(weight: Tensor, bias: Tensor | None, versions: tuple) -> Packed:
    cout = weight.shape[0]
    if weight.shape[1] == 3:
        tiles = pack_weights(stem_matrix(weight.detach()))
    else:
        matrix = weight.detach().permute(2, 3, 1, 0).reshape(-1, cout)
        tiles = pack_weights(matrix, weight.shape[2] ** 2)
    shift = torch.zeros(tiles.shape[1], device=weight.device)
    if bias is not None:
        shift[:cout] = bias.detach()
    name = id(weight)

    def forget(reference: weakref.ref) -> None:
        if name in _PACKED and _PACKED[name].weight is reference:
            del _PACKED[name]

    return Packed(weakref.ref(weight, forget), versions, tiles, shift)
