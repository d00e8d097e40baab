"""The one joint image/label pipeline, on torchvision v2 transforms.

Every random number comes from torch's global CPU generator, which the data set seeds per sample.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from dataloaders.info import IGNORE_INDEX
from dataloaders.jitter import ColourJitter, DrawJitter
from dataloaders.normalise import MEAN, STD

_FILL = {tv_tensors.Image: [round(255 * m) for m in MEAN], tv_tensors.Mask: IGNORE_INDEX}
_HUE = 0.1


def _resize(inpt: Any, size: tuple[int, int]) -> Any:
    """Bicubic with antialiasing for images, nearest for labels."""
    if not isinstance(inpt, tv_tensors.Mask):
        return F.resize(inpt, list(size), InterpolationMode.BICUBIC, antialias=True)
    # What torch calls nearest-exact: plain "nearest" would shift labels by half a pixel against
    # their image. NumPy takes rows and columns in half the time of torch's own; few rows first.
    rows, columns = (_nearest(n, old) for n, old in zip(size, inpt.shape))
    ids = inpt.as_subclass(Tensor).numpy()  # H,W
    if len(rows) < len(ids):
        ids = ids.take(rows, 0).take(columns, 1)
    else:
        ids = ids.take(columns, 1).take(rows, 0)
    return tv_tensors.Mask(torch.from_numpy(ids))


def _nearest(size: int, old: int) -> np.ndarray:
    """Of each of `size` pixels in a row, the one of `old` whose centre is nearest, (size,) int64,
    in the float32 arithmetic of torch."""
    scale = np.float32(old) / np.float32(size)
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale
    return np.minimum(centres.astype(np.int64), old - 1)


def _extend(inpt: Any, height: int, width: int) -> Any:
    """Put an image or label at the top left of a canvas, of the mean colour or void where larger.

    Images are copied, to interleaved channels without gaps: those resize two to four times faster
    than separate planes, as of F.pad, or than a part of a larger image.
    """
    h, w = inpt.shape[-2:]
    if isinstance(inpt, tv_tensors.Mask):
        same = (h, w) == (height, width)
        return inpt if same else F.pad(inpt, [0, 0, width - w, height - h], fill=IGNORE_INDEX)
    canvas = torch.empty(height, width, 3, dtype=torch.uint8)
    rows = canvas.flatten(1)  # one by one, pixels take ten times as long to fill
    row = torch.tensor(_FILL[tv_tensors.Image], dtype=torch.uint8).repeat(width)
    rows[:h, 3 * w :] = row[3 * w :]
    rows[h:] = row
    canvas = canvas.permute(2, 0, 1)  # 3,H,W
    canvas[:, :h, :w] = inpt
    return tv_tensors.Image(canvas)


def _image_size(flat_inputs: list[Any]) -> tuple[int, int]:
    image = next(x for x in flat_inputs if isinstance(x, tv_tensors.Image))
    return image.shape[-2], image.shape[-1]


class ResizeWidth(v2.Transform):
    """Resize image and, unless `labels` is False, label to a width, keeping the aspect ratio:
    (res/2, res) for 2:1 images."""

    def __init__(self, width: int, labels: bool = True) -> None:
        super().__init__()
        self.width = width
        self.labels = labels

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        h, w = _image_size(flat_inputs)
        return {"size": (max(1, round(h * self.width / w)), self.width), "same": w == self.width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params["same"] or (isinstance(inpt, tv_tensors.Mask) and not self.labels):
            return inpt
        return _resize(inpt, params["size"])


class RandomCropScale(v2.Transform):
    """Crop a box of int(s * size) pixels, s ~ U(scale), and resize it to `size`: a zoom of 1/s.

    The position is uniform. Along an axis where the box is larger than the image, the image sits
    at the start and the rest is the mean colour, labelled void.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]) -> None:
        super().__init__()
        self.size = size
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        s = torch.empty(()).uniform_(*self.scale).item()
        u = torch.rand(2).tolist()
        box = tuple(max(1, int(s * side)) for side in self.size)
        room = [max(0, side - b) for side, b in zip(_image_size(flat_inputs), box)]
        start = tuple(int(u_i * (r + 1)) for u_i, r in zip(u, room))  # uniform over 0..room
        return {"box": box, "start": start}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        (bh, bw), (top, left) = params["box"], params["start"]
        h, w = inpt.shape[-2:]
        inpt = F.crop(inpt, top, left, min(bh, h), min(bw, w))
        inpt = _extend(inpt, bh, bw)
        return _resize(inpt, self.size) if (bh, bw) != self.size else inpt


