"""Data sets by name."""

import os
from collections.abc import Callable
from typing import Any

from dataloaders.base import SegmentationDataset, Transform
from dataloaders.camvid import CamVid
from dataloaders.cityscapes import Cityscapes
from dataloaders.synthetic import SyntheticStreets

DATASETS: dict[str, Callable[..., SegmentationDataset]] = {
    "cityscapes": Cityscapes,
    "camvid": CamVid,
    "synthetic": SyntheticStreets,
}


def build_dataset(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    transform: Transform | None = None,
    seed: int = 0,
    **options: Any,
) -> SegmentationDataset:
    """Build a data set of the registry.

    `data_dir` is the folder of a data set made of files; without it, the data set's environment
    variable counts. `seed` is that of the augmentation. `options` go to the data set itself, for
    instance height, width, length and scene_seed of "synthetic".

    Raises ValueError for an unknown name or split, FileNotFoundError for missing files.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    return DATASETS[name](split, data_dir=data_dir, transform=transform, seed=seed, **options)
