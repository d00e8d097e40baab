"""Which sample comes when: shuffled by (seed, epoch), split over ranks, resumable anywhere."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from dataloaders.base import derive_seed


class SampleKey(NamedTuple):
    """What a worker needs to make a sample; carries the epoch to persistent workers."""

    epoch: int
    index: int


class ResumableSampler(Sampler[SampleKey]):
    """Keys of one epoch, or of several in a row, for one rank.

    All ranks see one order of the whole data set and take every `world_size`-th sample of it, so a
    global batch holds the same samples for any number of ranks. With `shuffle` (training) the
    order is a function of (seed, epoch) and ends with the last whole `step`: the samples, over all
    ranks, that one optimiser step takes, by default one a rank. Without (validation) every sample
    occurs exactly once over all ranks, and their lengths may differ by one.

    Raises ValueError for an impossible rank or step, or a start outside the epoch.
    """

    def __init__(
        self,
        size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        step: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}; give 0 <= rank < world_size")
        step = world_size if step is None else step
        if step < 1 or step % world_size:
            raise ValueError(f"a step of {step} samples: give a multiple of {world_size} (ranks)")
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.stop = size - size % step if shuffle else size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0, epochs: int = 1) -> None:
        """Choose what the next `iter(loader)` goes through: `epochs` epochs from `epoch` on.

        Several in a row let workers prepare the next epoch while the present one is validated.
        `start` counts the samples of the first epoch, over all ranks, that were already used: steps
        done times the samples of a step. It is forgotten at the next call. No epochs: no samples.
        """
        if epoch < 0 or not 0 <= start <= self.size or start % self.world_size or epochs < 0:
            raise ValueError(
                f"cannot start epoch {epoch} at sample {start}: give an epoch of at least 0 and a "
                f"multiple of {self.world_size} (the ranks) up to {self.size} (the samples)"
            )
        self.epoch = epoch
        self.start = start
        self.epochs = epochs

    def __iter__(self) -> Iterator[SampleKey]:
        start = self.start
        for epoch in range(self.epoch, self.epoch + self.epochs):
            for index in self._order(epoch)[start + self.rank : self.stop : self.world_size]:
                yield SampleKey(epoch, index)
            start = 0

    def __len__(self) -> int:
        """Samples left for this rank in the chosen epochs."""
        first, others = (
            len(range(start + self.rank, self.stop, self.world_size)) for start in (self.start, 0)
        )
        return first + (self.epochs - 1) * others if self.epochs else 0

    def _order(self, epoch: int) -> range | list[int]:
        if not self.shuffle:
            return range(self.size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        return torch.randperm(self.size, generator=generator).tolist()
