"""`build_slots` and `select_budget`: from a grid, or from scores, to where each block is stored."""

import torch
from torch import Tensor

from .library import define, launches_directly


def _fake_build_slots(grid):
    return grid.new_empty(grid.shape, dtype=torch.int32), grid.new_empty(
        (grid.numel(),), dtype=torch.int32
    )


_build_slots = define("build_slots", "(Tensor grid) -> (Tensor, Tensor)", _fake_build_slots)


def build_slots(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Storage place of every block.

    Args:
        grid: (N, Gh, Gw) bool, True = high.

    Returns:
        slot: (N, Gh, Gw) int32, the rank among the high blocks in raster order, or
            -1 - rank among the low blocks.
        cells: (N*Gh*Gw,) int32, the flat cell of each stored block, high blocks first.
    """
    return _build_slots(grid)


def _fake_select_budget(scores, count):
    return scores.new_empty(scores.shape, dtype=torch.bool)


_select_budget = define(
    "select_budget", "(Tensor scores, int count) -> Tensor", _fake_select_budget
)


def select_budget(scores: Tensor, count: int) -> Tensor:
    """The grid in which exactly the `count` blocks of each image with the highest scores are high.

    Ties go to the block that comes first in raster order; NaN counts as the lowest score.

    Args:
        scores: (N, Gh, Gw) float.
        count: high blocks per image, 0 to Gh*Gw.

    Returns:
        (N, Gh, Gw) bool.
    """
    return _select_budget(scores, count)


def choose_slots(
    scores: Tensor, count: int, sampled: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_budget`, then `build_slots` of its result; on CUDA mostly one launch.

    Args:
        scores: (N, Gh, Gw) float, without gradient.
        count: high blocks of each image; of the whole batch with `sampled`.
        sampled: (N, Gh, Gw) bool, blocks that come first whatever their score.

    Returns:
        grid (N, Gh, Gw) bool; slot and cells as from `build_slots`.
    """
    if launches_directly(scores):
        from . import cuda  # needs CuPy, which only CUDA tensors do

        return cuda.choose_slots(scores, count, sampled)
    if sampled is None:
        grid = select_budget(scores, count)
    else:
        ranked = torch.where(sampled, torch.inf, scores).flatten()
        grid = select_budget(ranked[None, None], count).view(scores.shape)
    return grid, *build_slots(grid)
