"""The pooling kernels equal PyTorch's own pooling: values, which of equals wins, NaN, gradients.

On a GPU the kernels themselves; anywhere, their arithmetic on the CPU, thread by thread.
"""

import shutil

import emulation
import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid

from segblocks import BlockGrid
from segblocks.ops import cuda, reference
from segblocks.ops.cuda import pool_blocks
from segblocks.rules.window import Window

BLOCK = 16
WINDOWS = {  # kernel, stride, padding (top, left), dilation
    "3 stride 2": ((3, 3), 2, (1, 1), (1, 1)),
    "2 stride 2": ((2, 2), 2, (0, 0), (1, 1)),
    "3 stride 1": ((3, 3), 1, (1, 1), (1, 1)),
    "5 stride 1": ((5, 5), 1, (2, 2), (1, 1)),
    "5 stride 2 dilation 2": ((5, 5), 2, (4, 4), (2, 2)),
    "3 dilation (2, 3)": ((3, 3), 1, (2, 3), (2, 3)),
    "(1, 4) stride 4, rows skipped": ((1, 4), 4, (0, 0), (1, 1)),
    "16, wider than a low block": ((16, 16), 1, (7, 8), (1, 1)),
    "2 stride 2, shifted": ((2, 2), 2, (-1, -1), (1, 1)),
}
PADDINGS = [(False, -torch.inf), (False, 0.25), (True, 0.0)]
CHANNELS = [64, 3, 8, 19]


def surroundings(name):
    """Pads (left, right, top, bottom), kernel, stride and dilation of a window."""
    kernel, stride, before, dilation = WINDOWS[name]
    axes = [Window(k, stride, b, 0, d) for k, b, d in zip(kernel, before, dilation)]
    sides = (before[1], axes[1].halo_after, before[0], axes[0].halo_after)
    return sides, (list(kernel), stride, list(dilation))


def make_pixels(grid, channels, dtype, kind, device):
    shape = (grid.stored_pixels(BLOCK), channels)
    pixels = torch.randn(shape, dtype=torch.float64)
    if kind == "ties":
        pixels = pixels.round().clamp(-1, 1)
    if kind == "nan":
        pixels[torch.rand(shape) < 0.1] = torch.nan
        pixels[torch.rand(shape) < 0.1] = -torch.inf
    return pixels.to(dtype).to(device)


def check_pooling(name, mask, channels, dtype, kind, padding, device):
    grid = BlockGrid.from_mask(mask.to(device))
    where = (grid.slot, grid.cells, grid.n_high, BLOCK)
    sides, window = surroundings(name)
    replicate, fill = padding
    pixels = make_pixels(grid, channels, dtype, kind, device)
    out, taps = cuda.max_pool(pixels, *where, *sides, replicate, fill, *window)
    # On the CPU: of equal values, PyTorch on CUDA takes another than the first in some windows.
    on_cpu = (pixels.cpu(), grid.slot.cpu(), grid.cells.cpu(), *where[2:])
    expected, their_taps = (
        t.to(device) for t in reference.max_pool(*on_cpu, *sides, replicate, fill, *window)
    )
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0), expected.nan_to_num(0))
    assert taps.dtype == torch.uint8
    assert torch.equal(taps, their_taps)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype).to(device)
    found = cuda.max_pool_backward(grad, taps, *where, *sides, replicate, *window)
    wanted = reference.max_pool_backward(grad.double(), taps, *where, *sides, replicate, *window)
    assert found.dtype == dtype
    unit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    assert (found.double() - wanted).abs().max() <= unit * max(1.0, float(wanted.abs().max()))
    again = cuda.max_pool_backward(grad, taps, *where, *sides, replicate, *window)
    assert torch.equal(found, again)


@pytest.fixture
def _emulated(monkeypatch):
    pool_blocks._plan.cache_clear()
    monkeypatch.setattr(pool_blocks, "prepare", emulation.prepare)
    yield
    pool_blocks._plan.cache_clear()


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("name", WINDOWS)
def test_the_arithmetic_of_the_kernels(name):
    types = [torch.float32, torch.float64, torch.bfloat16]
    for i, kind in enumerate(("ties", "nan", "plain")):
        for j, shape in enumerate(GRIDS):
            mask = make_grid(shape, (2, 2, 3))
            channels = 3 if (i + j) % 2 else 8
            check_pooling(name, mask, channels, types[i], kind, PADDINGS[j % 3], "cpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", WINDOWS)
def test_the_kernels(name, dtype, grid):
    kinds = ("plain", "ties", "nan")
    for i, channels in enumerate(CHANNELS):
        for j, padding in enumerate(PADDINGS):
            mask = make_grid(grid, (2, 2, 3))
            check_pooling(name, mask, channels, dtype, kinds[(i + j) % 3], padding, "cuda")


@pytest.mark.parametrize("kind", ["plain", "ties", "nan"])
@pytest.mark.parametrize("name", ["3 stride 2", "2 stride 2", "3 stride 1", "5 stride 1"])
def test_one_resolution_is_pooling_of_an_image(kind, name):
    """Values, and gradients bit by bit, as PyTorch's of the image that the blocks make up."""
    mask = make_grid("all", (2, 2, 3))
    grid = BlockGrid.from_mask(mask)
    where = (grid.slot, grid.cells, grid.n_high, BLOCK)
    sides, window = surroundings(name)
    kernel, stride, padding, dilation = WINDOWS[name]
    pixels = make_pixels(grid, 3, torch.float64, kind, "cpu")
    out, taps = reference.max_pool(pixels, *where, *sides, False, -torch.inf, *window)
    dense = reference.combine(pixels, *where, False).requires_grad_()
    pooled = F.max_pool2d(dense, kernel, stride, padding, dilation)
    smaller = (*where[:3], BLOCK // stride)
    found = reference.combine(out, *smaller, False)
    assert torch.equal(found.nan_to_num(7), pooled.nan_to_num(7))
    grad = torch.randn_like(out)
    pooled.backward(reference.combine(grad, *smaller, False))
    mine = reference.max_pool_backward(grad, taps, *where, *sides, False, *window)
    assert torch.allclose(reference.combine(mine, *where, False), dense.grad, atol=1e-12)


def test_what_does_not_fit_is_refused():
    grid = BlockGrid.from_mask(make_grid("mixed", (1, 2, 2)))
    where = (grid.slot, grid.cells, grid.n_high, BLOCK)
    pixels = torch.zeros(grid.stored_pixels(BLOCK), 4)
    rest = (0, 0, 0, 0, False, 0.0, [2, 2])
    with pytest.raises(ValueError, match="stride 3 does not divide"):
        cuda.max_pool(pixels, *where, *rest, 3, [1, 1])
    with pytest.raises(ValueError, match="pixel buffer"):
        cuda.max_pool(pixels[1:], *where, *rest, 2, [1, 1])
    small = torch.zeros(grid.stored_pixels(BLOCK // 2), 4)
    with pytest.raises(ValueError, match="taps must be uint8"):
        cuda.max_pool_backward(small, small, *where, 0, 0, 0, 0, False, [2, 2], 2, [1, 1])
