"""Max and average pooling on blocks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import rule
from ..grid import BlockGrid
from ..once import differentiable_once
from ..ops.pool import TAPS, max_pool, max_pool_backward
from ..tensor import DualResTensor
from .arguments import fast_eager, pair, require_image
from .recompute import can_recompute
from .window import Halo, Window, map_blocks, padded_blocks, plan_windows

_NO_HALO = Halo((0, 0, 0, 0))
_HALVING = ((3, 3), (2, 2), (1, 1), (1, 1), None)  # what one kernel does for both resolutions


@rule("max_pool2d")
def max_pool2d(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    return _max_pool2d(*args, **kwargs)


def _max_pool2d(
    input: DualResTensor,
    kernel_size: int | tuple,
    stride: int | tuple | None = None,
    padding: int | tuple = 0,
    dilation: int | tuple = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> DualResTensor:
    """Beyond the image lies -inf, as in PyTorch, whatever the sign of the features."""
    require_image(input, "max_pool2d")
    if return_indices:
        raise NotImplementedError(
            "'max_pool2d' with return_indices: positions mean nothing across blocks; wrap it in "
            "segblocks.no_blocks"
        )
    kernel, dilation = pair(kernel_size), pair(dilation)
    stride = pair(stride) if stride else kernel
    plan = plan_windows(
        input, "max_pool2d", kernel, stride, pair(padding), dilation, -torch.inf, ceil_mode
    )
    windows = (kernel, stride, pair(padding), dilation, input.padding)
    if input.is_cuda and windows == _HALVING:
        pooled = fast_eager().max_pool2d(input)
        if pooled is not None:
            return pooled
    if can_recompute() and kernel[0] * kernel[1] <= TAPS:
        setting = _MaxPooling(
            input.grid, input.block, plan.halo or _NO_HALO, kernel, stride, dilation
        )
        pixels = input.stored.contiguous()
        if torch.is_grad_enabled() and pixels.requires_grad:
            return input.like(_MaxPool.apply(pixels, setting), plan.block)
        return input.like(setting.forward(pixels)[0], plan.block)
    return map_blocks(
        input,
        lambda x: F.max_pool2d(x, kernel, stride, 0, dilation),
        padded_blocks(input, plan.halo),
        plan.block,
    )


class _MaxPooling(NamedTuple):
    """What max pooling is, besides its tensors; the stride is that of `plan_windows`: a square."""

    grid: BlockGrid
    block: int
    halo: Halo
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(P, C) → the (P', C) pooled pixels and which tap each came from."""
        return max_pool(pixels, *self._where, *self.halo, *self._window)

    def backward(self, grad: Tensor, taps: Tensor) -> Tensor:
        """(P', C) → (P, C)."""
        return max_pool_backward(grad, taps, *self._where, *self.halo[:2], *self._window)

    @property
    def _where(self) -> tuple[Tensor, Tensor, int, int]:
        return self.grid.slot, self.grid.cells, self.grid.n_high, self.block

    @property
    def _window(self) -> tuple[tuple[int, int], int, tuple[int, int]]:
        return self.kernel, self.stride[0], self.dilation


class _MaxPool(torch.autograd.Function):
    """Keeps one byte an output for the backward pass; a second derivative raises."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, setting: _MaxPooling) -> Tensor:
        out, taps = setting.forward(pixels)
        ctx.save_for_backward(taps)
        ctx.setting = setting
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (taps,) = ctx.saved_tensors
        return ctx.setting.backward(grad.contiguous(), taps), None


@rule("avg_pool2d")
def avg_pool2d(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    return _avg_pool2d(*args, **kwargs)


def _avg_pool2d(
    input: DualResTensor,
    kernel_size: int | tuple,
    stride: int | tuple | None = None,
    padding: int | tuple = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> DualResTensor:
    require_image(input, "avg_pool2d")
    kernel = pair(kernel_size)
    stride = pair(stride) if stride else kernel
    settings = (kernel, stride, pair(padding), (1, 1))
    plan = plan_windows(input, "avg_pool2d", *settings, ceil_mode=ceil_mode)
    if divisor_override:
        divisor = divisor_override
    else:
        extra = (0, 0) if not input.padding else (input.padding.top, input.padding.left)
        divisor = 1
        count = _window_counts(input, plan.windows, pair(padding), extra, count_include_pad)
    pooled = map_blocks(
        input,
        lambda x: F.avg_pool2d(x, kernel, stride, divisor_override=divisor),
        padded_blocks(input, plan.halo),
        plan.block,
    )
    if divisor_override:
        return pooled
    return pooled.like(pooled.stored / count.to(pooled.dtype))


def _window_counts(
    x: DualResTensor,
    windows: tuple[Window, Window],
    padding: tuple[int, int],
    extra: tuple[int, int],
    count_include_pad: bool,
) -> Tensor:
    """(P', 1): by how many pixels each output of the pooling is divided, as PyTorch counts."""
    _, gh, gw = x.grid.shape
    cells = x.grid.cells.long()
    counts = []
    for blocks, side in (
        (cells[: x.grid.n_high], x.block),
        (cells[x.grid.n_high :], x.block // 2),
    ):
        axis = []
        for window, n, own, pad in zip(windows, (gh, gw), padding, extra):
            # F.pad made its pixels part of the image; only the pooling's own padding is not.
            first, last = -pad, n * side + (window.after - own)
            start = torch.arange(n * side // window.stride, device=cells.device) * window.stride
            start = start - window.before
            stop = (start + window.kernel).clamp(max=last + own)
            if not count_include_pad:
                start, stop = start.clamp(min=first), stop.clamp(max=last)
            axis.append((stop - start).view(n, side // window.stride))
        rows, columns = axis[0][blocks // gw % gh], axis[1][blocks % gw]  # n,s each
        counts.append((rows[:, :, None] * columns[:, None, :]).flatten())
    return torch.cat(counts)[:, None]
