"""Convolutions that add to what is there, with weights laid out for oneDNN once.

PyTorch's compiler calls the same operations; `F.conv2d` would lay the weights out at every call
and write each result to memory of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class AddedConvolution:
    """out += conv(x) + bias, then ReLU if asked for.

    Args:
        weight: (COUT, CIN / groups, k, k), bias: (COUT,) of x's dtype. The input brings its own
            padding.
        shape: (N, CIN, H, W) of a typical input, for which the weights are laid out.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int, shape: tuple[int, ...], groups: int = 1
    ):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = bias.contiguous()
        self.stride, self.groups = stride, groups
        self.packed = None
        if _has_onednn() and weight.dtype == torch.float32:
            sizes = ([0, 0], [stride] * 2, [1, 1], groups)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, *sizes, list(shape)
            )

    def __call__(self, out: Tensor, x: Tensor, relu: bool) -> None:
        """Add to `out` (N, COUT, h, w) the convolution of x (N, CIN, H, W), both channels_last."""
        if not x.shape[0]:
            return
        if self.packed is None:
            out.add_(F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups))
            if relu:
                out.relu_()
            return
        torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, self.packed, self.bias, [0, 0], [self.stride] * 2, [1, 1], self.groups,
            "add", 1.0, "relu" if relu else None, [], None,
        )  # fmt: skip


def _has_onednn() -> bool:
    names = ("_convolution_pointwise_", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )
