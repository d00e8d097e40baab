"""What must not be fused: values that others read, other windows, in-place functions, ..."""

import pytest
import torch
import torch.nn.functional as F
from fast_networks import Net, relu_, up
from programs import check_fused

from segblocks import no_blocks


def then(make, use):
    """`use(net, make(net, x))`, so that a value can be read several times."""
    return lambda net, x: use(net, make(net, x), x)


def conv(net, x):
    return net.conv(x)


def training_norm(net, x):
    return F.batch_norm(net.conv(x), None, None, training=True)


def changed_while_it_waits(net, x):
    """The addition happens after `x`, which the convolution reads, was changed."""
    y = net.conv(x)
    x.relu_()
    return y + x


def changed_before_the_addition(net, x):
    y = net.other_norm(net.second(relu_(net.conv(x))))
    shortcut = net.point(x)
    x.mul_(2)
    y += shortcut
    return relu_(y), x


def changed_and_read_again(net, x):
    y = net.conv(x)
    z = relu_(y)
    return z + y  # y is z by now


def kept(net, x):
    y = net.norm(x)
    return net.point(relu_(y * 1)), y


def grouped(net, x):
    return F.relu(F.conv2d(torch.cat((x, x), 1), net.conv.weight, None, 1, 1, 1, 2))


def other_windows(net, x):
    weight = net.conv.weight
    y = F.conv2d(x, weight[:, :, :1, :1], None, 1, "same")
    y = F.conv2d(y, weight[:, :, :2, :2], None, 2)
    y = F.conv2d(y, weight[:, :, :1], None, 1, (0, 1))
    y = F.conv2d(y, F.pad(weight, (1, 1, 1, 1)), None, 1, 2)
    return F.relu(F.conv2d(y, weight, None, 1, 2, 2))


def pools(net, x):
    return [
        F.max_pool2d(x, 3, 2, 1),
        F.max_pool2d(x, 2),
        F.max_pool2d(x, 3, 1, 1),
        F.avg_pool2d(x, 3, 2, 1),
        F.max_pool2d(x[:, :4], 3, 2, 1),
    ]


