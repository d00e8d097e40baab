"""Convolutions on blocks: the halo replaces the zero padding (BlockPad, paper section 3.3)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import rule
from ..tensor import DualResTensor
from .arguments import fast_eager, pair, require_image
from .normalise import as_image, as_pixels
from .recompute import can_recompute, convolve
from .setting import Setting
from .window import Halo, map_blocks, padded_blocks, plan_windows, split_blocks


@rule("conv2d")
def conv2d(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    return _conv2d(*args, **kwargs)


def _conv2d(
    input: DualResTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple = 1,
    padding: int | tuple | str = 0,
    dilation: int | tuple = 1,
    groups: int = 1,
) -> DualResTensor:
    require_image(input, "conv2d")
    kernel, stride, dilation = tuple(weight.shape[2:]), pair(stride), pair(dilation)
    if not isinstance(padding, str):
        padding = pair(padding)
    plan = plan_windows(input, "conv2d", kernel, stride, padding, dilation)
    if input.is_cuda and _is_plain(input, kernel, stride, padding, dilation, groups):
        setting = (stride, padding, dilation, groups)
        fused = fast_eager().conv2d(input, weight, bias, stride[0], setting)
        if fused is not None:
            return fused
    if kernel == (1, 1) and stride == (1, 1) and groups == 1 and not input.padding:
        return input.like(_pixelwise(input.stored, weight, bias))
    if can_recompute():
        setting = Setting(input.grid, input.block, plan.block, plan.halo, stride, dilation, groups)
        return DualResTensor(convolve(input._value, weight, bias, setting), input.grid, plan.block)
    return map_blocks(
        input,
        lambda x: F.conv2d(x, weight, bias, stride, 0, dilation, groups),
        padded_blocks(input, plan.halo),
        plan.block,
    )


def _pixelwise(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution of a (P, CIN) buffer."""
    if pixels.is_cuda and pixels.dtype == torch.float32 and not torch.is_autocast_enabled("cuda"):
        # A convolution like any other of the network: in TF32 where those are.
        return as_pixels(F.conv2d(as_image(pixels), weight, bias))
    return F.linear(pixels, weight.flatten(1), bias)


def _is_plain(
    x: DualResTensor, kernel: tuple, stride: tuple, padding: Any, dilation: tuple, groups: int
) -> bool:
    """Small, centred, stride 1 or 2: what one launch can do for both resolutions."""
    if kernel not in ((1, 1), (3, 3), (7, 7)) or stride not in ((1, 1), (2, 2)) or x.padding:
        return False
    return padding == (kernel[0] // 2,) * 2 and dilation == (1, 1) and groups == 1


@rule("conv_transpose2d")
def conv_transpose2d(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    return _conv_transpose2d(*args, **kwargs)


def _conv_transpose2d(
    input: DualResTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple = 1,
    padding: int | tuple = 0,
    output_padding: int | tuple = 0,
    groups: int = 1,
    dilation: int | tuple = 1,
) -> DualResTensor:
    """Exact where the output is `stride` times the input, so that it lines up with the blocks."""
    require_image(input, "conv_transpose2d")
    input.refuse_padding()
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    reach = tuple(d * (k - 1) for d, k in zip(dilation, weight.shape[2:]))
    extra = pair(output_padding)
    lines_up = all(r + o + 1 == s + 2 * p for r, o, s, p in zip(reach, extra, stride, padding))
    if not lines_up or stride[0] != stride[1]:
        raise NotImplementedError(
            f"'conv_transpose2d' with kernel {tuple(weight.shape[2:])}, stride {stride}, padding "
            f"{padding}, output_padding {extra}: only outputs of exactly stride times the input, "
            "the same in both directions; wrap it in segblocks.no_blocks"
        )
    before = tuple(max(0, (r - p) // s) for r, p, s in zip(reach, padding, stride))
    after = tuple((s - 1 + p) // s for p, s in zip(padding, stride))
    blocks = split_blocks(input.stored, input.grid, input.block)
    if any(before) or any(after):
        sides = (before[1], after[1], before[0], after[0])
        blocks = padded_blocks(input, Halo(sides))
    skip = tuple(b * s + p for b, s, p in zip(before, stride, padding))
    # Crop what the halo produced; pad behind where the last outputs have no input of their own.
    lack = tuple(max(0, s - 1 + p - a * s - r) for s, p, a, r in zip(stride, padding, after, reach))

    def transpose(x: Tensor) -> Tensor:
        height = (x.shape[2] - before[0] - after[0]) * stride[0]
        width = (x.shape[3] - before[1] - after[1]) * stride[1]
        out = F.conv_transpose2d(x, weight, bias, stride, 0, lack, groups, dilation)
        return out[:, :, skip[0] : skip[0] + height, skip[1] : skip[1] + width]

    return map_blocks(input, transpose, blocks, input.block * stride[0])
