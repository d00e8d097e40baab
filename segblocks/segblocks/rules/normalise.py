"""Batch normalisation: one joint mean and variance over every stored pixel of both resolutions."""

from collections.abc import Callable
from typing import Any

from ..dispatch import rule
from .arguments import blocks_of, require_image


@rule("batch_norm")
def batch_norm(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """Batch norm over the buffer, so that running and batch statistics see the same pixels."""
    x = blocks_of(args[:1], kwargs)
    require_image(x, "batch_norm")
    # As a 1×C×P×1 channels_last image it takes the fast spatial kernels. The width of one must have
    # the strides of that layout: with others, PyTorch's CPU backward is wrong without a word.
    image = x.pixels[None, :, None].permute(0, 3, 1, 2)
    kwargs = {key: value for key, value in kwargs.items() if key != "input"}
    out = func(image, *args[1:], **kwargs)
    return x.like(out[0, :, :, 0].t())
