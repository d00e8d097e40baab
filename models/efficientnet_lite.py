"""EfficientNet-Lite encoders: EfficientNet (Tan & Le, ICML 2019) with ReLU6, without
squeeze-and-excitation, and with a stem and a first and last stage that do not scale.

Padding is symmetric (kernel // 2), as in the published SegBlocks checkpoints, whose parameter
names are used here; TensorFlow's original weights were trained with asymmetric padding.
"""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
# EfficientNet-B0, table 1 of the paper; the Lite variants multiply the repeats of stages 1 to 5.
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class MBConv(nn.Module):
    """Inverted residual: expand 1×1, depthwise k×k, project 1×1; plus its input if shapes agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        expansion: int,
        bn_momentum: float,
        bn_eps: float,
    ):
        super().__init__()
        hidden = in_channels * expansion
        self.expands = expansion != 1
        self.adds_input = stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, momentum=bn_momentum, eps=bn_eps)
        self._depthwise_conv = nn.Conv2d(
            hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False
        )
        self._bn1 = nn.BatchNorm2d(hidden, momentum=bn_momentum, eps=bn_eps)
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, momentum=bn_momentum, eps=bn_eps)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds_input else y


class EfficientNetLiteEncoder(nn.Module):
    """(N,3,H,W) -> features at strides 4, 8, 16 and 32, before each stride-2 stage and at the end.

    The features before the first stride-2 stage (stride 2) are not used by the decoder and not
    returned. `channels` holds the channel counts of the four.
    """

    def __init__(self, depth: float, bn_momentum: float, bn_eps: float):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, 2, 1, bias=False),
            nn.BatchNorm2d(STEM_CHANNELS, momentum=bn_momentum, eps=bn_eps),
            nn.ReLU6(),
        )
        self.blocks = nn.ModuleList()
        channels = STEM_CHANNELS
        for i, stage in enumerate(STAGES):
            scales = 0 < i < len(STAGES) - 1
            repeats = math.ceil(stage.repeats * depth) if scales else stage.repeats
            layers = nn.ModuleList()
            for j in range(repeats):
                stride = stage.stride if j == 0 else 1
                layers.append(
                    MBConv(
                        channels,
                        stage.channels,
                        stage.kernel,
                        stride,
                        stage.expansion,
                        bn_momentum,
                        bn_eps,
                    )
                )
                channels = stage.channels
            self.blocks.append(layers)
        # Stage i is read where the next one halves the size, and at the end.
        ends = [i for i, nxt in enumerate(STAGES[1:]) if nxt.stride == 2] + [len(STAGES) - 1]
        self.read_after = tuple(ends[1:])  # ends[0] is still at stride 2
        self.channels = tuple(STAGES[i].channels for i in self.read_after)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Each output channel of a depthwise convolution feeds from k² weights only.
                kernel = math.prod(module.kernel_size)
                fan_out = module.out_channels * kernel // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(image)
        features = []
        for i, stage in enumerate(self.blocks):
            for block in stage:
                x = block(x)
            if i in self.read_after:
                features.append(x)
        return tuple(features)


def efficientnet_lite0(bn_momentum: float, bn_eps: float) -> EfficientNetLiteEncoder:
    return EfficientNetLiteEncoder(1.0, bn_momentum, bn_eps)


def efficientnet_lite1(bn_momentum: float, bn_eps: float) -> EfficientNetLiteEncoder:
    return EfficientNetLiteEncoder(1.1, bn_momentum, bn_eps)
