"""First layers and whole networks as fused steps."""

import networks
import pytest
import torch
import torch.nn.functional as F
import torchvision
from agreement import make_grid, make_image
from fast_networks import C, SmallSwiftNet, relu_
from programs import check_fused, describe, record
from torch import nn

from segblocks.fast.fuse import fuse


class Stem(nn.Module):
    """A first convolution on the image itself and what `function` does to it."""

    def __init__(self, function, kernel=7, channels=C, stride=2):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, channels, kernel, stride, kernel // 2, bias=kernel == 3)
        self.norm = nn.BatchNorm2d(channels)
        self.function = function
        networks.settle(self)

    def forward(self, image):
        return self.function(self, image)


@pytest.mark.parametrize("kernel", [3, 7])
def test_the_stem_is_one_step(kernel):
    net = Stem(lambda n, x: F.max_pool2d(relu_(n.norm(n.conv(x))), 3, 2, 1), kernel).eval()
    assert check_fused(net, 16) == ["stem", "pool"]
    net.function = lambda n, x: n.conv(x)
    assert check_fused(net, 16) == ["stem"]
    net.function = lambda n, x: F.relu(n.conv(x))
    assert check_fused(net, 16) == ["stem"]


def test_what_is_no_stem():
    assert check_fused(Stem(lambda n, x: n.conv(x), 5).eval(), 16) == ["conv2d"]
    assert check_fused(Stem(lambda n, x: n.conv(x), 3, stride=1).eval(), 16) == ["conv2d"]
    assert check_fused(Stem(lambda n, x: n.conv(x), 7, channels=12).eval(), 16) == ["conv2d"]
    net = Stem(lambda n, x: (n.conv(x), x)).eval()
    assert check_fused(net, 16) == ["conv2d"], "the image itself is returned"
    net.function = lambda n, x: n.conv(x) * F.max_pool2d(x, 2)[:, :1]
    assert check_fused(net, 16) == ["conv2d", "max_pool2d", "getitem", "mul"], (
        "read by another call"
    )
    net.function = lambda n, x: F.relu(n.conv(x) + F.conv2d(x, n.conv.weight, None, 2, 3))
    assert check_fused(net, 16) == ["conv2d", "conv2d", "add", "relu"]


def test_swiftnet_in_small():
    assert check_fused(SmallSwiftNet().eval(), 32) == [
        "stem",
        "pool",
        "3x3 relu",
        "3x3 residual",
        "relu",
        "3x3/2 relu",
        "3x3 extra relu",
        "no_blocks",
        "pre 1x1 enlarged post",
        "3x3 relu",
        "1x1",
    ]


@pytest.mark.parametrize(("name", "plain"), [("resnet18", 0), ("resnet50", 3)])
def test_torchvision_trunks(name, plain):
    net = getattr(torchvision.models, name)(weights=None)
    trunk = networks.settle(nn.Sequential(*list(net.children())[:-2]))
    steps = check_fused(trunk, 64, (1, 1, 2))
    assert steps[:2] == ["stem", "pool"]
    # What is left are the strided 1×1 convolutions of bottlenecks, each with its batch norm.
    assert steps.count("conv2d") == steps.count("batch_norm") == plain
    assert len(steps) == {"resnet18": 18, "resnet50": 57}[name]


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed):
    steps = check_fused(networks.random_network(seed, depth=4, channels=C).eval(), 16, (1, 2, 2))
    assert steps


def test_random_networks_are_fused():
    """The test above is about fused steps, not only about plain ones."""
    found = set()
    mask = make_grid("mixed", (1, 2, 2))
    for seed in range(20):
        net = networks.random_network(seed, depth=4, channels=C).eval()
        found |= {describe(s) for s in fuse(record(net, make_image(mask, 3, 16), mask))}
    assert {"3x3", "3x3 relu", "1x1", "3x3/2"} <= found
    assert any("residual" in step for step in found)
