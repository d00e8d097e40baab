"""ResNet encoders (He et al., CVPR 2016) on torchvision's blocks and parameter names."""

from functools import partial

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

STEM_BN_MOMENTUM = 0.1


class ResNetEncoder(ResNet):
    """torchvision's ResNet without its classifier.

    (N,3,H,W) -> features at strides 4, 8, 16 and 32: the outputs of layer1 to layer4, each after
    its final ReLU. `channels` holds their channel counts. `bn_momentum` is that of the residual
    layers; the stem keeps 0.1, as in the published system.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: tuple[int, int, int, int],
        bn_momentum: float,
        bn_eps: float,
    ):
        norm_layer = partial(nn.BatchNorm2d, momentum=bn_momentum, eps=bn_eps)
        super().__init__(block, list(layers), num_classes=1, norm_layer=norm_layer)
        del self.avgpool, self.fc
        self.bn1.momentum = STEM_BN_MOMENTUM
        self.channels = tuple(width * block.expansion for width in (64, 128, 256, 512))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        stride4 = self.layer1(x)
        stride8 = self.layer2(stride4)
        stride16 = self.layer3(stride8)
        stride32 = self.layer4(stride16)
        return stride4, stride8, stride16, stride32


def resnet18(bn_momentum: float, bn_eps: float) -> ResNetEncoder:
    return ResNetEncoder(BasicBlock, (2, 2, 2, 2), bn_momentum, bn_eps)


def resnet34(bn_momentum: float, bn_eps: float) -> ResNetEncoder:
    return ResNetEncoder(BasicBlock, (3, 4, 6, 3), bn_momentum, bn_eps)


def resnet50(bn_momentum: float, bn_eps: float) -> ResNetEncoder:
    return ResNetEncoder(Bottleneck, (3, 4, 6, 3), bn_momentum, bn_eps)
