"""Synthetic street scenes: the 19 Cityscapes classes, drawn procedurally, without any file."""

import os
from argparse import Namespace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torchvision import tv_tensors

from dataloaders.base import SegmentationDataset, Transform
from dataloaders.info import CITYSCAPES, DatasetInfo
from dataloaders.streets import compose

_INFO = DatasetInfo("synthetic", CITYSCAPES.classes, CITYSCAPES.colours, CITYSCAPES.small_classes)
_LENGTH = {"train": 2000, "val": 200}
_MIN_SIDE = 32  # pixels; below this nothing small is left of a street

# Strength of the surface texture, in grey levels, by class id; 0 for things.
_ROUGH = {"road": 7, "sidewalk": 9, "building": 9, "wall": 8, "vegetation": 34, "terrain": 18}
_ROUGHNESS = np.array([_ROUGH.get(name, 0) for name in _INFO.classes] + [0] * 237, dtype=np.int16)


# Sensor noise by random byte: 256 quantiles of a normal distribution of 2.5 grey levels.
_NOISE = np.array([round(NormalDist(0, 2.5).inv_cdf((i + 0.5) / 256)) for i in range(256)], np.int8)


def _field(rng: Generator, rows: int, height: int, width: int) -> np.ndarray:
    """(H,W) uint8: random values on `rows` rows, interpolated to the picture."""
    columns = max(2, round(rows * width / height))
    coarse = Image.fromarray(rng.integers(0, 256, (rows, columns), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))


def _photograph(rng: Generator, clean: Image.Image, label: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8: the drawing with uneven light, rough surfaces and sensor noise."""
    width, height = clean.size
    tone = _field(rng, 72, height, width).astype(np.int16) - 128
    tone *= np.take(_ROUGHNESS, label)
    tone >>= 7
    tone += _field(rng, 4, height, width) >> 4
    tone += np.take(_NOISE, np.frombuffer(rng.bytes(label.size), np.uint8)).reshape(label.shape)
    tone -= 8  # the mean of the slow part
    pixels = np.empty((height, width, 3), np.uint8)
    for i, channel in enumerate(clean.split()):  # broadcasting over the last axis is slow
        pixels[..., i] = np.clip(tone + np.asarray(channel), 0, 255)
    return pixels


class SyntheticStreets(SegmentationDataset):
    """Street scenes in perspective: plain road, sky, walls, and small detail along the kerbs.

    Sample `index` is a function of (scene_seed, split, index), and its layout does not depend on
    the resolution. There is no folder: `data_dir` must be None. `length` is the number of scenes,
    by default 2000 for train and 200 for val; `seed` is that of the augmentation.

    Raises ValueError for a split, size, length or seed out of range, or a data_dir.
    """

    info = _INFO
    splits = ("train", "val")

    def __init__(
        self,
        split: str,
        data_dir: str | os.PathLike | None = None,
        transform: Transform | None = None,
        seed: int = 0,
        height: int = 512,
        width: int = 1024,
        length: int | None = None,
        scene_seed: int = 0,
    ) -> None:
        super().__init__(split, transform, seed)
        if data_dir is not None:
            raise ValueError(f"synthetic scenes are not read from a folder; drop {data_dir}")
        if min(height, width) < _MIN_SIDE:
            raise ValueError(
                f"scenes of {height}x{width} (height x width) are too small; "
                f"give at least {_MIN_SIDE} pixels each"
            )
        if length is not None and length < 1:
            raise ValueError(f"a data set of {length} scenes is empty; give a length of at least 1")
        if scene_seed < 0:
            raise ValueError(f"scene seed is {scene_seed}; give an integer of at least 0")
        self.height = height
        self.width = width
        self.length = _LENGTH[split] if length is None else length
        self.scene_seed = scene_seed

    @classmethod
    def options(cls, args: Namespace, split: str) -> dict[str, Any]:
        height, width = args.synthetic_size
        length = getattr(args, f"synthetic_{split}_images", None)  # no such flag: no such split
        return {"height": height, "width": width, "length": length}

    def __len__(self) -> int:
        return self.length

    def name_of(self, index: int) -> str:
        return f"synthetic/{self.split}/{index:06d}"

    def load(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        rng = np.random.default_rng((self.scene_seed, self.splits.index(self.split), index))
        painter = compose(rng, self.height, self.width)
        label = np.array(painter.label)
        pixels = torch.from_numpy(_photograph(rng, painter.image, label))  # H,W,3
        image = tv_tensors.Image(pixels.permute(2, 0, 1))  # 3,H,W
        return image, tv_tensors.Mask(torch.from_numpy(label))
