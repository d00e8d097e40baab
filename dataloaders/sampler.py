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
    """Keys of one epoch for one rank.

    All ranks see one order of the whole data set and take every `world_size`-th sample of it, so a
    global batch holds the same samples for any number of ranks. With `shuffle` (training) the
    order is a function of (seed, epoch) and the tail that does not divide among the ranks is left
    out, so that ranks make equally many steps. Without (validation) every sample occurs exactly
    once over all ranks, and their lengths may differ by one.

    Raises ValueError for an impossible rank or a start outside the epoch.
    """

    def __init__(
        self, size: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}; give 0 <= rank < world_size")
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch to iterate next; call it before every `iter(loader)`.

        `start` counts the samples of this epoch, over all ranks, that were already used: steps
        done times the global batch size. It is forgotten at the next call.
        """
        if epoch < 0 or not 0 <= start <= self.size or start % self.world_size:
            raise ValueError(
                f"cannot start epoch {epoch} at sample {start}: give an epoch of at least 0 and a "
                f"multiple of {self.world_size} (the ranks) up to {self.size} (the samples)"
            )
        self.epoch = epoch
        self.start = start

    def _indices(self) -> range | list[int]:
        if not self.shuffle:
            return range(self.start + self.rank, self.size, self.world_size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        stop = self.size - self.size % self.world_size
        return order[self.start + self.rank : stop : self.world_size]

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(self.epoch, index) for index in self._indices())

    def __len__(self) -> int:
        """Samples left for this rank in the chosen epoch."""
        stop = self.size - (self.size % self.world_size if self.shuffle else 0)
        return len(range(self.start + self.rank, stop, self.world_size))
