"""Resizing on blocks: interpolate, pixel_shuffle and pixel_unshuffle."""

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import rule
from ..ops import upsample
from ..tensor import DualResTensor
from .arguments import blocks_of, pair, require_image
from .window import Halo, map_blocks, padded_blocks, split_blocks


@rule("interpolate", "upsample")
def interpolate(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    return _interpolate(*args, **kwargs)


def _interpolate(
    input: DualResTensor,
    size: int | tuple | None = None,
    scale_factor: float | tuple | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> DualResTensor:
    """Resize the picture of each block's own resolution, neighbours across block borders included.

    With `legacy_upsample` on the grid, each block is resized alone, clamped at its own edge.
    """
    require_image(blocks_of((input,)), "interpolate")
    if mode not in ("nearest", "nearest-exact", "bilinear") or align_corners or antialias:
        raise NotImplementedError(
            f"'interpolate' with mode={mode!r}, align_corners={align_corners}, "
            f"antialias={antialias}: on blocks only 'nearest', 'nearest-exact' and 'bilinear' with "
            "align_corners=False and without antialias; wrap it in segblocks.no_blocks"
        )
    scale = _scale(input, size, scale_factor)
    block = input.block * scale
    if scale == 1:
        return input.like(input.stored.clone())
    if mode != "bilinear" or input.grid.legacy_upsample:
        if mode == "bilinear" and scale.denominator == 1:
            return _upsample(input, scale.numerator)
        side = block.numerator
        return map_blocks(
            input,
            lambda x: F.interpolate(x, size=_shrunk(x, input.block, side), mode=mode),
            split_blocks(input.stored, input.grid, input.block),
            side,
        )
    if scale.denominator == 1:
        return _upsample(input, scale.numerator)
    # The smallest halo whose resized width is a whole number of pixels, to be cropped again.
    halo = scale.denominator
    edge = scale.numerator

    def resize(x: Tensor) -> Tensor:
        sides = [length * edge // halo for length in x.shape[2:]]
        out = F.interpolate(x, size=sides, mode=mode, align_corners=False)
        return out[:, :, edge:-edge, edge:-edge]

    blocks = padded_blocks(input, Halo((halo,) * 4, replicate=True))
    return map_blocks(input, resize, blocks, block.numerator)


def _upsample(x: DualResTensor, scale: int) -> DualResTensor:
    grid = x.grid
    pixels = upsample(
        x.stored.contiguous(),
        grid.slot,
        grid.cells,
        grid.n_high,
        x.block,
        scale,
        grid.legacy_upsample,
    )
    return x.like(pixels, x.block * scale)


def _shrunk(x: Tensor, block: int, side: int) -> tuple[int, int]:
    """Size of a resized block: `side` for a high one, half of it for a low one."""
    out = side if x.shape[2] == block else side // 2
    return out, out


def _scale(x: DualResTensor, size: Any, scale_factor: Any) -> Fraction:
    # Dynamo warns of caches that it passes by; sizes that it does not know are not hashable.
    find = _find_scale.__wrapped__ if torch.compiler.is_compiling() else _find_scale
    _, gh, gw = x.grid.shape
    return find_scale(x.block, gh, gw, size, scale_factor, find)


def find_scale(
    block: int, gh: int, gw: int, size: Any, scale_factor: Any, find: Callable | None = None
) -> Fraction:
    """The one factor for both directions that keeps every block at a whole, even size."""
    size = None if size is None else tuple(map(int, pair(size)))
    return (find or _find_scale)(block, gh, gw, size, None if size else pair(scale_factor))


@functools.lru_cache(maxsize=1024)
def _find_scale(
    block: int, gh: int, gw: int, size: tuple[int, int] | None, factors: tuple[float, float] | None
) -> Fraction:
    if size is not None:
        scales = Fraction(size[0], gh * block), Fraction(size[1], gw * block)
    else:
        scales = tuple(_exactly(s) for s in factors)
    new = block * scales[0]
    if scales[0] != scales[1] or new.denominator != 1 or new % 2 or new < 2:
        raise NotImplementedError(
            f"'interpolate' by {float(scales[0]):g} × {float(scales[1]):g} turns blocks of "
            f"{block} pixels into {float(new):g}: the factor must be the same in both "
            "directions and leave an even block; wrap it in segblocks.no_blocks"
        )
    return scales[0]


def _exactly(factor: float) -> Fraction:
    """The fraction that a factor stands for: the one that rounds to it."""
    found = Fraction(factor).limit_denominator(1024)
    return found if float(found) == float(factor) else Fraction(factor)


@rule("pixel_shuffle")
def pixel_shuffle(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    return _reshape_channels(func, args, kwargs, "upscale_factor")


@rule("pixel_unshuffle")
def pixel_unshuffle(func: Callable, args: tuple, kwargs: dict[str, Any]) -> DualResTensor:
    return _reshape_channels(func, args, kwargs, "downscale_factor")


def _reshape_channels(func: Callable, args: tuple, kwargs: dict, key: str) -> DualResTensor:
    x = blocks_of(args, kwargs)
    require_image(x, func.__name__)
    factor = kwargs[key] if key in kwargs else args[1]
    scale = Fraction(factor) if key == "upscale_factor" else Fraction(1, factor)
    block = x.block * scale
    if block.denominator != 1 or block % 2:
        raise ValueError(
            f"'{func.__name__}' by {factor} on blocks of {x.block} pixels: a low block of "
            f"{x.block // 2} cannot be divided; choose a larger block_size"
        )
    blocks = split_blocks(x.stored, x.grid, x.block)
    return map_blocks(x, lambda part: func(part, factor), blocks, block.numerator)
