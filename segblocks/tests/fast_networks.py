"""Networks with 64 channels and more, whose layers the fast path can fuse; in float64."""

import networks
import torch
import torch.nn.functional as F
from torch import nn

from segblocks import no_blocks

C = 64


class Net(nn.Module):
    """A function of a first convolution's output, with layers to build it of.

    Args:
        function: (net, x) -> what the network returns.
        stem: the first convolution halves the image and is one that the kernels have.
    """

    def __init__(self, function, channels: int = C, stem: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first = nn.Conv2d(3, channels, 3, 2, 1) if stem else nn.Conv2d(3, channels, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.strided = nn.Conv2d(channels, channels, 3, 2, 1)
        self.point = nn.Conv2d(channels, channels, 1)
        self.down = nn.Conv2d(channels, channels, 1, 2, bias=False)
        self.last = nn.Conv2d(channels, 19, 1)
        self.each = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.each_strided = nn.Conv2d(channels, channels, 5, 2, 2, groups=channels, bias=False)
        self.few, self.more = nn.Conv2d(channels, 24, 1), nn.Conv2d(24, channels, 1)
        self.few_wide = nn.Conv2d(24, 24, 3, padding=1)
        self.norm, self.other_norm, self.third_norm = (nn.BatchNorm2d(channels) for _ in range(3))
        self.plain_norm = nn.BatchNorm2d(channels, affine=False)
        self.register_buffer("ceiling", torch.tensor(0.75))
        networks.settle(self)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)

    def forward(self, image):
        return self.function(self, self.first(image))


def relu_(x):
    return F.relu(x, inplace=True)


def up(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None
        if stride == 2:
            conv = nn.Conv2d(inputs, outputs, 1, 2, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        """After the addition with and without ReLU, as SwiftNet's skip connections want it."""
        y = self.bn2(self.conv2(relu_(self.bn1(self.conv1(x)))))
        y = y + (x if self.down is None else self.down(x))
        return F.relu(y), y


class MBConv(nn.Module):
    """An inverted residual block: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int = 6):
        super().__init__()
        wide, self.adds = inputs * expansion, stride == 1 and inputs == outputs
        self.expand = nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide))
        each = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        self.depthwise = nn.Sequential(each, nn.BatchNorm2d(wide))
        self.project = nn.Sequential(
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.expand(x))))
        return x + self.project(y) if self.adds else self.project(y)


class SmallEfficientNet(nn.Module):
    """EfficientNet-Lite in small, with one step up: few channels, depthwise, ReLU6; 19 classes."""

    def __init__(self, classes: int = 19):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
        )
        self.fine = nn.Sequential(
            MBConv(32, 16, 3, 1, 1), MBConv(16, 24, 3, 2), MBConv(24, 24, 3, 1)
        )
        self.coarse = nn.Sequential(MBConv(24, 40, 5, 2), MBConv(40, 40, 5, 1))
        self.norm, self.skip_norm = nn.BatchNorm2d(40), nn.BatchNorm2d(24)
        self.small, self.skip = nn.Conv2d(40, 48, 1), nn.Conv2d(24, 48, 1)
        self.blend_norm, self.blend = nn.BatchNorm2d(48), nn.Conv2d(48, 48, 3, padding=1)
        self.logits = nn.Conv2d(48, classes, 1)
        networks.settle(self)

    def forward(self, image):
        fine = self.fine(self.stem(image))
        small = self.small(relu_(self.norm(self.coarse(fine))))
        x = self.skip(F.relu(self.skip_norm(fine))) + up(small)
        return self.logits(self.blend(relu_(self.blend_norm(x))))


class SmallSwiftNet(nn.Module):
    """SwiftNet-RN18 in small: a stem, two stages, dense context, one step up, 19 classes."""

    def __init__(self, channels: int = C, classes: int = 19):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.stages = nn.ModuleList(
            [BasicBlock(channels, channels), BasicBlock(channels, 2 * channels)]
        )
        self.context = nn.Conv2d(2 * channels, channels, 1)
        self.skip_bn = nn.BatchNorm2d(channels)
        self.skip = nn.Conv2d(channels, channels, 1, bias=False)
        self.blend_bn = nn.BatchNorm2d(channels)
        self.blend = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last_bn = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, classes, 1)
        networks.settle(self)

    def look_around(self, x):
        return self.context(x + F.adaptive_avg_pool2d(x, 1))

    def forward(self, image):
        x = F.max_pool2d(relu_(self.bn(self.stem(image))), 3, 2, 1)
        x, skip = self.stages[0](x)
        x, _ = self.stages[1](x)
        x = no_blocks(self.look_around)(x)
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        x = x + self.skip(F.relu(self.skip_bn(skip)))
        x = self.blend(F.relu(self.blend_bn(x)))
        return self.last(F.relu(self.last_bn(x)))
