"""Small networks that do to blocks what a recording has to get right; in float64."""

from collections import OrderedDict, namedtuple

import networks
import torch
import torch.nn.functional as F
from torch import nn

from segblocks import no_blocks

Pair = namedtuple("Pair", "first second")

CHANNELS = 8


class Net(nn.Module):
    """A function of an image and of two convolutions as a network, in float64."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.strided = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1)
        self.even = nn.Conv2d(CHANNELS, CHANNELS, 4, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.drop = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.randn(CHANNELS, 1, 1))
        networks.settle(self)

    def forward(self, image):
        return self.function(self, self.first(image))


def read_then_changed(net, x):
    y = net.conv(x)
    x.relu_()
    return y + x


def changed_through_an_alias(net, x):
    y = net.drop(x)  # in evaluation the argument itself
    F.relu(y, inplace=True)
    return x + net.conv(y)


def added_into_the_shortcut(net, x):
    shortcut = net.conv(x)
    shortcut += x
    return shortcut * 2 + x


def changed_twice(net, x):
    kept = x * 1
    x.mul_(net.gain).add_(kept)
    x -= 0.5
    return net.conv(x) + kept


def halves(net, x):
    left, right = x.chunk(2, dim=1)
    left.relu_()  # the other half shares the buffer, but no pixel
    return torch.cat((right, left * right), dim=1)


def sliced(net, x):
    return torch.cat((x[:, 2:], x[:, :2].exp()), dim=1)


def shifted(net, x):
    return net.even(F.pad(x, (1, 0, 0, 1)))


def padded_by_hand(net, x):
    y = F.pad(x, (0, 1, 0, 1))
    z = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), net.conv.weight)
    return F.conv2d(y, net.strided.weight, None, 2, 0) + F.max_pool2d(z, 2)


def no_padding_at_all(net, x):
    return net.conv(F.pad(x, (0, 0)).contiguous())


def layer_norm(net, x):
    y = F.layer_norm(x.permute(0, 2, 3, 1), (CHANNELS,))
    return y.permute(0, 3, 1, 2) + x


def context(net, x):
    return x * no_blocks(lambda t: t.mean((2, 3), keepdim=True).expand_as(t))(x)


def broadcast(net, x):
    return x + x.mean(1, keepdim=True) + torch.add(x, x, alpha=2)


NETWORKS = {
    "plain": lambda net, x: F.relu(net.norm(net.conv(x)), inplace=True),
    "read, then changed": read_then_changed,
    "changed through an alias": changed_through_an_alias,
    "added into the shortcut": added_into_the_shortcut,
    "changed twice": changed_twice,
    "halves": halves,
    "sliced": sliced,
    "shifted": shifted,
    "padded by hand": padded_by_hand,
    "no padding at all": no_padding_at_all,
    "layer norm": layer_norm,
    "permuted output": lambda net, x: net.conv(x).permute(0, 2, 3, 1),
    "context": context,
    "broadcast": broadcast,
    "resized": lambda net, x: x + F.interpolate(net.strided(x), scale_factor=2, mode="bilinear"),
    "dict": lambda net, x: OrderedDict(out=net.conv(x), aux=x),
    "tuple": lambda net, x: (net.conv(x), [x, {"low": net.strided(x)}]),
    "named tuple": lambda net, x: Pair(x.relu(), x),
    "itself": lambda net, x: x,
}
