"""The depthwise kernel, emulated on the CPU too, against the rule for convolutions."""

import math
import shutil

import emulation
import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid
from fast_models import DEVICES

from segblocks import BlockGrid, DualResTensor
from segblocks.fast import depthwise
from segblocks.fast.depthwise import convolve_depthwise, pack_depthwise

# Kernel, stride, side of a high block of the input, channels.
CASES = [
    (3, 1, 8, 24),
    (3, 1, 2, 8),  # low blocks of one pixel, which a window looks beyond on both sides
    (3, 2, 4, 40),
    (5, 1, 4, 16),
    (5, 1, 16, 32),  # some windows lie inside a block
    (5, 2, 8, 144),
    (7, 1, 12, 8),  # lines that are no multiple of what a thread makes
    (7, 2, 12, 8),
    (3, 1, 32, 8),
]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        if not shutil.which("g++"):
            pytest.skip("g++ is not installed")
        monkeypatch.setattr(depthwise, "prepare", emulation.prepare)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    depthwise._plan.cache_clear()
    yield request.param
    depthwise._plan.cache_clear()


def run(kind, kernel, stride, block, channels, device, dtype, limit):
    """-> what the kernel makes, what it should make in float32, and the rows behind both."""
    grid = BlockGrid.from_mask(make_grid(kind, (2, 3, 4)).to(device))
    rows, made = grid.stored_pixels(block), grid.stored_pixels(block // stride)
    # Behind the stored pixels lies what nobody may read.
    pixels = torch.full((rows + 3, channels), math.nan, dtype=dtype, device=device)
    pixels[:rows] = torch.randn(rows, channels)
    weight = (torch.randn(channels, 1, kernel, kernel) / kernel).to(device, dtype)
    bias = torch.randn(channels, device=device)
    out = torch.full((made + 2, channels), 7.0, dtype=dtype, device=device)
    weights = pack_depthwise(weight, dtype)
    convolve_depthwise(pixels, weights, bias, out, grid, block, stride, limit)
    x = DualResTensor(pixels[:rows].float(), grid, block)
    y = F.conv2d(x, weight.float(), bias, stride, kernel // 2, groups=channels).pixels
    return out[:made].float(), y if limit is None else y.clamp(0, limit), out[made:]


@pytest.mark.parametrize("limit", [None, math.inf, 0.5])
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(("kernel", "stride", "block", "channels"), CASES)
def test_equals_the_rule(kernel, stride, block, channels, kind, limit, device):
    dtypes = [torch.bfloat16, torch.float32 if device == "cpu" else torch.float16]
    for dtype in dtypes:
        found, expected, behind = run(kind, kernel, stride, block, channels, device, dtype, limit)
        close = (
            {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        )
        torch.testing.assert_close(found, expected, **close)
        assert (behind == 7).all()


def test_nan_stays(device):
    grid = BlockGrid.from_mask(make_grid("mixed", (1, 2, 2)).to(device))
    pixels = torch.full((grid.stored_pixels(4), 8), math.nan, dtype=torch.bfloat16, device=device)
    out, weights = torch.zeros_like(pixels), torch.ones(9, 8, dtype=torch.bfloat16, device=device)
    for limit in (math.inf, 6.0):
        convolve_depthwise(pixels, weights, torch.zeros(8, device=device), out, grid, 4, 1, limit)
        assert out.isnan().all()
