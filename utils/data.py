"""Data sets and loaders of a run, from the command line."""

import os
from argparse import Namespace

from torch.utils.data import DataLoader

from dataloaders import (
    SegmentationDataset,
    build_dataset,
    build_loader,
    find_dataset,
    train_transform,
    val_transform,
)


def build_train_set(args: Namespace) -> SegmentationDataset:
    """The training split with the published augmentation.

    Raises what `build_dataset` raises, and ValueError where it does not fill one optimiser step.
    """
    crop = args.crop_res[0] if len(args.crop_res) == 1 else args.crop_res
    scale = (args.scale_min, args.scale_max)
    transform = train_transform(args.res, crop, args.jitter, args.rotate, scale)
    dataset = build_dataset(args.dataset, "train", transform=transform, **_source(args, "train"))
    if len(dataset) < args.batch_size * args.accumulate:
        raise ValueError(
            f"{args.dataset}/train has {len(dataset)} images, fewer than one step takes "
            f"(--batch-size {args.batch_size} × --accumulate {args.accumulate}): lower them"
        )
    return dataset


def build_val_set(args: Namespace) -> SegmentationDataset:
    """The validation split: images at native size or --val-res wide, labels at native size."""
    transform = val_transform(args.val_res or None)
    return build_dataset(args.dataset, "val", transform=transform, **_source(args, "val"))


def train_loader(dataset: SegmentationDataset, args: Namespace) -> DataLoader:
    """Shuffled batches; call `loader.sampler.set_epoch` before each pass."""
    return build_loader(dataset, args.batch_size, True, workers(args), args.seed)


def val_loader(dataset: SegmentationDataset, args: Namespace) -> DataLoader:
    """Every image once, in order, one at a time, so that no figure depends on a batch size."""
    return build_loader(dataset, 1, False, workers(args), args.seed)


def _source(args: Namespace, split: str) -> dict:
    return {"seed": args.seed} | find_dataset(args.dataset).options(args, split)


def workers(args: Namespace) -> int:
    """Not more processes than cores: they would only wait for one another."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(args.num_workers, cores or 1)
