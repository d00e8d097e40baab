"""Segmentation networks: SwiftNet on a choice of encoders."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from models.efficientnet_lite import efficientnet_lite0, efficientnet_lite1
from models.pretrained import load_imagenet_weights
from models.resnet import resnet18, resnet34, resnet50
from models.swiftnet import SwiftNet
from models.timm_encoder import TimmEncoder

__all__ = ["BACKBONES", "Backbone", "SwiftNet", "build_model"]


@dataclass(frozen=True)
class Backbone:
    """An encoder and the settings of the published system that go with it."""

    builder: Callable[[float, float], nn.Module]  # (bn_momentum, bn_eps) -> encoder
    num_features: int  # decoder channels
    bn_momentum: float
    bn_eps: float

    def build(self) -> nn.Module:
        return self.builder(self.bn_momentum, self.bn_eps)


BACKBONES: dict[str, Backbone] = {
    "resnet18": Backbone(resnet18, num_features=128, bn_momentum=0.05, bn_eps=1e-5),
    "resnet34": Backbone(resnet34, num_features=128, bn_momentum=0.05, bn_eps=1e-5),
    "resnet50": Backbone(resnet50, num_features=128, bn_momentum=0.05, bn_eps=1e-5),
    "efficientnet_lite0": Backbone(
        efficientnet_lite0, num_features=48, bn_momentum=0.01, bn_eps=1e-3
    ),
    "efficientnet_lite1": Backbone(
        efficientnet_lite1, num_features=48, bn_momentum=0.01, bn_eps=1e-3
    ),
}

TIMM_PREFIX = "timm:"
TIMM_NUM_FEATURES = 128


def build_model(
    backbone: str, num_classes: int, pretrained: bool = False, num_features: int | None = None
) -> SwiftNet:
    """SwiftNet on the named encoder: image (N,3,H,W) -> logits (N,num_classes,H/4,W/4).

    `backbone` is a name of `BACKBONES`, or "timm:NAME" for timm's network of that name (needs the
    package timm). `pretrained` loads ImageNet weights into the encoder (from the local cache, else
    downloaded). `num_features` is the number of decoder channels; None takes the backbone's own
    (48 for EfficientNet-Lite, 128 for others).

    Raises ValueError for an unknown or unfit backbone, fewer than one class or fewer than three
    features, and FileNotFoundError if ImageNet weights are asked for and cannot be had, or timm is
    needed and not installed.
    """
    of_timm = backbone.startswith(TIMM_PREFIX)
    if not of_timm and backbone not in BACKBONES:
        raise ValueError(
            f"unknown backbone {backbone!r}; choose one of {', '.join(BACKBONES)}, or "
            f"{TIMM_PREFIX}NAME for a network of timm"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; a network needs at least one class")
    if num_features is None:
        num_features = TIMM_NUM_FEATURES if of_timm else BACKBONES[backbone].num_features
    if num_features < 3:
        raise ValueError(
            f"num_features is {num_features}; the pyramid pooling shares them among three levels, "
            "so give at least 3"
        )
    if of_timm:
        encoder = TimmEncoder(backbone.removeprefix(TIMM_PREFIX), pretrained)
    else:
        encoder = BACKBONES[backbone].build()
        if pretrained:
            load_imagenet_weights(encoder, backbone)
    return SwiftNet(encoder, num_classes, num_features)
