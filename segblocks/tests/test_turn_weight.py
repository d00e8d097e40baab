"""Weights turned round for a convolution's gradient: the kernel equals PyTorch's own steps."""

import shutil

import emulation
import pytest
import torch

from segblocks.ops import reference
from segblocks.ops.cuda import turn_weight

SHAPES = [(64, 64, 3, 3), (19, 128, 1, 1), (40, 3, 7, 7), (2, 33, 1, 5), (128, 1, 3, 3)]
LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "neither": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
}


def check(shape, layout, dtype, device):
    weight = LAYOUTS[layout](torch.randn(shape).to(dtype).to(device))
    before, found = weight.clone(), turn_weight(weight)
    expected = weight.flip((2, 3)).transpose(0, 1)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(reference.turn_weight(weight), expected)
    assert torch.equal(weight, before)


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_cpu(shape, layout, monkeypatch):
    plan = turn_weight.__globals__["_plan"]
    monkeypatch.setitem(turn_weight.__globals__, "prepare", emulation.prepare)
    plan.cache_clear()
    for dtype in (torch.float32, torch.bfloat16):
        check(shape, layout, dtype, "cpu")
    plan.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 512, 3, 3)])
def test_the_kernel(shape, layout):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        check(shape, layout, dtype, "cuda")
