"""The turned stem, against a convolution of block tensors in float32.

On Hopper, and in bfloat16 with Hopper's instructions played on the CPU.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from extended import NAN, REPEATS, check_equal, check_output, grid_of
from hopper_on_cpu import hopper_or_cpu  # noqa: F401

from segblocks import to_blocks
from segblocks.fast import stem
from segblocks.fast.packing import pack
from segblocks.fast.steps import StemStep
from segblocks.fast.tables import Scale


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("processors", [None, 3], ids=["planned", "few thread blocks"])
@pytest.mark.parametrize("high", [0, 5, 12])
@pytest.mark.parametrize(
    ("block", "size", "channels", "dtype", "relu"),
    [
        (128, 7, 64, torch.float16, True),
        (64, 7, 64, torch.float16, True),
        (128, 3, 64, torch.float16, True),
        (64, 3, 128, torch.float16, False),
        (128, 7, 128, torch.bfloat16, True),
    ],
)
def test_the_stem(block, size, channels, dtype, relu, high, processors, device, monkeypatch):
    if device == "cpu":
        dtype = torch.bfloat16
    if processors:
        monkeypatch.setattr(stem, "multiprocessors", lambda device: processors)
    grid = grid_of((1, 3, 4), high, device)
    image = torch.randn(1, 3, 3 * block, 4 * block, device=device).to(dtype)
    weight = torch.randn(channels, 3, size, size, device=device) / (3 * size * size) ** 0.5
    weight, bias = weight.to(dtype).float(), torch.randn(channels, device=device)
    packed = pack(StemStep(1, weight, bias, relu, math.inf, 0), block // 2, dtype)
    assert packed.by_patches
    x = stem.split_padded(image, grid.slot, grid.cells, high, block, dtype)
    scale = Scale.of(block // 2, high, 12)
    results = []
    for _ in range(REPEATS[device]):
        out = torch.full((scale.zero + 1, channels), NAN, dtype=dtype, device=device)
        stem.convolve_stem(x, packed.weights, packed.bias, out, scale, 12, relu)
        results.append(out)
    expected = F.conv2d(to_blocks(image.float(), grid), weight, bias, 2, size // 2).pixels
    check_output(results[0], expected.relu() if relu else expected, scale)
    check_equal(results)
