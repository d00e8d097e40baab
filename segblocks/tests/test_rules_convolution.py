"""Convolutions, transposed ones too, equal the definition: values, gradients, shapes."""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, TOLERANCE, assert_rule, distance, make_grid, make_image
from definition import slow_blocks
from torch import nn

from segblocks import to_blocks


def weights(out: int, into: int, *kernel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((out, into, *kernel), generator=generator, dtype=torch.float64)


def conv(kernel, out=5, into=4, bias=True, **settings):
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    weight = weights(out, into // settings.get("groups", 1), *kernel)
    vector = weights(out, 1).flatten() if bias else None
    return lambda x: F.conv2d(x, weight, vector, **settings)


CONVOLUTIONS = {
    "1x1": conv(1),
    "1x1 no bias": conv(1, bias=False),
    "1x1 stride 2": conv(1, stride=2),
    "1x1 groups": conv(1, out=8, groups=4),
    "2x2 stride 2": conv(2, stride=2),
    "2x2 same": conv(2, padding="same"),
    "3x3": conv(3, padding=1),
    "3x3 no bias": conv(3, padding=1, bias=False),
    "3x3 tuple padding": conv(3, padding=(1, 1)),
    "3x3 same": conv(3, padding="same"),
    "3x3 stride 2": conv(3, padding=1, stride=2),
    "3x3 stride 2 tuple": conv(3, padding=1, stride=(2, 2)),
    "3x3 stride 4": conv(3, padding=1, stride=4),
    "3x3 dilation 2": conv(3, padding=2, dilation=2),
    "3x3 dilation 2 same": conv(3, padding="same", dilation=2),
    "3x3 dilation 3": conv(3, padding=3, dilation=3),
    "3x3 dilation 6, wider than a low block": conv(3, padding=6, dilation=6),
    "3x3 dilation 12, wider than a block": conv(3, padding=12, dilation=12),
    "3x3 stride 2 dilation 2": conv(3, padding=2, dilation=2, stride=2),
    "3x3 groups 2": conv(3, out=6, padding=1, groups=2),
    "3x3 depthwise": conv(3, out=4, padding=1, groups=4),
    "3x3 depthwise stride 2": conv(3, out=4, padding=1, groups=4, stride=2),
    "4x4 same": conv(4, padding="same"),
    "4x4 stride 2": conv(4, padding=1, stride=2),
    "4x4 stride 4": conv(4, stride=4),
    "4x4 stride 4 valid": conv(4, stride=4, padding="valid"),
    "5x5": conv(5, padding=2),
    "5x5 stride 2": conv(5, padding=2, stride=2),
    "5x5 depthwise stride 2": conv(5, out=4, padding=2, groups=4, stride=2),
    "6x6 same": conv(6, padding="same"),
    "7x7": conv(7, padding=3),
    "7x7 stride 2": conv(7, padding=3, stride=2),
    "7x7 stride 4": conv(7, padding=3, stride=4),
    "1x3": conv((1, 3), padding=(0, 1)),
    "3x1": conv((3, 1), padding=(1, 0)),
    "1x7 same": conv((1, 7), padding="same"),
    "5x2 same": conv((5, 2), padding="same"),
    "2x2 stride 4, pixels skipped": conv(2, stride=4),
    "F.pad 1": lambda x: conv(3)(F.pad(x, (1, 1, 1, 1))),
    "F.pad asymmetric": lambda x: conv(4)(F.pad(x, (1, 2, 0, 3))),
    "F.pad as TensorFlow, stride 2": lambda x: conv(3, stride=2)(F.pad(x, (0, 1, 0, 1))),
    "F.pad width only": lambda x: conv((1, 3))(F.pad(x, (1, 1))),
    "F.pad and padding": lambda x: conv(4, padding=1)(F.pad(x, (0, 1, 1, 0))),
    "F.pad replicate": lambda x: conv(3)(F.pad(x, (1, 1, 1, 1), mode="replicate")),
    "F.pad replicate stride 2": lambda x: conv(5, stride=2)(F.pad(x, (2, 1, 1, 2), "replicate")),
    "F.pad with 2": lambda x: conv(3)(F.pad(x, (1, 1, 1, 1), value=2.0)),
    "F.pad one side, crop the other": lambda x: conv(5)(F.pad(x, (5, -1, -1, 5))),
    "F.pad 0": lambda x: conv(1)(F.pad(x, (0, 0, 0, 0))),
    "nn.ZeroPad2d": lambda x: conv(3)(nn.ZeroPad2d(1)(x)),
    "nn.ReplicationPad2d": lambda x: conv(3)(nn.ReplicationPad2d(1)(x)),
    "nn.Conv2d replicate": nn.Conv2d(4, 5, 3, padding=1, padding_mode="replicate").double(),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("function", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(function):
    assert_rule(function)


@pytest.mark.parametrize("kind", GRIDS)
def test_convolution_on_every_kind_of_grid(kind):
    assert_rule(conv(3, padding=1), kind)
    assert_rule(conv(5, padding=2, stride=2), kind)


def test_convolution_gradients_reach_the_weights():
    grid, image = make_grid("mixed"), make_image(make_grid("mixed"), 4)
    grads = []
    for split in (to_blocks, slow_blocks):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 5, 3, stride=2, padding=1).double()
        layer(split(image, grid)).combine().square().sum().backward()
        grads.append((layer.weight.grad, layer.bias.grad))
    for mine, theirs in zip(*grads):
        assert distance(mine, theirs) < TOLERANCE


def transposed(kernel, out=5, into=4, **settings):
    weight = weights(into, out // settings.get("groups", 1), kernel, kernel)
    vector = weights(out, 1).flatten()
    return lambda x: F.conv_transpose2d(x, weight, vector, **settings)


TRANSPOSED = {
    "k2 s2": transposed(2, stride=2),
    "k3 s1 p1": transposed(3, padding=1),
    "k5 s1 p2": transposed(5, padding=2),
    "k3 s2 p1 op1": transposed(3, stride=2, padding=1, output_padding=1),
    "k4 s2 p1": transposed(4, stride=2, padding=1),
    "k5 s2 p2 op1": transposed(5, stride=2, padding=2, output_padding=1),
    "k6 s2 p2": transposed(6, stride=2, padding=2),
    "k8 s4 p2": transposed(8, stride=4, padding=2),
    "k4 s4": transposed(4, stride=4),
    "k1 s2 op1": transposed(1, stride=2, output_padding=1),
    "k3 s1 p2 dilation 2": transposed(3, padding=2, dilation=2),
    "k2 s2 p1 dilation 3": transposed(2, stride=2, padding=1, dilation=3),
    "k3 s2 p2 op1 dilation 2": transposed(3, stride=2, padding=2, output_padding=1, dilation=2),
    "k4 s2 p1 groups": transposed(4, out=6, stride=2, padding=1, groups=2),
    "k2 s2 depthwise": transposed(2, out=4, stride=2, groups=4),
    "k3 s3": transposed(3, stride=3),
    "k5 s3 p1": transposed(5, stride=3, padding=1),
}


@pytest.mark.parametrize("function", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolution(function):
    assert_rule(function)
