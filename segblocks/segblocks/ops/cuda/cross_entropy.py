"""Launchers of `cross_entropy.cu`, `cross_entropy_tiles.cu` and `cross_entropy_backward.cu`."""

import functools

import torch
from torch import Tensor

from . import geometry as geo
from .module import Kernel, defines, prepare

_TILED = (2, 4, 8)  # scales with kernels of their own
_TILES = {2: (15, 15), 4: (15, 15), 8: (7, 15)}  # OWN_Y, OWN_X of cross_entropy_tiles.cu
_Shape = tuple[int, ...]


def pixel_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logits (N, C, h, w), target (N, H, W) int64 → losses and log-sum-exp of the enlarged logits,
    (N, H, W) float32 (float64 for float64 logits), both 0 at ignored pixels.

    Raises:
        TypeError: a dtype without a kernel, labels that are not int64.
        ValueError: shapes or devices that do not fit.
    """
    dtype = _check(logits, target)
    losses, log_sums = (
        torch.empty(target.shape, dtype=dtype, device=target.device) for _ in range(2)
    )
    if target.numel():
        kernel = _plan(
            *("pixel_cross_entropy", logits.get_device(), logits.dtype),
            *(tuple(logits.shape), tuple(target.shape), ignore_index),
            *(logits.stride(), target.stride()),
        )
        kernel.launch(
            *(logits.device, logits.data_ptr(), target.data_ptr()),
            *(losses.data_ptr(), log_sums.data_ptr()),
        )
    return losses, log_sums


def pixel_cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, log_sums: Tensor, ignore_index: int
) -> Tensor:
    """Gradient of the losses (N, H, W), in their dtype → that of the logits, in their dtype and
    layout.

    Raises:
        TypeError, ValueError: as `pixel_cross_entropy`.
    """
    dtype = _check(logits, target)
    for name, given in (("gradient", grad), ("log-sum-exp", log_sums)):
        if given.dtype != dtype or given.shape != target.shape or given.device != logits.device:
            raise ValueError(
                f"the {name} must be {dtype}, {tuple(target.shape)} and on {logits.device}; got "
                f"{given.dtype}, {tuple(given.shape)} on {given.device}"
            )
    if not target.numel():
        return torch.zeros_like(logits)
    out = torch.empty_like(logits)
    log_sums = log_sums.contiguous()
    scale = _scale(logits.shape, target.shape)
    name = "pixel_cross_entropy_" + ("tiles" if scale in _TILED else "backward")
    kernel = _plan(
        *(name, logits.get_device(), logits.dtype),
        *(tuple(logits.shape), tuple(target.shape), ignore_index),
        *(grad.stride(), logits.stride(), target.stride(), out.stride()),
    )
    kernel.launch(
        *(logits.device, grad.data_ptr(), logits.data_ptr(), target.data_ptr()),
        *(log_sums.data_ptr(), out.data_ptr()),
    )
    return out


def _check(logits: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of the losses, unless the arguments raise."""
    if logits.dtype not in geo.DTYPES:
        raise TypeError(
            f"no CUDA kernel for {logits.dtype}; use float16, bfloat16, float32 or float64"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"labels are {target.dtype}; give class ids as torch.int64")
    if logits.dim() != 4 or target.dim() != 3 or logits.shape[0] != target.shape[0]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(target.shape)} do not fit; give "
            "(N, C, h, w) logits and (N, H, W) labels"
        )
    if target.numel() and not logits.numel():
        raise ValueError(f"logits {tuple(logits.shape)} are empty; the labels are not")
    if logits.device != target.device:
        raise ValueError(
            f"tensors on different devices: {logits.device}, {target.device}; move them to one"
        )
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scale(small: _Shape, large: _Shape) -> int:
    """SB_SCALE of cross_entropy.cuh."""
    (h, w), (height, width) = small[2:], large[1:]
    scale = height // h
    whole = scale in (1, *_TILED) and (height, width) == (h * scale, w * scale)
    return scale if whole else 0


@functools.lru_cache(maxsize=1024)
def _plan(
    name: str,
    device: int,
    dtype: torch.dtype,
    small: _Shape,
    large: _Shape,
    ignore_index: int,
    *strides: _Shape,
) -> Kernel:
    """Strides in the order of the kernel's parameters; only logits have four."""
    (n, classes, h, w), (height, width) = small, large[1:]
    scale, threads, more = _scale(small, large), 256, []
    if name == "pixel_cross_entropy":
        file, pointers = "cross_entropy.cu", 4
        work = (h + 1 if scale > 1 else height) * width
        blocks = -(-work // threads)
    elif name == "pixel_cross_entropy_backward":
        file, pointers = "cross_entropy_backward.cu", 5
        work = classes * h * w
        blocks = -(-work // threads)
    else:
        file, pointers, threads, work = "cross_entropy_tiles.cu", 5, 512, 0
        own_y, own_x = _TILES[scale]
        more = [-(-w // own_x)]
        blocks = -(-h // own_y) * more[0]
    reach = [
        sum((size - 1) * stride for size, stride in zip(small if len(each) == 4 else large, each))
        for each in strides
    ]
    images = [each for each in strides if len(each) == 4]
    constants = defines(
        dtype=geo.DTYPES[dtype],
        vector=1,
        index64=geo.needs_int64(*reach, n * height * width, work + threads),
        scale=scale,
        last=images[-1][1] == 1,
    )
    wide = [step for each in strides for step in each] + [ignore_index]
    packed = geo.pack(wide, [classes, h, w, height, width, blocks, *more])
    return prepare(file, name, constants, device, n * blocks, threads, packed, pointers)
