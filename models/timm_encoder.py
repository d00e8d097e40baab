"""Any timm network with features at strides 4, 8, 16 and 32 as an encoder. timm is optional."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)
PROBE_SIDE = 64  # pixels: two at the deepest features
SCRATCH = "start from scratch with --pretrain-backbone no"


class TimmEncoder(nn.Module):
    """timm's network called `name`, with timm's own batch norm settings.

    (N,3,H,W) -> features at strides 4, 8, 16 and 32, the last that the network has at each.
    `channels` holds their channel counts. `pretrained` loads timm's weights.

    Raises ValueError for a name that timm does not know and for a network without such features,
    FileNotFoundError if timm is not installed or its weights cannot be had.
    """

    def __init__(self, name: str, pretrained: bool = False):
        super().__init__()
        info = _features_of(name).feature_info
        reductions = info.reduction()
        if not set(STRIDES) <= set(reductions):
            raise ValueError(
                f"timm's {name!r} has features at strides {_listed(reductions)}; SwiftNet reads "
                f"strides {_listed(STRIDES)}: choose another --backbone"
            )
        last = {stride: place for place, stride in enumerate(reductions)}
        read = [info.out_indices[last[stride]] for stride in STRIDES]
        self.body = _features_of(name, pretrained, out_indices=tuple(read))
        self.channels = tuple(self.body.feature_info.channels())
        self._probe(name)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body(image))

    @torch.no_grad()
    def _probe(self, name: str) -> None:
        """Raise ValueError unless a small image gives features of the promised shapes."""
        image = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, device=next(self.parameters()).device)
        training = self.training
        try:
            shapes = [tuple(x.shape) for x in self.eval()(image)]
        except (AssertionError, RuntimeError, ValueError) as error:  # networks of one image size
            reason = str(error).split("\n", 1)[0]
            raise ValueError(
                f"timm's {name!r} does not take images of any size ({reason}): choose another "
                "--backbone"
            ) from error
        self.train(training)
        sides = [PROBE_SIDE // stride for stride in STRIDES]
        if shapes != [(1, c, side, side) for c, side in zip(self.channels, sides)]:
            raise ValueError(
                f"timm's {name!r} makes features {_listed(shapes)} of a {PROBE_SIDE}×{PROBE_SIDE} "
                f"image, not N,C,H,W at strides {_listed(STRIDES)}: choose another --backbone"
            )


def import_timm(what: str, otherwise: str = "") -> ModuleType:
    """timm, or FileNotFoundError that says `what` needs it, how to install it, and `otherwise`."""
    try:
        import timm
    except ImportError as error:
        raise FileNotFoundError(
            f"{what} needs the package timm, which is not installed; run `pip install timm`"
            f"{otherwise}"
        ) from error
    return timm


def create_pretrained(timm: ModuleType, name: str, whose: str, **options: Any) -> nn.Module:
    """A timm network with its weights, from the local cache or downloaded.

    Raises FileNotFoundError, which speaks of the weights of `whose`, if they cannot be had.
    """
    try:
        return timm.create_model(name, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise FileNotFoundError(
            f"timm cannot get the ImageNet weights of {whose} ({reason}); connect to the internet, "
            f"or {SCRATCH}"
        ) from error


def _features_of(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's feature extractor."""
    timm = import_timm(f"--backbone timm:{name}")
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        hint = f"; similar: {_listed(similar)}" if similar else ""
        raise ValueError(f"timm {timm.__version__} has no network {name!r}{hint}")
    options |= {"features_only": True}
    if pretrained:
        return create_pretrained(timm, name, f"timm:{name}", **options)
    try:
        return timm.create_model(name, **options)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        # Said in different ways by networks that cannot give features.
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"timm gives no features of {name!r} ({reason})") from error


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
