"""Batches from a data set, the same for any number of worker processes."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloaders.base import SegmentationDataset
from dataloaders.decode import DataError
from dataloaders.sampler import ResumableSampler, SampleKey

Sample = tuple[Tensor, Tensor, int]


class _Keyed(Dataset):
    """Answers the sampler's keys, so that the epoch reaches workers that live through epochs."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample:
        image, label = self.dataset.sample(key.index, key.epoch)
        return image, label, key.index


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    images, labels, indices = zip(*samples)
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        raise DataError(
            f"images of sizes {sorted(sizes)} (height, width) cannot share a batch; use batch size "
            "1, or a transform that gives all of them one size"
        )
    return torch.stack(images), torch.stack(labels), torch.tensor(indices)


def build_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    train: bool,
    num_workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """A loader of (images (N,3,H,W) float32, labels (N,H,W) int64, indices (N,) int64).

    Training shuffles by (seed, epoch) and drops the last incomplete batch; validation keeps order
    and every sample. `batch_size` is per rank. Call `loader.sampler.set_epoch(epoch, start)` before
    each pass over the loader; `start` resumes in the middle of an epoch (see ResumableSampler).
    Neither batches nor torch's global generators depend on `num_workers`.

    Raises ValueError for a batch size below 1 or, in training, above the images of one rank.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch size is {batch_size} and workers {num_workers}; give at least 1 and 0"
        )
    if train and len(dataset) < batch_size * world_size:
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        raise ValueError(
            f"{dataset.info.name}/{dataset.split} has {len(dataset)} images, fewer than one "
            f"training batch of {batch_size}{ranks}; use a smaller --batch-size or more images"
        )
    sampler = ResumableSampler(len(dataset), train, seed, rank, world_size)
    return DataLoader(
        _Keyed(dataset),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=num_workers,
        collate_fn=_collate,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        pin_memory=torch.cuda.is_available(),
        # Otherwise every pass would draw a number from the global generator.
        generator=torch.Generator().manual_seed(seed),
    )
