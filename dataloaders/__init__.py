"""Data sets, their joint transforms, and the loader that feeds them to a network."""

from dataloaders.base import SegmentationDataset
from dataloaders.decode import DataError
from dataloaders.info import DatasetInfo
from dataloaders.jitter import device_can_jitter
from dataloaders.loader import build_loader, start_workers, stop_workers
from dataloaders.normalise import denormalise, to_network
from dataloaders.registry import DATASETS, build_dataset, file_datasets, find_dataset
from dataloaders.sampler import ResumableSampler
from dataloaders.transforms import train_transform, val_transform

__all__ = [
    "DATASETS",
    "DataError",
    "DatasetInfo",
    "ResumableSampler",
    "SegmentationDataset",
    "build_dataset",
    "build_loader",
    "denormalise",
    "device_can_jitter",
    "file_datasets",
    "find_dataset",
    "start_workers",
    "stop_workers",
    "to_network",
    "train_transform",
    "val_transform",
]
