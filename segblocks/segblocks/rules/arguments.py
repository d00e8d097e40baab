"""Turns the arguments of a torch function into tensors over the pixel buffer, and results back."""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..tensor import DualResTensor


def blocks_of(args: tuple, kwargs: dict | None = None) -> DualResTensor:
    """The first block tensor among the arguments, after checking that all lie on one grid."""
    first = None
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, DualResTensor):
            x.refuse_padding()
            if first is None:
                first = x
            else:
                _require_same_place(first, x)
    return first


def _require_same_place(first: DualResTensor, other: DualResTensor) -> None:
    if other.grid is not first.grid:
        raise ValueError(
            "block tensors of different grids cannot be combined; split both with one "
            "BlockGrid: to_blocks(x, blocks.grid)"
        )
    if other.block != first.block or other.layout != first.layout:
        raise ValueError(
            f"block tensors of different shape: {tuple(first.shape)} {first.layout} and "
            f"{tuple(other.shape)} {other.layout}; resize or permute one to match"
        )


def to_pixels(value: Any, like: DualResTensor) -> Any:
    """`value` so that it broadcasts against a (P, C) buffer."""
    if isinstance(value, DualResTensor):
        return value.stored
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return _operand_to_pixels(value, like)


def _operand_to_pixels(value: Tensor, like: DualResTensor) -> Tensor:
    """A dense operand that is constant over space: per channel, per image, or both."""
    layout = like.layout[-value.dim() :] if value.dim() <= len(like.layout) else ""
    sizes = dict(zip(layout, value.shape))
    constant = bool(layout) and sizes.get("H", 1) == 1 and sizes.get("W", 1) == 1
    if not constant or sizes.get("N", 1) not in (1, like.grid.shape[0]):
        raise ValueError(
            f"a dense tensor {tuple(value.shape)} cannot meet blocks of shape "
            f"{tuple(like.shape)}: only scalars, per-channel and per-image values can; split it "
            "first with to_blocks(x, blocks.grid)"
        )
    rows = value.reshape(sizes.get("N", 1), sizes.get("C", 1))
    if rows.shape[0] == 1:
        return rows
    return rows[like.grid.image_of_pixel(like.block)]


def from_pixels(result: Any, like: DualResTensor) -> Any:
    """Wrap tensors over the pixel buffer again; tuples and lists element by element."""
    if isinstance(result, Tensor):
        return like.like(result)
    if isinstance(result, (tuple, list)):
        return type(result)(from_pixels(item, like) for item in result)
    return result


def require_image(x: DualResTensor, name: str) -> None:
    """Windowed operations need the layout N, C, H, W."""
    if x.layout != "NCHW":
        raise NotImplementedError(
            f"'{name}' needs blocks in the layout NCHW; these are {x.layout}: permute them back"
        )


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of an argument that may be one number."""
    if type(value) is tuple and len(value) == 2:
        return value
    if isinstance(value, (tuple, list, torch.Size)):
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
    return value, value


@functools.cache
def fast_eager() -> ModuleType:
    """Kernels for single operations; only CUDA tensors need what they need."""
    return importlib.import_module("segblocks.fast.eager")
