"""Batches from a data set, the same for any number of worker processes."""

import ctypes
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloaders.base import SegmentationDataset
from dataloaders.decode import DataError
from dataloaders.lending import LendingLoader, Slots
from dataloaders.sampler import ResumableSampler, SampleKey

Sample = tuple[Tensor, Tensor, int] | tuple[Tensor, Tensor, int, Tensor]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class _Keyed(Dataset):
    """Answers the sampler's keys, so that the epoch reaches workers that live through epochs."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample:
        image, label, *changes = self.dataset.sample(key.index, key.epoch)
        return image, label, key.index, *changes


def _collate(samples: list[Sample]) -> tuple[Tensor, ...]:
    images, labels, indices, *changes = zip(*samples)
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        raise DataError(
            f"images of sizes {sorted(sizes)} (height, width) cannot share a batch; use batch size "
            "1, or a transform that gives all of them one size"
        )
    rest = [torch.stack(one) for one in changes]
    return _stack(images), torch.stack(labels), torch.tensor(indices), *rest


def _collate_any(samples: list[Sample]) -> tuple[Tensor | list[Tensor], ...]:
    """The same for images of several sizes: lists of them and of their labels."""
    images, labels, indices = zip(*samples)
    if len({image.shape for image in images} | {(3, *label.shape) for label in labels}) == 1:
        return _collate(samples)
    return list(images), list(labels), torch.tensor(indices)


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Bytes with interleaved channels stay so: turned into planes they take ten times as long."""
    turned = [image.permute(1, 2, 0) for image in images]  # H,W,3
    if all(x.dtype == torch.uint8 and x.is_contiguous() for x in turned):
        return torch.stack(turned).permute(0, 3, 1, 2)
    return torch.stack(images)


def _settle_in(worker: int) -> None:
    """What a worker does first.

    It leaves the process group: a signal to the group (Ctrl-C, torchrun, `timeout`) asks training
    to save and stop, and training needs its data for the step that it is in. When training ends,
    however it does, its workers notice.

    It lets the C library reuse freed images. By default that gives memory of their size back to
    the system and asks for it again, page by page, which takes as long as the arithmetic.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, 1 << 30)
            mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # older versions of it refuse more


def start_workers(loader: DataLoader) -> None:
    """Begin the processes of a loader, which begin with the first pass over it otherwise. Call it
    before `set_epoch`."""
    if loader.num_workers:
        loader.sampler.set_epoch(0, epochs=0)  # what they prepare now the first pass would discard
        iter(loader)
        loader.sampler.set_epoch(0)


def stop_workers(loader: DataLoader) -> None:
    """End the processes of a loader; another pass over it starts new ones.

    They end with the loader, too, but where something keeps that until Python exits (a cycle of
    references is enough), PyTorch waits five seconds for each of them.
    """
    if loader.num_workers and loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def build_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    train: bool,
    num_workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
) -> DataLoader:
    """A loader of (images (N,3,H,W), labels (N,H,W), indices (N,) int64), with the dtypes of the
    data set's transform: float32 and int64, or uint8 for `to_network` to widen. Where the transform
    leaves colour jitter to `to_network`, a fourth tensor says which: (N,4,2) float32.

    Training shuffles by (seed, epoch) and ends with the last whole optimiser step, `accumulate`
    batches on every rank; validation keeps order and every sample, and images or labels of several
    sizes come as lists. `batch_size` is per rank. Call
    `loader.sampler.set_epoch(epoch, start)` before each pass over the loader; `start` resumes in
    the middle of an epoch (see ResumableSampler).
    Neither batches nor torch's global generators depend on `num_workers`.

    Raises ValueError for a batch size below 1 or, in training, above the images of one rank.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch size is {batch_size} and workers {num_workers}; give at least 1 and 0"
        )
    if train and len(dataset) < batch_size * world_size * accumulate:
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        times = f", {accumulate} times" if accumulate > 1 else ""
        raise ValueError(
            f"{dataset.info.name}/{dataset.split} has {len(dataset)} images, fewer than one "
            f"training batch of {batch_size}{ranks}{times}; use a smaller --batch-size or more "
            "images"
        )
    step = batch_size * accumulate * world_size if train else None
    sampler = ResumableSampler(len(dataset), train, seed, rank, world_size, step)
    forks = num_workers > 0 and sys.platform == "linux"
    options = {
        "batch_size": batch_size,
        "sampler": sampler,
        "drop_last": train,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": _settle_in,
        # Forked workers share what is kept in memory (DecodedImages).
        "multiprocessing_context": "fork" if forks else None,
        # Otherwise every pass would draw a number from the global generator.
        "generator": torch.Generator().manual_seed(seed),
    }
    slots = _slots(dataset, batch_size, num_workers) if train and forks else None
    if slots is not None:
        return LendingLoader(_Keyed(dataset), slots, **options)
    collate, pinned = _collate if train else _collate_any, torch.cuda.is_available()
    return DataLoader(_Keyed(dataset), collate_fn=collate, pin_memory=pinned, **options)


def _slots(dataset: SegmentationDataset, batch_size: int, workers: int) -> Slots | None:
    """None where the first sample is damaged, which is to be told when its turn comes."""
    try:
        sample = dataset.sample(0)
    except (DataError, OSError):
        return None
    return Slots(sample, batch_size, workers, _collate)
