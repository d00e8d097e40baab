"""Pooling equals the definition: values, gradients, shapes."""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, assert_rule
from torch import nn


def max_pool(*args, **settings):
    return lambda x: F.max_pool2d(x - 3, *args, **settings)  # mostly negative features


def avg_pool(*args, **settings):
    return lambda x: F.avg_pool2d(x - 3, *args, **settings)


POOLS = {
    "max 2": max_pool(2),
    "max 2 keyword": lambda x: F.max_pool2d(x, kernel_size=2, stride=2),
    "max 3 stride 2": max_pool(3, 2, 1),
    "max 3 stride 1": max_pool(3, 1, 1),
    "max 3 stride 2 ceil": max_pool(3, 2, ceil_mode=True),
    "max 2 ceil": max_pool(2, 2, ceil_mode=True),
    "max 5 stride 1": max_pool(5, 1, 2),
    "max 9, wider than a low block": max_pool(9, 1, 4),
    "max 3 stride 2 ceil F.pad": lambda x: F.max_pool2d(
        F.pad(x - 3, (1, 0, 1, 0)), 3, 2, ceil_mode=True
    ),
    "max 5 dilation 2 stride 2 ceil": lambda x: F.max_pool2d(
        F.pad(x - 3, (3, 3, 3, 3), value=-torch.inf), 5, 2, dilation=2, ceil_mode=True
    ),
    "max 3 dilation 2": lambda x: F.max_pool2d(
        F.pad(x - 3, (2, 2, 2, 2), value=-torch.inf), 3, 1, dilation=2
    ),
    "max (3, 1)": max_pool((3, 1), 1, (1, 0)),
    "max 4": max_pool(4),
    "max F.pad 0": lambda x: F.max_pool2d(F.pad(x - 3, (1, 1, 1, 1)), 3, 2),
    "max F.pad -inf": lambda x: F.max_pool2d(F.pad(x - 3, (0, 1, 0, 1), value=-torch.inf), 3, 2),
    "max F.pad -inf and padding": lambda x: F.max_pool2d(
        F.pad(x - 3, (1, 1, 1, 1), value=-torch.inf), 5, 1, 1
    ),
    "nn.MaxPool2d": nn.MaxPool2d(3, 2, 1),
    "avg 2": avg_pool(2),
    "avg 2 keyword": lambda x: F.avg_pool2d(x, kernel_size=2, stride=2),
    "avg 4": avg_pool(4),
    "avg 3 stride 2": avg_pool(3, 2, 1),
    "avg 3 stride 2 exclude": avg_pool(3, 2, 1, count_include_pad=False),
    "avg 3 stride 1 exclude": avg_pool(3, 1, 1, count_include_pad=False),
    "avg 3 stride 2 ceil": avg_pool(3, 2, ceil_mode=True),
    "avg 3 stride 2 ceil exclude": avg_pool(3, 2, ceil_mode=True, count_include_pad=False),
    "avg 2 stride 4, pixels skipped": avg_pool(2, 4),
    "avg 5 stride 2 pad 2 exclude": avg_pool(5, 2, 2, False, False),
    "avg 3 divisor": avg_pool(3, 1, 1, divisor_override=5),
    "avg 9, wider than a low block": avg_pool(9, 1, 4, count_include_pad=False),
    "avg (1, 3)": avg_pool((1, 3), 1, (0, 1), count_include_pad=False),
    "avg F.pad": lambda x: F.avg_pool2d(F.pad(x - 3, (1, 1, 1, 1)), 3, 2),
    "avg F.pad exclude": lambda x: F.avg_pool2d(
        F.pad(x - 3, (1, 1, 1, 1)), 3, 1, count_include_pad=False
    ),
    "avg F.pad and padding, exclude": lambda x: F.avg_pool2d(
        F.pad(x - 3, (0, 1, 1, 0)), 4, 1, 1, count_include_pad=False
    ),
    "nn.AvgPool2d": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
}


@pytest.mark.parametrize("function", POOLS.values(), ids=POOLS)
def test_pooling(function):
    assert_rule(function)


@pytest.mark.parametrize("kind", GRIDS)
def test_pooling_on_every_kind_of_grid(kind):
    assert_rule(POOLS["max 3 stride 2"], kind)
    assert_rule(POOLS["avg 3 stride 2 exclude"], kind)
