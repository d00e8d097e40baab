"""Functions along the channels: cat, chunk, softmax, reductions, layer norm, linear."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..dispatch import rule
from ..tensor import DualResTensor
from .arguments import blocks_of, from_pixels


def _check_channel_dim(x: DualResTensor, dim: Any, name: str) -> None:
    """Raise unless `dim` is the channel dimension of `x`, which is dimension 1 of its buffer."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if isinstance(dim, int) and not -x.dim() <= dim < x.dim():
        raise IndexError(f"'{name}' along dimension {dim} of {x.dim()}")
    if not isinstance(dim, int) or x.layout[dim % x.dim()] != "C":
        raise NotImplementedError(
            f"'{name}' along dimension {dim} crosses blocks; only the channel dimension "
            f"{x.layout.find('C')} of {x.layout} is possible; wrap it in segblocks.no_blocks"
        )


@rule("cat", "concat", "concatenate")
def cat(func: Callable, args: tuple, kwargs: dict[str, Any]):
    def along(tensors, dim=0, *, axis=None):
        like = blocks_of(tuple(tensors))
        _check_channel_dim(like, dim if axis is None else axis, "cat")
        dense = [x for x in tensors if not isinstance(x, DualResTensor)]
        if dense:
            raise ValueError(
                f"cat of blocks with a dense tensor {tuple(dense[0].shape)}: split it first with "
                "to_blocks(x, blocks.grid)"
            )
        return like.like(torch.cat([x.stored for x in tensors], dim=1))

    return along(*args, **kwargs)


@rule("chunk", "split", "tensor_split")
def chunk(func: Callable, args: tuple, kwargs: dict[str, Any]):
    def along(x, sections, dim=0):
        _check_channel_dim(x, dim, func.__name__)
        blocks_of((x,))
        return tuple(x.like(part) for part in func(x.stored, sections, dim=1))

    names = {"chunks": "sections", "split_size": "sections", "split_size_or_sections": "sections"}
    names["indices_or_sections"] = "sections"
    return along(*args, **{names.get(key, key): value for key, value in kwargs.items()})


@rule("softmax", "log_softmax")
def softmax(func: Callable, args: tuple, kwargs: dict[str, Any]):
    x = blocks_of(args, kwargs)
    bound = dict(zip(("input", "dim", "dtype"), args), **kwargs)
    _check_channel_dim(x, bound.get("dim"), func.__name__)
    return x.like(func(x.stored, dim=1, dtype=bound.get("dtype")))


@rule("sum", "mean", "amax", "amin", "argmax", "argmin", "max", "min", "var", "std", "logsumexp")
def reduce_channels(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """A reduction over the channels; over anything else it would need the whole picture."""
    x = blocks_of(args, kwargs)
    if len(args) > 1 and isinstance(args[1], DualResTensor):  # max and min of two tensors
        return from_pixels(func(args[0].stored, args[1].stored), x)
    names = ("input", "dim", "keepdim")
    if func.__name__ in ("var", "std") and len(args) > 2:
        names = ("input", "dim", "unbiased", "keepdim")
    bound = dict(zip(names, args), **kwargs)
    keepdim, dim = bound.pop("keepdim", False), bound.pop("dim", bound.pop("axis", None))
    _check_channel_dim(x, dim, func.__name__)
    bound.pop("input")
    result = func(x.stored, dim=1, keepdim=True, **bound)

    def wrap(pixels):
        return DualResTensor(pixels, x.grid, x.block, x.layout if keepdim else "NHW")

    if isinstance(result, torch.Tensor):
        return wrap(result)
    return type(result)((wrap(result.values), wrap(result.indices)))


@rule("layer_norm", "rms_norm")
def layer_norm(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """Layer norm over the channels, on blocks permuted to N, H, W, C."""
    x = blocks_of(args, kwargs)
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else None)
    if x.layout != "NHWC" or tuple(shape) != (x.shape[-1],):
        raise NotImplementedError(
            f"'{func.__name__}' over {tuple(shape)} of blocks {tuple(x.shape)}: only over the "
            "channels, after permute(0, 2, 3, 1); wrap it in segblocks.no_blocks"
        )
    return from_pixels(func(x.stored, *args[1:], **kwargs), x)


@rule("linear")
def linear(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """A linear layer over the channels, on blocks permuted to N, H, W, C."""
    x = blocks_of(args, kwargs)
    if x.layout != "NHWC":
        raise NotImplementedError(
            "'linear' acts on the last dimension, which is the width; permute(0, 2, 3, 1) first, "
            "use a 1×1 convolution, or wrap it in segblocks.no_blocks"
        )
    return from_pixels(F.linear(x.stored, *args[1:], **kwargs), x)
