"""Convolutions that add to what is there, with weights laid out for oneDNN once.

PyTorch's compiler calls the same operations; `F.conv2d` would lay the weights out at every call
and write each result to memory of its own.
"""

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

_RECENT = 4  # shapes: those of both resolutions in the last two calls of a network


class AddedConvolution:
    """out += conv(x) + bias, then ReLU if asked for.

    Args:
        weight: (COUT, CIN / groups, k, k), bias: (COUT,) of x's dtype. The input brings its own
            padding.
        shape: (N, CIN, H, W) of a typical input, for which the weights are laid out.

    oneDNN wants other layouts for some shapes, and lays weights out again in every call on such. So
    a shape that comes back soon, as with a fixed budget all do, gets a layout of its own.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int, shape: tuple[int, ...], groups: int = 1
    ):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = bias.contiguous()
        self.stride, self.groups = stride, groups
        self._usual: Tensor | None = None
        self._packed: dict[tuple[int, ...], Tensor] = {}
        self._recent: deque[tuple[int, ...]] = deque(maxlen=_RECENT)
        if _has_onednn() and weight.dtype == torch.float32:
            self._usual = self._pack(shape)

    def __call__(self, out: Tensor, x: Tensor, relu: bool) -> None:
        """Add to `out` (N, COUT, h, w) the convolution of x (N, CIN, H, W), both channels_last."""
        if not x.shape[0]:
            return
        if self._usual is None:
            out.add_(F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups))
            if relu:
                out.relu_()
            return
        torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, self._packed_for(tuple(x.shape)), self.bias,
            [0, 0], [self.stride] * 2, [1, 1], self.groups,
            "add", 1.0, "relu" if relu else None, [], None,
        )  # fmt: skip

    def _packed_for(self, shape: tuple[int, ...]) -> Tensor:
        packed = self._packed.get(shape)
        if packed is None and shape in self._recent:
            if len(self._packed) >= _RECENT:
                del self._packed[next(iter(self._packed))]
            packed = self._packed[shape] = self._pack(shape)
        self._recent.append(shape)
        return self._usual if packed is None else packed

    def _pack(self, shape: tuple[int, ...]) -> Tensor:
        sizes = ([0, 0], [self.stride] * 2, [1, 1], self.groups)
        return torch.ops.mkldnn._reorder_convolution_weight(self.weight, *sizes, list(shape))


def _has_onednn() -> bool:
    names = ("_convolution_pointwise_", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )
