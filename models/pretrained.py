"""ImageNet weights for the encoders: torchvision's for ResNets, timm's for EfficientNet-Lite.

Used at the start of training only; validation and timing load a checkpoint and download nothing.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet34_Weights, ResNet50_Weights

from models.timm_encoder import SCRATCH, create_pretrained, import_timm

RESNET_WEIGHTS = {
    "resnet18": ResNet18_Weights.IMAGENET1K_V1,
    "resnet34": ResNet34_Weights.IMAGENET1K_V1,
    "resnet50": ResNet50_Weights.IMAGENET1K_V1,
}
# timm has no lite1 trained with symmetric padding: TensorFlow's was trained with asymmetric
# padding, which shifts the stride-2 layers by one pixel until fine-tuning makes up for it.
TIMM_NAMES = {
    "efficientnet_lite0": "efficientnet_lite0.ra_in1k",
    "efficientnet_lite1": "tf_efficientnet_lite1.in1k",
}
# timm's layer names inside a block of stage 0, which does not expand, and of the others.
PLAIN_BLOCK = {
    "conv_dw": "_depthwise_conv",
    "bn1": "_bn1",
    "conv_pw": "_project_conv",
    "bn2": "_bn2",
}
EXPANDING_BLOCK = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
STEM = {"conv_stem": "stem.0", "bn1": "stem.1"}
CLASSIFIER_PREFIXES = ("fc.", "conv_head.", "bn2.", "classifier.")


def load_imagenet_weights(encoder: nn.Module, backbone: str) -> None:
    """Load ImageNet weights into the encoder called `backbone`, in place.

    Raises FileNotFoundError if they are neither in the local cache nor to be downloaded, or if
    the package that provides them is not installed.
    """
    if backbone in RESNET_WEIGHTS:
        state = _torchvision_state(backbone)
    elif backbone in TIMM_NAMES:
        state = rename_timm(_timm_state(backbone))
    else:
        raise ValueError(
            f"there are no ImageNet weights for {backbone!r}, only for "
            f"{', '.join([*RESNET_WEIGHTS, *TIMM_NAMES])}; pass --pretrain-backbone no"
        )
    state = {name: value for name, value in state.items() if not _of_classifier(name)}
    encoder.load_state_dict(state)


def rename_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's EfficientNet-Lite state dict under the names of `EfficientNetLiteEncoder`.

    The classifier's entries keep their names.
    """
    return {_rename_timm_key(name): value for name, value in state.items()}


def _rename_timm_key(name: str) -> str:
    if name.startswith("blocks."):
        _, stage, block, layer, leaf = name.split(".")
        layers = PLAIN_BLOCK if stage == "0" else EXPANDING_BLOCK
        return f"blocks.{stage}.{block}.{layers[layer]}.{leaf}"
    layer, leaf = name.split(".")
    return f"{STEM.get(layer, layer)}.{leaf}"


def _of_classifier(name: str) -> bool:
    return name.startswith(CLASSIFIER_PREFIXES)


def _torchvision_state(backbone: str) -> dict[str, Tensor]:
    weights = RESNET_WEIGHTS[backbone]
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise FileNotFoundError(
            f"cannot get the ImageNet weights of {backbone} ({error}); connect to the internet, "
            f"or put {weights.url} at {file}, or {SCRATCH}"
        ) from error


def _timm_state(backbone: str) -> dict[str, Tensor]:
    timm = import_timm(f"loading the ImageNet weights of {backbone}", f", or {SCRATCH}")
    return create_pretrained(timm, TIMM_NAMES[backbone], backbone).state_dict()
