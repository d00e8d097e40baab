"""Launchers of `grid.cu`: one launch each, nothing is read back."""

import functools

import torch
from torch import Tensor

from . import geometry as geo
from .module import Kernel, defines, prepare

_MOST_THREADS = 1024
_MOST_RANKED = 4096  # cells up to which comparing every pair of scores is the quickest
_MOST_CELLS = 4096  # of choose.cuh
_MOST_PAIRS = 2**18  # that one thread block compares sooner than two launches start


def build_slots(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Grid (N, Gh, Gw) bool or uint8 → slot (N, Gh, Gw) int32 and cells (N*Gh*Gw,) int32.

    Raises:
        TypeError: another dtype.
        ValueError: 2^31 blocks or more.
    """
    if grid.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"grid must be bool or uint8; got {grid.dtype}")
    grid = grid.contiguous()
    slot = torch.empty(grid.shape, dtype=torch.int32, device=grid.device)
    cells = torch.empty(grid.numel(), dtype=torch.int32, device=grid.device)
    if grid.numel():
        kernel = _slots_plan(grid.get_device(), grid.numel())
        kernel.launch(grid.device, grid.data_ptr(), slot.data_ptr(), cells.data_ptr())
    return slot, cells


def select_budget(scores: Tensor, count: int) -> Tensor:
    """Scores (N, ...) float → bool of that shape, True at the `count` highest of each image.

    Ties go to the earlier cell, NaN counts as lowest.

    Raises:
        TypeError: scores that are not floating point.
        ValueError: a count that no image has.
    """
    if scores.dtype not in geo.DTYPES:
        raise TypeError(f"scores must be floating point; got {scores.dtype}")
    images = scores.shape[0]
    cells = scores[0].numel() if images else 0
    if not 0 <= count <= cells:
        raise ValueError(f"count must be 0 to {cells} blocks per image; got {count}")
    scores = scores.contiguous()
    grid = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if grid.numel():
        kernel = _budget_plan(scores.get_device(), scores.dtype, images, cells, count)
        kernel.launch(scores.device, scores.data_ptr(), grid.data_ptr())
    return grid


def choose_slots(
    scores: Tensor, count: int, sampled: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_budget` and `build_slots` of its result; small grids in one launch.

    Args:
        scores: (N, Gh, Gw) float.
        count: high blocks of each image; of the whole batch with `sampled`.
        sampled: (N, Gh, Gw) bool, blocks that come first whatever their score, in raster order.

    Returns:
        grid (N, Gh, Gw) bool; slot and cells as from `build_slots`.

    Raises:
        TypeError, ValueError: see `select_budget`.
    """
    images, total = scores.shape[0] if sampled is None else 1, scores.numel()
    if not fits_one_launch(images, total):
        ranked = scores
        if sampled is not None:
            ranked = torch.where(sampled, torch.inf, scores).flatten()[None]
        grid = select_budget(ranked, count).view(scores.shape)
        return grid, *build_slots(grid)
    if scores.dtype not in geo.DTYPES:
        raise TypeError(f"scores must be floating point; got {scores.dtype}")
    if not 0 <= count <= total // images:
        raise ValueError(f"count must be 0 to {total // images} blocks per image; got {count}")
    scores = scores.contiguous()
    sampled = None if sampled is None else sampled.contiguous()
    first = 0 if sampled is None else sampled.data_ptr()
    grid = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    slot = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    cells = torch.empty(total, dtype=torch.int32, device=scores.device)
    kernel = _choose_plan(scores.get_device(), scores.dtype, images, total, count)
    made = (x.data_ptr() for x in (grid, slot, cells))
    kernel.launch(scores.device, scores.data_ptr(), first, *made)
    return grid, slot, cells


def fits_one_launch(images: int, total: int) -> bool:
    """Whether one thread block chooses among `total` cells of `images` images."""
    return 0 < total <= _MOST_CELLS and total * total // images <= _MOST_PAIRS


def _threads(work: int) -> int:
    return min(_MOST_THREADS, -(-work // 32) * 32)


def _options(dtype: torch.dtype) -> tuple[str, ...]:
    return defines(dtype=geo.DTYPES[dtype], vector=1, index64=True)


@functools.lru_cache(maxsize=256)
def _slots_plan(device: int, total: int) -> Kernel:
    if total >= 2**31:
        raise ValueError(f"a grid of {total} blocks is too large; the limit is 2^31")
    threads = _threads(total)
    packed = geo.pack([], [total])
    options = _options(torch.float32)
    return prepare("grid.cu", "build_slots", options, device, 1, threads, packed, pointers=3)


@functools.lru_cache(maxsize=256)
def _choose_plan(device: int, dtype: torch.dtype, images: int, total: int, count: int) -> Kernel:
    packed = geo.pack([], [total, total // images, count])
    return prepare(
        "grid.cu", "choose_slots", _options(dtype), device, 1, _MOST_THREADS, packed, pointers=5
    )


@functools.lru_cache(maxsize=256)
def _budget_plan(device: int, dtype: torch.dtype, images: int, cells: int, count: int) -> Kernel:
    packed = geo.pack([], [cells, count])
    kernel, blocks, threads, rows = "select_budget", -(-cells * 32 // 256), 256, images
    if cells > _MOST_RANKED or images >= 2**16:
        kernel, blocks, threads, rows = "select_budget_large", images, _MOST_THREADS, 1
    options = _options(dtype)
    return prepare(
        "grid.cu", kernel, options, device, blocks, threads, packed, pointers=2, rows=rows
    )
