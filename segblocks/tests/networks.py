"""Networks to test with: random ones drawn from a seed, and torchvision's trunks."""

import random

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.convnext import LayerNorm2d


class Residual(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Concatenate(nn.Module):
    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class DownAndUp(nn.Module):
    """Half the size and back, as in a U-Net, added to where it left."""

    def __init__(self, channels: int, body: nn.Module, mode: str):
        super().__init__()
        self.down = nn.Conv2d(channels, channels, 3, 2, 1)
        self.body = body
        self.mode = mode

    def forward(self, x):
        y = self.body(self.down(x))
        return F.interpolate(y, size=x.shape[2:], mode=self.mode) * 0.5 + x


class Gate(nn.Module):
    """Attention over the channels of each pixel."""

    def forward(self, x):
        return x * torch.softmax(x, dim=1) + x.mean(1, keepdim=True)


def random_network(seed: int, depth: int = 6, channels: int = 4) -> nn.Module:
    """An image of 3 channels → `channels` channels at the same size or a half; in float64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, channels, rng.choice([3, 5]), 1, "same")]
    if rng.random() < 0.5:
        layers.append(nn.Conv2d(channels, channels, 3, 2, 1))
    layers += [random_layer(rng, channels) for _ in range(depth)]
    net = nn.Sequential(*layers).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def random_layer(rng: random.Random, channels: int, depth: int = 0) -> nn.Module:
    c = channels
    activation = rng.choice([nn.ReLU(), nn.ReLU(True), nn.GELU(), nn.SiLU(True), nn.Hardswish()])
    mode = rng.choice(["bilinear", "nearest"])
    dilation = rng.choice([1, 2, 3])

    def inner():
        return random_layer(rng, c, depth + 1)

    leaves = [
        lambda: nn.Sequential(nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), activation),
        lambda: nn.Sequential(nn.Conv2d(c, c, 3, 1, dilation, dilation), activation),
        lambda: nn.Sequential(nn.Conv2d(c, 2 * c, 1), activation, nn.Conv2d(2 * c, c, 1)),
        lambda: nn.Conv2d(c, c, 5, padding=2, groups=c),
        lambda: nn.Sequential(LayerNorm2d(c), activation),
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        lambda: nn.Sequential(nn.Conv2d(c, 4 * c, 2, 2), nn.PixelShuffle(2)),
        lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.ConvTranspose2d(c, c, 4, 2, 1)),
        lambda: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode=mode)),
        lambda: nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, 3)),
        Gate,
    ]
    if depth < 2:
        leaves += [
            lambda: Residual(nn.Sequential(inner(), inner())),
            lambda: nn.Sequential(Concatenate(inner(), inner()), nn.Conv2d(2 * c, c, 1)),
            lambda: DownAndUp(c, inner(), mode) if depth == 0 else Residual(inner()),
        ]
    return rng.choice(leaves)()


def settle(net: nn.Module) -> nn.Module:
    """Double precision, batch norms with statistics of their own, evaluation mode."""
    net = net.double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def resnet18_trunk() -> nn.Module:
    net = torchvision.models.resnet18(weights=None)
    return settle(nn.Sequential(*list(net.children())[:-2]))


def mobilenet_v2_trunk() -> nn.Module:
    return settle(torchvision.models.mobilenet_v2(weights=None).features[:8])


def efficientnet_trunk(wrap, gate_only: bool) -> nn.Module:
    """Squeeze-excitation through `wrap` (no_blocks): all of it, or only what computes the gate."""
    trunk = torchvision.models.efficientnet_b0(weights=None).features[:4]
    for module in trunk.modules():
        if isinstance(module, torchvision.ops.SqueezeExcitation):
            name = "_scale" if gate_only else "forward"
            setattr(module, name, wrap(getattr(module, name)))
    return settle(trunk)


def convnext_trunk() -> nn.Module:
    net = torchvision.models.ConvNeXt([
        torchvision.models.convnext.CNBlockConfig(8, 16, 1),
        torchvision.models.convnext.CNBlockConfig(16, None, 1),
    ], layer_scale=0.5)  # fmt: skip
    return settle(net.features)


def image(height=48, width=64, n=2, seed=0):
    """(N, 3, H, W) float64 of random values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, height, width, generator=generator, dtype=torch.float64)


def net(stride=4):
    """A few convolutions, output of 5 channels at the given stride; in float64."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 1, 1)]
    while stride > 1:
        layers += [nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()]
        stride //= 2
    return nn.Sequential(*layers, nn.Conv2d(4, 5, 1)).double()
