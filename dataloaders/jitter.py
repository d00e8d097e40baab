"""Colour jitter on whole colour planes: torchvision's on PIL images in a third of the time.

Drawn numbers, their order and the arithmetic are those of ColorJitter on PIL images. Only
rounding differs: here once, at the end, there after each of the four changes and, for hue, to 256
hues and saturations.

Workers draw the numbers. The arithmetic may be left to the device (`jitter_cuda`): it takes two
thirds of the time of a CamVid sample.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

LUMA = (0.299, 0.587, 0.114)  # of ITU-R 601, as in PIL
NAMES = ("brightness", "contrast", "saturation", "hue")  # as ColorJitter numbers them
NOTHING = -1  # in the place of such a number
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
        return tv_tensors.Image(jittered(inpt.as_subclass(Tensor), _in_order(params)))


class DrawJitter(nn.Module):
    """Draws what ColourJitter draws and leaves the arithmetic to `to_network`.

    (image, label) -> (image, label, changes), with changes (4,2) float32: in the order of their
    turn the number of each change in NAMES and its factor. With `amount` 0 nothing is drawn and
    all numbers are NOTHING.
    """

    def __init__(self, amount: float, hue: float) -> None:
        super().__init__()
        self.jitter = ColourJitter(amount, hue) if amount else None

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.jitter is None:
            return image, label, torch.tensor([[NOTHING, 1.0]] * len(NAMES))
        # Factors are drawn in float32, so nothing is lost.
        return image, label, torch.tensor(_in_order(self.jitter.make_params([image])))


def _in_order(params: dict[str, Any]) -> list[tuple[int, float]]:
    return [(i, params[f"{NAMES[i]}_factor"]) for i in params["fn_idx"].tolist()]


def jittered(image: Tensor, changes: Sequence[tuple[float, float]]) -> Tensor:
    """(3,H,W) uint8 on the CPU -> the same, as separate planes; `changes` as of DrawJitter."""
    planes = list(image.float().contiguous())
    for number, factor in changes:
        if number != NOTHING:
            _CHANGES[int(number)](planes, factor)
    out = torch.empty(image.shape, dtype=torch.uint8)
    for target, plane in zip(out, planes):
        target.copy_(plane.add_(0.5))  # the copy cuts off, so this rounds
    return out


@functools.cache
def device_can_jitter(device: torch.device) -> bool:
    """Whether `to_network` can do the arithmetic on `device` in kernels, found out by trying: they
    take a CUDA device, Triton, and what Triton itself needs, such as a C compiler."""
    if device.type != "cuda":
        return False
    try:
        from dataloaders.jitter_cuda import jitter_and_normalise
    except ImportError:
        return False
    image = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=device)
    changes, one = torch.zeros(1, 4, 2, device=device), torch.ones(3, device=device)
    try:
        jitter_and_normalise(image, changes, one, one)
    except Exception as error:  # whatever Triton and the tools that it calls may raise
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"colour jitter stays in the data workers, as Triton cannot compile for {device}: "
            f"{type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return False
    return True


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
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


_CHANGES = (brightness, contrast, saturation, hue)
