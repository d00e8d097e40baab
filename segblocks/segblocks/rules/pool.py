"""Max and average pooling on blocks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import rule
from ..tensor import DualResTensor
from .arguments import fast_eager, pair, require_image
from .recompute import Setting, can_recompute, max_pool
from .window import Window, map_blocks, padded_blocks, plan_windows

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
    if can_recompute():
        window = (stride, dilation, 1, kernel)
        setting = Setting(input.grid, input.block, plan.block, plan.halo, *window)
        return input.like(max_pool(input.stored, setting), plan.block)
    return map_blocks(
        input,
        lambda x: F.max_pool2d(x, kernel, stride, 0, dilation),
        padded_blocks(input, plan.halo),
        plan.block,
    )


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
