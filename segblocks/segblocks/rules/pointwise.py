"""Functions of each pixel alone: one call on the pixel buffer serves both resolutions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import rule
from .arguments import blocks_of, from_pixels, require_image, to_pixels
from .normalised import join

ACTIVATIONS = (
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu mish "
    "hardtanh hardtanh_ hardswish hardsigmoid sigmoid sigmoid_ tanh tanh_ softplus softsign "
    "logsigmoid log_sigmoid rrelu rrelu_ threshold _threshold threshold_ hardshrink softshrink "
    "tanhshrink"
)
ARITHMETIC = (
    "add add_ sub sub_ subtract rsub mul mul_ multiply div div_ divide true_divide pow "
    "neg negative abs exp log log1p expm1 sqrt rsqrt square reciprocal sign erf "
    "clamp clamp_ clamp_min clamp_max clip maximum minimum where lerp addcmul addcdiv "
    "floor ceil round isnan isfinite nan_to_num lt le gt ge eq ne logical_not "
    "__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ "
    "__truediv__ __rtruediv__ __itruediv__ __pow__ __rpow__ __ipow__ __neg__ __abs__ "
    "__lt__ __le__ __gt__ __ge__ __eq__ __ne__ __and__ __or__ __iand__ __ior__ __invert__"
)
STORAGE = "float half double bfloat16 clone detach zeros_like ones_like"
RANDOM = "dropout dropout_ alpha_dropout alpha_dropout_ rand_like randn_like"


@rule(*ACTIVATIONS.split(), *ARITHMETIC.split(), *STORAGE.split(), *RANDOM.split())
def pointwise(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """Apply `func` to the buffer. In-place functions write into it, as they do on a tensor.

    Dropout draws for every stored pixel.
    """
    like = blocks_of(args, kwargs)
    if func.__name__ == "where" and len(args) + len(kwargs) == 1:
        raise NotImplementedError(
            "'where' of a condition alone gives places in the picture; wrap it in "
            "segblocks.no_blocks"
        )
    if not torch.compiler.is_compiling():
        joined = join(func.__name__, args, kwargs)
        if joined is not None:
            return joined
        if _writes(func.__name__, kwargs):
            like.grid.later.write()
    args = [to_pixels(arg, like) for arg in args]
    if kwargs:
        kwargs = {key: to_pixels(value, like) for key, value in kwargs.items()}
    return from_pixels(func(*args, **kwargs), like)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into a buffer that it is given."""
    method = name.endswith("_") and not name.endswith("__")
    return method or name.startswith("__i") or bool(kwargs.get("inplace")) or "out" in kwargs


@rule("dropout2d")
def channel_dropout(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """Dropout of whole channels: what an image drops, it drops in both resolutions."""
    x = blocks_of(args, kwargs)
    require_image(x, "dropout2d")
    bound = dict(zip(("input", "p", "training", "inplace"), args), **kwargs)
    if not bound.get("training", True):
        return x
    ones = x.stored.new_ones(x.shape[0], x.shape[1], 1, 1)
    kept = func(ones, bound.get("p", 0.5), True)
    return x.mul_(kept) if bound.get("inplace") else x.mul(kept)


@rule("prelu")
def prelu(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """PReLU, whose weight is one number or one a channel."""
    x = blocks_of(args, kwargs)
    return x.like(func(x.stored, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}))


@rule("to", "type", "type_as")
def convert(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """A change of dtype. The grid stays where it is, so the device cannot change."""
    blocks_of(args)
    x, *rest = (args[0], *(to_pixels(value, args[0]) for value in args[1:]))
    if isinstance(x, Tensor):  # a dense tensor that takes after blocks
        return func(x, *rest, **kwargs)
    pixels = func(x.stored, *rest, **kwargs)
    if pixels.device != x.device:
        raise NotImplementedError(
            f"blocks on {x.device} cannot be moved to {pixels.device}; move image, grid and "
            "network before to_blocks"
        )
    return x.like(pixels)