APART = {
    "convolution read twice": (
        then(conv, lambda n, y, x: n.norm(y) * y),
        ["3x3", "batch_norm", "mul"],
    ),
    "convolution is an output": (then(conv, lambda n, y, x: (y, F.relu(y))), ["3x3", "relu"]),
    "bn is an output": (
        then(lambda n, x: n.norm(n.conv(x)), lambda n, y, x: (y, F.relu(y))),
        ["3x3", "relu"],
    ),
    "sum is an output": (
        then(lambda n, x: n.conv(x) + x, lambda n, y, x: (y, F.relu(y))),
        ["3x3 residual", "relu"],
    ),
    "shortcut is an output": (
        then(lambda n, x: n.point(x), lambda n, y, x: (n.conv(x) + n.norm(y), y)),
        ["1x1", "batch_norm", "3x3 residual"],
    ),
    "shortcut's convolution is an output": (
        then(lambda n, x: n.down(x), lambda n, y, x: (n.strided(x) + n.norm(y), y)),
        ["conv2d", "batch_norm", "3x3/2 residual"],
    ),
    "shortcut read twice": (
        then(lambda n, x: n.down(up(x)), lambda n, y, x: (n.conv(x) + y) * y),
        ["interpolate", "conv2d", "3x3 residual", "mul"],
    ),
    "enlarged read twice": (
        then(lambda n, x: up(n.strided(x)), lambda n, y, x: (n.conv(x) + y) * y),
        ["3x3/2", "interpolate", "3x3 residual", "mul"],
    ),
    "enlarged by 4": (
        lambda n, x: n.conv(x) + up(up(n.strided(n.strided(x)))),
        ["3x3/2", "3x3/2", "interpolate", "3x3 enlarged"],
    ),
    "enlarged by 4 at once": (
        lambda n, x: (
            n.conv(x) + F.interpolate(n.strided(n.strided(x)), x.shape[2:], None, "bilinear")
        ),
        ["3x3/2", "3x3/2", "interpolate", "3x3 residual"],
    ),
    "enlarged by repetition": (
        lambda n, x: n.conv(x) + F.interpolate(n.strided(x), scale_factor=2),
        ["3x3/2", "interpolate", "3x3 residual"],
    ),
    "bn before, an output": (
        then(lambda n, x: n.norm(x), lambda n, y, x: (n.point(F.relu(y)), y)),
        ["batch_norm", "relu", "1x1"],
    ),
    "relu before, read twice": (
        then(lambda n, x: relu_(n.norm(x)), lambda n, y, x: n.point(y) * y),
        ["batch_norm", "relu", "1x1", "mul"],
    ),
    "bn before a 3x3": (lambda n, x: n.conv(relu_(n.norm(x))), ["batch_norm", "relu", "3x3"]),
    "bn before without relu": (lambda n, x: n.point(n.norm(x)), ["batch_norm", "1x1"]),
    "relu before without bn": (lambda n, x: n.point(F.relu(x)), ["relu", "1x1"]),
    "bn after without relu": (
        lambda n, x: n.norm(n.conv(x) + x),
        ["3x3 residual", "batch_norm"],
    ),
    "training bn": (training_norm, ["3x3", "batch_norm"]),
    "groups": (grouped, ["cat", "conv2d", "relu"]),
    "other windows": (other_windows, ["conv2d"] * 5 + ["relu"]),
    "padded by F.pad": (
        lambda n, x: F.conv2d(F.pad(x, (0, 1, 0, 1)), n.conv.weight, None, 2),
        ["pad + conv2d"],
    ),
    "pooled after F.pad": (
        lambda n, x: F.max_pool2d(F.pad(x, (1, 0, 1, 0)), 3, 2, 0),
        ["pad + max_pool2d"],
    ),
    "1x1 with stride": (lambda n, x: n.down(x), ["conv2d"]),
    "too few channels in": (
        lambda n, x: F.conv2d(x[:, :31], n.conv.weight[:, :31], None, 1, 1),
        ["getitem", "conv2d"],
    ),
    "depthwise of odd channels": (
        lambda n, x: F.conv2d(x[:, :31], n.each.weight[:31], None, 1, 1, 1, 31),
        ["getitem", "conv2d"],
    ),
    "depthwise, two outputs each": (
        lambda n, x: F.conv2d(x, n.each.weight.repeat(2, 1, 1, 1), None, 1, 1, 1, 64),
        ["conv2d"],
    ),
    "depthwise 9x9": (
        lambda n, x: F.conv2d(x, n.each.weight.repeat(1, 1, 3, 3), None, 1, 4, 1, 64),
        ["conv2d"],
    ),
    "odd channels out": (lambda n, x: F.relu(n.last(x)), ["conv2d", "relu"]),
    "added to itself": (then(conv, lambda n, y, x: y + y), ["3x3", "add"]),
    "alpha": (lambda n, x: torch.add(n.conv(x), x, alpha=2), ["3x3", "add"]),
    "scalar added": (lambda n, x: n.conv(x) + 1, ["3x3", "add"]),
    "channels added": (lambda n, x: n.conv(x) + n.norm.weight.view(-1, 1, 1), ["3x3", "add"]),
    "one channel added": (
        lambda n, x: n.conv(x) + x.mean(1, keepdim=True),
        ["3x3", "mean", "add"],
    ),
    "subtracted": (lambda n, x: n.conv(x) - x, ["3x3", "sub"]),
    "another activation": (lambda n, x: F.silu(n.conv(x)), ["3x3", "silu"]),
    "pools": (
        pools,
        ["pool", "max_pool2d", "max_pool2d", "avg_pool2d", "getitem", "max_pool2d"],
    ),
    "changed while it waits": (changed_while_it_waits, ["relu", "3x3 residual"]),
    "changed before the addition": (
        changed_before_the_addition,
        ["3x3 relu", "mul", "3x3 extra relu"],
    ),
    "changed and read again": (changed_and_read_again, ["3x3 relu", "add"]),
    "kept": (kept, ["batch_norm", "mul", "relu", "1x1"]),
    "dense excursion": (
        lambda n, x: n.conv(x) + no_blocks(lambda t: t.flip(2))(x),
        ["no_blocks", "3x3 residual"],
    ),
}


@pytest.mark.parametrize("name", APART)
def test_stays_apart(name):
    function, expected = APART[name]
    assert check_fused(Net(function).eval(), 8) == ["conv2d", *expected]
