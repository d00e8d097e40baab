"""Data sets by name."""

import os
from typing import Any

from dataloaders.base import SegmentationDataset, Transform
from dataloaders.camvid import CamVid
from dataloaders.camvid_full import CamVidFull
from dataloaders.cityscapes import Cityscapes
from dataloaders.custom import Custom
from dataloaders.files import PairedFiles
from dataloaders.mapillary import Mapillary
from dataloaders.synthetic import SyntheticStreets

# A new data set is a module and a line here: its flag, its environment variable, the names that
# --dataset accepts and the check of `dataloaders.check` follow.
DATASETS: dict[str, type[SegmentationDataset]] = {
    "cityscapes": Cityscapes,
    "camvid": CamVid,
    "camvid_full": CamVidFull,
    "mapillary": Mapillary,
    "custom": Custom,
    "synthetic": SyntheticStreets,
}


def find_dataset(name: str) -> type[SegmentationDataset]:
    """The data set's class. Raises ValueError for an unknown name."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    return DATASETS[name]


def file_datasets() -> dict[str, type[PairedFiles]]:
    """Those of the registry that are read from a folder."""
    return {name: kind for name, kind in DATASETS.items() if issubclass(kind, PairedFiles)}


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
    return find_dataset(name)(split, data_dir=data_dir, transform=transform, seed=seed, **options)
