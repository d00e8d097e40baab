"""How the halo kernel divides its work, and its arithmetic on the CPU (`emulation.py`)."""

import importlib
import shutil

import emulation
import pytest
import torch
from agreement import GRIDS, make_grid

from segblocks import BlockGrid
from segblocks.ops import reference
from segblocks.ops.cuda import geometry as geo

kernels = importlib.import_module("segblocks.ops.cuda.blockpad")  # not the function of that name
ONE = (1, 1, 1, 1, False)


def divide(n_high: int, n_low: int, channels: int, block: int, itemsize: int = 4):
    return kernels._near("blockpad", n_high, n_low, channels * itemsize // 16, block, ONE, 132)


def blocks(d, n_high: int, n_low: int) -> int:
    return n_high * d.high + n_low * d.low


def test_threads_bring_two_where_one_would_need_a_second_round():
    rounds = 6 * 132  # thread blocks at once
    for n_high, n_low, channels, block, itemsize, each in (
        (51, 77, 512, 4, 4, 2),
        (51, 77, 512, 4, 2, 1),  # one round in any case
        (51, 77, 256, 32, 4, 1),  # many rounds in any case
    ):
        d = divide(n_high, n_low, channels, block, itemsize)
        assert d.each == each
        if each == 2:
            assert blocks(d, n_high, n_low) <= rounds


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_a_thread_brings(dtype, kind, processors, each, monkeypatch):
    monkeypatch.setattr(kernels, "prepare", emulation.prepare)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: processors)
    grid = BlockGrid.from_mask(make_grid(kind, (2, 3, 4)))
    counts = grid.n_high, grid.mask.numel() - grid.n_high
    for block, channels, sides in ((4, 272, (1, 1, 1, 1)), (8, 80, (2, 0, 1, 3))):
        pixels = torch.randn(geo.stored_pixels(grid.slot, grid.n_high, block), channels).to(dtype)
        vectors = channels * pixels.element_size() // 16
        asked = ("blockpad", *counts, vectors, block, (*sides, False), processors)
        monkeypatch.setattr(kernels, "_RESIDENT", 0)
        most = blocks(kernels._near(*asked), *counts)
        # One too few for a round of all thread blocks.
        monkeypatch.setattr(kernels, "_RESIDENT", (most - 1) / processors if each == 2 else 0)
        assert kernels._near(*asked).each == each
        kernels._plan.cache_clear()
        where = (grid.slot, grid.cells, grid.n_high, block, *sides, False)
        found = kernels.blockpad(pixels, *where, 0.5)
        assert torch.equal(found, reference.blockpad(pixels, *where, 0.5))
    kernels._plan.cache_clear()
