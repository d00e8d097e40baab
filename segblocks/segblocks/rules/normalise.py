"""Batch normalisation: one joint mean and variance over every stored pixel of both resolutions."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import rule
from ..ops.library import launches_directly
from ..tensor import DualResTensor
from .arguments import fast_eager, require_image
from .normalised import put_off


@rule("batch_norm")
def batch_norm(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    return _batch_norm(*args, **kwargs)


def _batch_norm(
    input: DualResTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> DualResTensor:
    """Batch norm over the buffer, so that running and batch statistics see the same pixels."""
    input.refuse_padding()
    require_image(input, "batch_norm")
    evaluated = not training and running_mean is not None and not _learn(weight, bias)
    if evaluated and input.is_cuda:
        given = (running_mean, running_var, weight, bias, eps)
        later = fast_eager().batch_norm(input, *given)
        if later is not None:
            return later
    if training:
        later = put_off(input, running_mean, running_var, weight, bias, momentum, eps)
        if later is not None:
            return later
    pixels = input.stored
    if evaluated and launches_directly(pixels):
        out = _kernel()(pixels, *given)
        if out is not None:
            return input.like(out)
    rest = (running_mean, running_var, weight, bias, training, momentum, eps)
    return input.like(as_pixels(F.batch_norm(as_image(pixels), *rest)))


def as_image(pixels: Tensor) -> Tensor:
    """(P, C) as a channels_last image (1, C, P, 1), which takes the fast spatial kernels."""
    # The width of one must have the strides of that layout: with others, PyTorch's CPU backward is
    # wrong without a word.
    return pixels[None, :, None].permute(0, 3, 1, 2)


def as_pixels(image: Tensor) -> Tensor:
    """Undo of `as_image`: the same memory, but for autograd a tensor of its own, not a view.

    An activation that works in place on a view, as most do after a batch norm, would have autograd
    copy the gradient of the whole map five times. `image` must not be written to any more.
    """
    rows = image.permute(0, 2, 3, 1).contiguous()
    return torch.ops.aten._unsafe_view(rows, (image.shape[2], image.shape[1]))


def _learn(weight: Tensor | None, bias: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (weight, bias))


@functools.cache
def _kernel() -> Callable:
    return importlib.import_module("segblocks.ops.cuda.normalise").normalise
