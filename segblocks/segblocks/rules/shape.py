"""Changes of layout: permute between NCHW and NHWC, channel slices, `F.pad` before a window."""

from collections.abc import Callable
from typing import Any

from ..dispatch import rule
from ..tensor import DualResTensor, Padding
from .arguments import blocks_of, require_image

_PERMUTATIONS = {("NCHW", (0, 2, 3, 1)): "NHWC", ("NHWC", (0, 3, 1, 2)): "NCHW"}


@rule("permute")
def permute(func: Callable, args: tuple, kwargs: dict[str, Any]):
    x = blocks_of(args, kwargs)
    order = kwargs.get("dims", args[1:])
    order = tuple(order[0]) if order and not isinstance(order[0], int) else tuple(order)
    layout = _PERMUTATIONS.get((x.layout, tuple(i % x.dim() for i in order)))
    if layout is None:
        raise NotImplementedError(
            f"permute{order} of {x.layout} blocks: only (0, 2, 3, 1) from NCHW and (0, 3, 1, 2) "
            "back; wrap the rest in segblocks.no_blocks"
        )
    return DualResTensor(x.stored, x.grid, x.block, layout)


@rule("__getitem__")
def channel_slice(func: Callable, args: tuple, kwargs: dict[str, Any]):
    x, index = blocks_of(args), args[1]
    plain = isinstance(index, tuple) and all(isinstance(i, slice) for i in index)
    if not plain or x.layout != "NCHW" or any(i != slice(None) for i in (index[0], *index[2:])):
        raise NotImplementedError(
            f"indexing blocks with {index}: only channel slices x[:, a:b] are possible; wrap the "
            "rest in segblocks.no_blocks"
        )
    return x.like(x.stored[:, index[1]])


@rule("pad")
def pad(func: Callable, args: tuple, kwargs: dict[str, Any]):
    """Note the padding; the next convolution or pooling takes it up as part of its halo."""

    def note(input, pad, mode="constant", value=None):
        require_image(blocks_of((input,)), "pad")
        if mode not in ("constant", "replicate") or len(pad) not in (2, 4):
            raise NotImplementedError(
                f"F.pad(mode={mode!r}, pad={tuple(pad)}) on blocks: only 'constant' and "
                "'replicate' over width and height; wrap it in segblocks.no_blocks"
            )
        sides = (*pad, 0, 0) if len(pad) == 2 else tuple(pad)
        if not any(sides):
            return input
        padding = Padding(*sides, mode == "replicate", float(value or 0.0))
        return DualResTensor(input.stored, input.grid, input.block, padding=padding)

    return note(*args, **kwargs)
