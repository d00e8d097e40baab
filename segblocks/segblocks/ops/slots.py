"""`build_slots` and `select_budget`: from a grid, or from scores, to where each block is stored."""

import torch
from torch import Tensor

from .library import define


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
