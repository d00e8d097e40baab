"""Data sets and loaders of a run, from the command line."""

import os
from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataloaders import (
    SegmentationDataset,
    build_dataset,
    build_loader,
    device_can_jitter,
    find_dataset,
    train_transform,
    val_transform,
)
from dataloaders.cache import DecodedImages
from utils.memory import free_memory
from utils.ranks import ALONE, Ranks

VAL_TOGETHER = 4  # images that a worker hands over at a time in validation
CACHE_SHARE = 0.5  # of the free memory, at most, for what --cache-images auto keeps


def build_train_set(args: Namespace, device: torch.device | None = None) -> SegmentationDataset:
    """The training split with the published augmentation, of which `device`, where batches go,
    computes the colour jitter if it can.

    Raises what `build_dataset` raises, and ValueError where it does not fill one optimiser step.
    """
    crop = args.crop_res[0] if len(args.crop_res) == 1 else args.crop_res
    scale = (args.scale_min, args.scale_max)
    later = device is not None and device_can_jitter(device)
    settings = (args.res, crop, args.jitter, args.rotate, scale)
    transform = train_transform(*settings, as_bytes=True, jitter_later=later)
    dataset = build_dataset(args.dataset, "train", transform=transform, **_source(args, "train"))
    if len(dataset) < args.batch_size * args.accumulate:
        raise ValueError(
            f"{args.dataset}/train has {len(dataset)} images, fewer than one step takes "
            f"(--batch-size {args.batch_size} × --accumulate {args.accumulate}): lower them"
        )
    return dataset


def build_val_set(args: Namespace) -> SegmentationDataset:
    """The validation split: images at native size or --val-res wide, labels at native size; as
    bytes, for `to_network`, where a loader hands them on."""
    transform = val_transform(args.val_res or None, as_bytes=args.mode != "speed")
    return build_dataset(args.dataset, "val", transform=transform, **_source(args, "val"))


def build_calibration_set(args: Namespace) -> SegmentationDataset:
    """The split that --segblocks-calibrate names as validation sees it, as bytes, for `to_network`,
    and without augmentation."""
    transform = val_transform(args.val_res or None, as_bytes=True)
    split = args.segblocks_calibrate
    return build_dataset(args.dataset, split, transform=transform, **_source(args, split))


def train_loader(dataset: SegmentationDataset, args: Namespace, ranks: Ranks = ALONE) -> DataLoader:
    """Shuffled batches of this rank; call `loader.sampler.set_epoch` before each pass.

    Raises ValueError where the ranks cannot share a batch evenly.
    """
    size, rest = divmod(args.batch_size, ranks.count)
    if rest:
        raise ValueError(
            f"--batch-size {args.batch_size} is that of all {ranks.count} processes together: give "
            f"a multiple of {ranks.count}"
        )
    _keep_decoded(dataset, args, ranks)
    place = (ranks.rank, ranks.count, args.accumulate)
    return build_loader(dataset, size, True, workers(args, ranks), args.seed, *place)


def val_loader(dataset: SegmentationDataset, args: Namespace, ranks: Ranks = ALONE) -> DataLoader:
    """Every image once over all ranks, in order; see `one_by_one`."""
    if args.mode == "train":  # else each is used once
        _keep_decoded(dataset, args, ranks)
    place = (ranks.rank, ranks.count)
    return build_loader(dataset, VAL_TOGETHER, False, workers(args, ranks), args.seed, *place)


def one_by_one(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Images (1,3,H,W), labels (1,H,W) and indices of a validation loader: one at a time, so that
    no figure depends on a batch size. Workers hand over several, as each time takes the threads of
    the main process as long as a small image takes the GPU."""
    for images, labels, indices in loader:
        for image, label, index in zip(images, labels, indices.tolist()):
            yield image[None], label[None], index


def _keep_decoded(dataset: SegmentationDataset, args: Namespace, ranks: Ranks) -> None:
    """As --cache-images says; each rank keeps its own."""
    if args.cache_images == "no":
        return
    height, width = dataset.load(0)[1].shape
    needed = ranks.per_node * len(dataset) * DecodedImages.sample_bytes(height, width)
    if args.cache_images == "yes" or needed <= CACHE_SHARE * free_memory():
        dataset.keep_decoded()


def _source(args: Namespace, split: str) -> dict:
    return {"seed": args.seed} | find_dataset(args.dataset).options(args, split)


def workers(args: Namespace, ranks: Ranks = ALONE) -> int:
    """Not more processes on a node than cores: they would only wait for one another."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(args.num_workers, max(1, (cores or 1) // ranks.per_node))
