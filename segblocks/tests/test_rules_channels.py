"""Functions along the channels equal the definition: slices, reductions, softmax, cat."""

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, assert_rule, distance, make_grid, make_image
from definition import slow_blocks
from torch import nn

from segblocks import to_blocks

CHANNELS = {
    "chunk": lambda x: torch.chunk(x, 2, dim=1),
    "chunk method": lambda x: x.chunk(4, 1),
    "split": lambda x: torch.split(x, [1, 3], dim=1),
    "split method": lambda x: x.split(2, dim=-3),
    "slice": lambda x: x[:, 1:3],
    "slice all": lambda x: x[:, :2, :, :],
    "slice step": lambda x: x[:, ::2],
    "softmax": lambda x: F.softmax(x, dim=1),
    "softmax method": lambda x: x.softmax(1),
    "softmax module": nn.Softmax(dim=-3),
    "softmax 2d": nn.Softmax2d(),
    "log_softmax": lambda x: F.log_softmax(x, dim=1),
    "softmax NHWC": lambda x: x.permute(0, 2, 3, 1).softmax(-1),
    "mean": lambda x: x.mean(1, keepdim=True),
    "mean no keepdim": lambda x: x.mean(dim=1),
    "mean list": lambda x: torch.mean(x, dim=[1], keepdim=True),
    "sum": lambda x: torch.sum(x, dim=1, keepdim=True),
    "sum no keepdim": lambda x: x.sum(1),
    "argmax": lambda x: x.argmax(1),
    "argmax keepdim": lambda x: torch.argmax(x, dim=1, keepdim=True),
    "amax": lambda x: x.amax(1, keepdim=True) - x.amin(dim=1, keepdim=True),
    "var": lambda x: x.var(1, keepdim=True) + torch.std(x, dim=1, keepdim=True, correction=0),
    "var in order": lambda x: x.var(1, False, True) + torch.std(x, 1, True, True),
    "var in order, no keepdim": lambda x: x.var(1, False),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "attention over channels": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "normalise": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1).sqrt(),
}


@pytest.mark.parametrize("function", CHANNELS.values(), ids=CHANNELS)
def test_channels(function):
    assert_rule(function)


@pytest.mark.parametrize("keepdim", [True, False])
def test_max_over_channels_gives_values_and_indices(keepdim):
    grid = make_grid("mixed")
    image = make_image(grid, 4)
    mine = to_blocks(image, grid).max(dim=1, keepdim=keepdim)
    theirs = slow_blocks(image, grid).max(dim=1, keepdim=keepdim)
    assert distance(mine.values.combine(), theirs[0].combine()) < TOLERANCE
    assert torch.equal(mine.indices.combine(), theirs[1].combine())


CAT = {
    "cat": lambda x, y: torch.cat((x, y), 1),
    "cat list, keyword": lambda x, y: torch.cat([x, y, x], dim=1),
    "cat negative": lambda x, y: torch.cat([x[:, :1], y], dim=-3),
    "concat": lambda x, y: torch.concat([x, y], dim=1),
    "shuffle": lambda x, y: torch.cat((*x.chunk(2, 1), *y.chunk(2, 1)), 1),
}


@pytest.mark.parametrize("function", CAT.values(), ids=CAT)
def test_cat(function):
    assert_rule(function, inputs=2)