def _to_tensors() -> list[v2.Transform]:
    """uint8 image -> normalised float32, label -> int64, both plain contiguous tensors."""
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]


def train_transform(
    res: int,
    crop_res: int | tuple[int, int],
    jitter: float = 0.0,
    rotate: float = 0.0,
    scale: tuple[float, float] = (0.5, 2.0),
    as_bytes: bool = False,
    jitter_later: bool = False,
) -> v2.Transform:
    """The published augmentation, in the published order.

    1. Resize so that the width is `res` pixels, keeping the aspect ratio (for Cityscapes this is
       the published (res/2, res)). 2. Rotate by ±`rotate` degrees; 0 skips it. 3. Crop and scale
    to `crop_res` pixels (one number for a square, or height and width) by s ~ U(`scale`), see
    RandomCropScale. 4. Colour jitter: brightness, contrast and saturation ±`jitter`, hue ±0.1;
    jitter 0 switches all of it off. 5. Horizontal flip, one half. 6. To float and normalise.

    Returns a callable: (tv_tensors.Image (3,H,W) uint8, tv_tensors.Mask (H,W) uint8) ->
    ((3,crop_h,crop_w) float32, (crop_h,crop_w) int64). `as_bytes` leaves the sixth step to
    `to_network` and returns both as uint8: a fifth of the bytes to hand from worker to device.
    `jitter_later` leaves the arithmetic of the fourth to it too, which changes nothing about what
    is drawn: both as uint8, and the drawn changes (4,2) float32 (see DrawJitter).
    Raises ValueError for sizes, jitter, rotation or scales out of range.
    """
    crop = (crop_res, crop_res) if isinstance(crop_res, int) else tuple(crop_res)
    if res < 1 or len(crop) != 2 or min(crop) < 1:
        raise ValueError(
            f"res is {res} and crop_res {crop_res}; give sizes of at least 1 pixel, "
            "crop_res as one number or (height, width)"
        )
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter is {jitter}; give a value from 0 (off) to 1")
    if not 0 <= rotate <= 180:
        raise ValueError(f"rotate is {rotate}; give degrees from 0 (off) to 180")
    if not (len(scale) == 2 and 0 < scale[0] <= scale[1] and math.isfinite(scale[1])):
        raise ValueError(f"scale is {scale}; give (smallest, largest) with 0 < smallest <= largest")
    steps: list[v2.Transform] = [ResizeWidth(res)]
    if rotate:
        steps.append(v2.RandomRotation(rotate, InterpolationMode.BILINEAR, fill=dict(_FILL)))
    steps.append(RandomCropScale(crop, scale))
    if jitter_later:
        steps.append(DrawJitter(jitter, _HUE))
    elif jitter:
        steps.append(ColourJitter(jitter, _HUE))
    steps.append(v2.RandomHorizontalFlip(0.5))
    bytes_ = as_bytes or jitter_later
    return v2.Compose(steps + ([v2.ToPureTensor()] if bytes_ else _to_tensors()))


def val_transform(width: int | None = None, as_bytes: bool = False) -> v2.Transform:
    """No augmentation: only to float, normalised, and int64 labels; `as_bytes` leaves that to
    `to_network`, as in training.

    With `width` the image, but not its label, is resized to that width, aspect ratio kept: labels
    stay at native size, where scores are taken. Raises ValueError for a width below 1.
    """
    if width is not None and width < 1:
        raise ValueError(f"width is {width}; give at least 1 pixel")
    resize = [] if width is None else [ResizeWidth(width, labels=False)]
    return v2.Compose(resize + ([v2.ToPureTensor()] if as_bytes else _to_tensors()))
