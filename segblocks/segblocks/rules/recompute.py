"""Convolution that keeps its input, not its padded copy, for the backward pass.

The halo is a copy of the whole map. Autograd would keep it until the backward pass; here it is made
again instead, which is one memory pass a layer. Where the input is what a batch norm makes, and
nobody else has read that (`normalised.py`), it is made again with it. With cuDNN both resolutions
write into one buffer, forward and backward, so nothing is joined afterwards. Small blocks, of
which a halo is the larger part, are one matrix product instead (`product.py`). A second derivative
raises.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..branches import side_by_side
from ..fast.pending import Pending
from ..once import differentiable_once
from ..ops.cudnn import convolve_into, takes_cudnn
from ..ops.turn_weight import turn_weight
from .normalised import Normalised, Prologue
from .product import multiplies, multiply, multiply_backward
from .setting import Setting
from .window import join_blocks

T = TypeVar("T")
_NONE = (0, 0)


def can_recompute() -> bool:
    """False for tracers and function transforms, which want every step as an operation."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def convolve(
    pixels: Tensor | Pending | Normalised, weight: Tensor, bias: Tensor | None, setting: Setting
) -> Tensor:
    """Convolution of the (P, C) pixels of one grid; casts under autocast as `F.conv2d` does.

    Returns:
        (P', COUT) pixel buffer.
    """
    if type(pixels) is Normalised:
        prologue = _prologue(pixels, setting)
        if prologue is not None:
            _, weight, bias = _autocast(prologue.pixels, weight, bias)
            return _Convolution.apply(prologue.edge, weight, bias, setting, prologue[:3])
    pixels = pixels if isinstance(pixels, Tensor) else pixels.read()
    pixels, weight, bias = _autocast(pixels, weight, bias)
    given = (pixels, weight) if bias is None else (pixels, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return _Convolution.apply(pixels, weight, bias, setting)
    return _convolve(pixels, weight, bias, setting)


def _prologue(pixels: Normalised, setting: Setting) -> Prologue | None:
    dtype = _autocast_dtype(pixels.device.type)
    if not setting.takes_prologue() or dtype not in (None, pixels.dtype):
        return None
    return pixels.prologue()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        setting: Setting,
        before: tuple[Tensor, Tensor, bool] | None = None,
    ) -> Tensor:
        """With `before`, a batch norm's input, table and ReLU, `pixels` are its edge."""
        norm = None
        if before is not None:
            pixels, *norm = before
        ctx.save_for_backward(pixels, weight, *(norm or ())[:1])
        ctx.setting, ctx.relu = setting, norm and norm[1]
        return _convolve(pixels, weight, bias, setting, norm)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        pixels, weight, *table = ctx.saved_tensors
        setting, norm = ctx.setting, (*table, ctx.relu) if table else None
        for_pixels, for_weight, for_bias, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        pixel_grad = weight_grad = None
        if multiplies(grad, setting):
            wanted = (for_pixels, for_weight)
            if any(wanted):
                given = (pixels, weight, grad, setting, wanted, norm)
                pixel_grad, weight_grad = multiply_backward(*given)
        else:
            correlate = setting.stride == (1, 1) and takes_cudnn(grad, setting.groups)
            wanted = (for_pixels and not correlate, for_weight)
            calls = []
            if for_pixels and correlate:
                calls.append(partial(_full_correlation, grad, weight, setting))
            if any(wanted):
                given = (pixels, weight, grad, setting, wanted, norm)
                calls.append(partial(_convolve_backward, *given))
            for one, other in side_by_side(grad.device, *calls):
                pixel_grad = one if pixel_grad is None else pixel_grad
                weight_grad = other if weight_grad is None else weight_grad
        return pixel_grad, weight_grad, grad.sum(0) if for_bias else None, None, None


def _convolve(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    setting: Setting,
    norm: tuple[Tensor, bool] | None = None,
) -> Tensor:
    if multiplies(pixels, setting):
        return multiply(pixels, weight, bias, setting, norm)
    out = setting.new_output(pixels, weight.shape[0])
    in_place = takes_cudnn(pixels, setting.groups)
    if in_place:
        weight = weight.contiguous(memory_format=torch.channels_last)  # once for both resolutions
    window = (setting.stride, _NONE, setting.dilation, setting.groups)

    def convolve_one(part: Tensor, target: Tensor) -> None:
        if in_place:
            convolve_into(target, part, weight, setting.stride, _NONE, setting.dilation)
        else:
            target.copy_(F.conv2d(part, weight, bias, *window))

    _each_resolution(
        convolve_one, setting.blocks(setting.padded(pixels, norm)), setting.outputs(out)
    )
    return out.add_(bias) if in_place and bias is not None else out


def _convolve_backward(
    pixels: Tensor,
    weight: Tensor,
    grad: Tensor,
    setting: Setting,
    wanted: tuple[bool, bool],
    norm: tuple[Tensor, bool] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of pixels and weight, as far as wanted."""
    window = (setting.stride, _NONE, setting.dilation, False, _NONE, setting.groups)

    def differentiate(grad: Tensor, part: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        given = (grad, part, weight, None, *window, (*wanted, False))
        return torch.ops.aten.convolution_backward(*given)

    parts = setting.outputs(grad), setting.blocks(setting.padded(pixels, norm))
    pixel_grads, weight_grads, _ = zip(*_each_resolution(differentiate, *parts))
    return (
        setting.gradient(join_blocks(pixel_grads)) if wanted[0] else None,
        reduce(Tensor.add_, weight_grads) if wanted[1] else None,
    )


def _full_correlation(grad: Tensor, weight: Tensor, setting: Setting) -> tuple[Tensor, None]:
    """Gradient of the pixels where the stride is 1: itself a convolution, with turned weights.

    Unlike cuDNN's own way to this gradient, it can write both resolutions into one buffer.
    """
    turned = turn_weight(weight)
    around = tuple(d * (k - 1) for d, k in zip(setting.dilation, weight.shape[2:]))
    padded = setting.new_padded(grad, weight.shape[1])

    def convolve_one(target: Tensor, part: Tensor) -> None:
        convolve_into(target, part, turned, (1, 1), around, setting.dilation)

    _each_resolution(convolve_one, setting.blocks(padded), setting.outputs(grad))
    return setting.gradient(padded), None


def _each_resolution(call: Callable[[Tensor, Tensor], T], *maps: tuple[Tensor, Tensor]) -> list[T]:
    """What `call` returns for the high blocks of all maps and for the low ones, where there are
    any, side by side."""
    calls = [partial(call, *parts) for parts in zip(*maps) if parts[0].shape[0]]
    return side_by_side(maps[0][0].device, *calls)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    dtype = _autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return list(tensors)

    def cast(x: Tensor | None) -> Tensor | None:
        eligible = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return [cast(x) for x in tensors]


def _autocast_dtype(device: str) -> torch.dtype | None:
    """None where autocast is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
