"""Batch normalisation: one joint mean and variance over every stored pixel of both resolutions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import rule
from ..ops.library import launches_directly
from ..tensor import DualResTensor
from .arguments import blocks_of, require_image


@rule("batch_norm")
def batch_norm(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    """Batch norm over the buffer, so that running and batch statistics see the same pixels."""
    x = blocks_of(args[:1], kwargs)
    require_image(x, "batch_norm")
    arguments = {**_DEFAULTS, **dict(zip(_NAMES, args)), **kwargs}
    evaluated = not arguments["training"] and _parameters_need_no_gradient(arguments)
    if evaluated and launches_directly(x.pixels):
        from ..ops.cuda.normalise import normalise

        names = ("running_mean", "running_var", "weight", "bias", "eps")
        pixels = normalise(x.pixels, *(arguments[name] for name in names))
        if pixels is not None:
            return x.like(pixels)
    arguments["input"] = as_image(x.pixels)
    return x.like(as_pixels(func(**arguments)))


def as_image(pixels: Tensor) -> Tensor:
    """(P, C) as a channels_last image (1, C, P, 1), which takes the fast spatial kernels."""
    # The width of one must have the strides of that layout: with others, PyTorch's CPU backward is
    # wrong without a word.
    return pixels[None, :, None].permute(0, 3, 1, 2)


def as_pixels(image: Tensor) -> Tensor:
    """Undo of `as_image`; a view whose gradient is one too, which that of indexing is not."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


_NAMES = "input running_mean running_var weight bias training momentum eps".split()
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


def _parameters_need_no_gradient(arguments: dict[str, Any]) -> bool:
    given = (arguments["weight"], arguments["bias"])
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in given)
