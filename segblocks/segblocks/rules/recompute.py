"""Convolution and max pooling that keep their input, not its padded copy, for the backward pass.

The halo is a copy of the whole map. Autograd would keep it until the backward pass; here it is made
again instead, which is one memory pass a layer. Both resolutions write into one buffer, so nothing
is joined afterwards. Gradients are exact; a second derivative raises.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..grid import BlockGrid
from ..ops.blockpad import blockpad_backward
from .window import Halo, join_blocks, pad_pixels, split_blocks

_NONE = (0, 0)
_CUDNN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Setting(NamedTuple):
    """What a windowed operation is, besides its tensors.

    Attributes:
        block, out_block: side of a high block before and after.
        halo: what the windows read around a block.
        stride, dilation, groups: as in PyTorch.
        kernel: size of the window, for pooling.
    """

    grid: BlockGrid
    block: int
    out_block: int
    halo: Halo | None
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1
    kernel: tuple[int, int] = _NONE

    def padded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """High and low blocks with their halo."""
        padded = pad_pixels(pixels, self.grid, self.block, self.halo)
        return split_blocks(padded, self.grid, self.block, self.halo)

    def outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """High and low blocks of a buffer of outputs."""
        return split_blocks(pixels, self.grid, self.out_block)

    def new_output(self, like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised buffer of outputs."""
        rows = self.grid.stored_pixels(self.out_block)
        return like.new_empty((rows, channels), dtype=dtype)

    def gradient(self, parts: list[Tensor]) -> Tensor:
        """Gradient of the pixel buffer from those of the padded blocks."""
        grad, grid = join_blocks(parts), self.grid
        if self.halo is None:
            return grad
        where = (grid.slot, grid.cells, grid.n_high, self.block)
        return blockpad_backward(grad, *where, *self.halo.sides, self.halo.replicate)


def can_recompute() -> bool:
    """False for tracers and function transforms, which want every step as an operation."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def convolve(pixels: Tensor, weight: Tensor, bias: Tensor | None, setting: Setting) -> Tensor:
    """Convolution of the (P, C) pixels of one grid; casts under autocast as `F.conv2d` does.

    Returns:
        (P', COUT) pixel buffer.
    """
    pixels, weight, bias = _autocast(pixels, weight, bias)
    given = (pixels, weight) if bias is None else (pixels, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return _Convolution.apply(pixels, weight, bias, setting)
    return _convolve(pixels, weight, bias, setting)


def max_pool(pixels: Tensor, setting: Setting) -> Tensor:
    """Max pooling of the (P, C) pixels of one grid: (P', C)."""
    if torch.is_grad_enabled() and pixels.requires_grad:
        return _MaxPool.apply(pixels, setting)
    return _max_pool(pixels, setting)[0]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor | None, setting: Setting
    ) -> Tensor:
        ctx.save_for_backward(pixels, weight)
        ctx.setting = setting
        return _convolve(pixels, weight, bias, setting)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        pixels, weight = ctx.saved_tensors
        setting = ctx.setting
        for_pixels, for_weight, for_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        bias_grad = grad.sum(0) if for_bias else None
        pixel_grads, weight_grad = [], None
        wanted = (for_pixels, for_weight, False)
        window = (setting.stride, _NONE, setting.dilation, False, _NONE, setting.groups)
        if not (for_pixels or for_weight):
            return None, None, bias_grad, None
        for part, out in zip(setting.padded(pixels), setting.outputs(grad)):
            if not part.shape[0]:
                continue
            one, other, _ = torch.ops.aten.convolution_backward(
                out, part, weight, None, *window, wanted
            )
            pixel_grads.append(one)
            if for_weight:
                weight_grad = other if weight_grad is None else weight_grad.add_(other)
        pixel_grad = setting.gradient(pixel_grads) if for_pixels else None
        return pixel_grad, weight_grad, bias_grad, None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, setting: Setting) -> Tensor:
        out, indices = _max_pool(pixels, setting)
        ctx.save_for_backward(indices)
        ctx.setting = setting
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (indices,) = ctx.saved_tensors
        setting = ctx.setting
        # Only the shapes of the padded blocks matter here.
        shapes = _padded_like(grad, setting)
        parts = zip(shapes, setting.outputs(grad.contiguous()), setting.outputs(indices))
        window = (setting.kernel, setting.stride, _NONE, setting.dilation, False)
        grads = [
            torch.ops.aten.max_pool2d_with_indices_backward(out, shape, *window, index)
            for shape, out, index in parts
            if shape.shape[0]
        ]
        return setting.gradient(grads), None


def _convolve(pixels: Tensor, weight: Tensor, bias: Tensor | None, setting: Setting) -> Tensor:
    out = setting.new_output(pixels, weight.shape[0])
    in_place = _takes_cudnn(pixels, setting.groups)
    window = (setting.stride, _NONE, setting.dilation, setting.groups)
    for part, target in zip(setting.padded(pixels), setting.outputs(out)):
        if not part.shape[0]:
            continue
        if in_place:
            _cudnn_into(target, part, weight, setting)
        else:
            target.copy_(F.conv2d(part, weight, bias, *window))
    return out.add_(bias) if in_place and bias is not None else out


def _max_pool(pixels: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    out = setting.new_output(pixels, pixels.shape[1])
    indices = setting.new_output(pixels, pixels.shape[1], torch.int64)
    window = (setting.kernel, setting.stride, _NONE, setting.dilation, False)
    parts = zip(setting.padded(pixels), setting.outputs(out), setting.outputs(indices))
    for part, target, index in parts:
        if part.shape[0]:
            torch.ops.aten.max_pool2d_with_indices.out(part, *window, out=target, indices=index)
    return out, indices


def _cudnn_into(target: Tensor, blocks: Tensor, weight: Tensor, setting: Setting) -> None:
    """cuDNN's convolution, written to `target`; `F.conv2d` would allocate its output."""
    flags = torch.backends.cudnn
    deterministic = flags.deterministic or torch.are_deterministic_algorithms_enabled()
    torch.ops.aten.cudnn_convolution.out(
        blocks,
        weight,
        _NONE,
        setting.stride,
        setting.dilation,
        setting.groups,
        flags.benchmark,
        deterministic,
        _allows_tf32(),
        out=target,
    )


def _allows_tf32() -> bool:
    # Where the setting by operation exists, reading the older one may raise.
    settings = getattr(torch.backends.cudnn, "conv", None)
    if settings is not None:
        return settings.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def _takes_cudnn(pixels: Tensor, groups: int) -> bool:
    """Where PyTorch would take cuDNN for both resolutions; with groups it depends on the shape."""
    return (
        pixels.is_cuda
        and groups == 1
        and pixels.dtype in _CUDNN
        and torch.backends.cudnn.enabled
        and torch.backends.cudnn.is_available()
        and (
            pixels.dtype != torch.bfloat16
            or torch.cuda.get_device_capability(pixels.device) >= (8,)
        )
    )


def _padded_like(grad: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Uninitialised padded blocks."""
    left, right, top, bottom = setting.halo.sides if setting.halo else (0, 0, 0, 0)
    grid, block, half = setting.grid, setting.block, setting.block // 2

    def blocks(n: int, side: int) -> Tensor:
        shape = (n, grad.shape[1], side + top + bottom, side + left + right)
        return torch.empty(
            shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
        )

    return blocks(grid.n_high, block), blocks(grid.n_low, half)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor | None) -> Tensor | None:
        eligible = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return [cast(x) for x in tensors]
