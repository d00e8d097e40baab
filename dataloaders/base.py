"""What every data set has in common: names, sizes, and augmentation that repeats."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from dataloaders.cache import DecodedImages
from dataloaders.info import DatasetInfo

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, ...]]


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several non-negative integers, without collisions in practice."""
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class SegmentationDataset(Dataset):
    """Images with one label per pixel; subclasses give `info`, `splits`, `load`, `name_of`.

    `dataset[i]` is `dataset.sample(i, epoch=0)`: what `transform(image, label)` returns, or,
    without a transform, the undecorated image (tv_tensors.Image, (3,H,W) uint8) and label
    (tv_tensors.Mask, (H,W) uint8, class id or 255).

    The random numbers of the transform are a function of (seed, epoch, index) only. The epoch is
    an argument, not a state of the data set: persistent workers hold copies of it that would never
    hear of a change. `build_loader` passes the epoch along with every index.

    Raises ValueError for a split that the data set does not have, or a negative seed.
    """

    info: DatasetInfo
    splits: tuple[str, ...]

    def __init__(self, split: str, transform: Transform | None = None, seed: int = 0) -> None:
        if split not in self.splits:
            raise ValueError(
                f"{self.info.name} has no split {split!r}; choose from {', '.join(self.splits)}"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}; give an integer of at least 0")
        self.split = split
        self.transform = transform
        self.seed = seed
        self.decoded: DecodedImages | None = None

    @classmethod
    def options(cls, args: Namespace, split: str) -> dict[str, Any]:
        """What a command line says of this data set, as keyword arguments of its constructor."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def keep_decoded(self) -> None:
        """Load every sample once and keep it in memory (see DecodedImages)."""
        label = self.load(0)[1]
        self.decoded = DecodedImages(len(self), *label.shape)

    def load(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image (3,H,W) uint8 and label (H,W) uint8 of one sample, before any transform."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """What to call a sample in messages and pictures: its image file or a made-up path."""
        raise NotImplementedError

    def sample(self, index: int, epoch: int = 0) -> tuple[Tensor, ...]:
        """The transformed image and label of sample `index` in `epoch`.

        Raises IndexError outside 0..len-1, and DataError (a ValueError) naming a bad file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.info.name}/{self.split} has no sample {index} of {len(self)}")
        image, label = self.decoded.get(index, self.load) if self.decoded else self.load(index)
        if self.transform is None:
            return image, label
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would reseed the GPU too, where a policy may be drawing.
            torch.default_generator.manual_seed(derive_seed(self.seed, epoch, index))
            return self.transform(image, label)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.sample(index)
