"""Training batches in memory that a loader's workers share with their main process."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dataloaders.cache import shared_bytes

Batch = tuple[Tensor, ...]  # images, labels, indices, and what else the transform returns
Collate = Callable[[list[tuple]], Batch]

PREFETCH = 2  # batches that a worker makes ahead
# Those, and the one that the main process reads.
_SLOTS = PREFETCH + 1
_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class _Part:
    """Where in a slot the samples' images, labels or changes are."""

    shape: torch.Size  # of one sample
    dtype: torch.dtype
    interleaved: bool  # (3,H,W) as H,W,3
    start: int
    end: int

    def of(self, slot: Tensor) -> Tensor:
        """(N,*shape) in the bytes of `slot`."""
        part = slot[self.start : self.end].view(self.dtype)
        if not self.interleaved:
            return part.view(-1, *self.shape)
        channels, *size = self.shape
        return part.view(-1, *size, channels).movedim(-1, 1)

    def fits(self, samples: Sequence[Tensor]) -> bool:
        return all(x.shape == self.shape and x.dtype == self.dtype for x in samples)


@dataclass(frozen=True)
class _Filled:
    """What a worker hands over in place of a batch."""

    worker: int
    slot: int
    indices: tuple[int, ...]


class Slots:
    """Memory for the batches of each worker, who fills its slots in turn.

    Args:
        sample: image (3,H,W), label (H,W) and what else a transform returns; samples of other
            shapes or dtypes go by `collate`.
        batch_size, workers: of the loader.
        collate: samples → batch.
    """

    def __init__(self, sample: Sequence[Tensor], batch_size: int, workers: int, collate: Collate):
        self._collate, self._batch_size, self._filled = collate, batch_size, 0
        parts, end = [], 0
        for x in sample:
            size = batch_size * x.nbytes
            # Bytes with interleaved channels stay so: as planes they take ten times as long.
            interleaved = x.ndim == 3 and x.dtype == torch.uint8
            parts.append(_Part(x.shape, x.dtype, interleaved, end, end + size))
            end += -(-size // _ALIGNED) * _ALIGNED
        self._parts = parts
        shape = (workers, _SLOTS, end)
        self._memory = shared_bytes(prod(shape)).view(shape)
        self._pinned: weakref.finalize | None = None  # ends it

    def fill(self, samples: list[tuple]) -> _Filled | Batch:
        """In a worker: put samples, each of them (image, label, index, *changes), into its next
        slot."""
        images, labels, indices, *changes = zip(*samples)
        kinds = (images, labels, *changes)
        fitting = [part.fits(kind) for part, kind in zip(self._parts, kinds)]
        as_the_first = len(kinds) == len(self._parts) and all(fitting)
        if len(samples) != self._batch_size or not as_the_first:
            return self._collate(samples)
        worker, slot = get_worker_info().id, self._filled % _SLOTS
        self._filled += 1
        for part, kind in zip(self._parts, kinds):
            for sample, there in zip(kind, part.of(self._memory[worker, slot])):
                there.copy_(sample)
        return _Filled(worker, slot, indices)

    def read(self, batch: _Filled | Batch) -> Batch:
        """In the main process: the batch, in the memory of its slot."""
        if not isinstance(batch, _Filled):
            return batch
        slot = self._memory[batch.worker, batch.slot]
        images, labels, *changes = (part.of(slot) for part in self._parts)
        return images, labels, torch.tensor(batch.indices), *changes

    def copy(self, batch: _Filled | Batch) -> Batch:
        """The same in memory of its own."""
        return tuple(x.clone() for x in self.read(batch))

    def pin(self) -> None:
        """Let CUDA copy from the slots without waiting, where the system allows it."""
        if self._pinned is not None:
            return
        cudart, start = torch.cuda.cudart(), self._memory.data_ptr()
        if int(cudart.cudaHostRegister(start, self._memory.nbytes, 0)) == 0:
            self._pinned = weakref.finalize(self, _unpin, self._memory)
        else:
            with suppress(RuntimeError):  # CUDA tells of the failure again, to whoever asks next
                torch.zeros(1, device="cuda")


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class LendingLoader(DataLoader):
    """A loader whose workers fill the same memory over and over.

    DataLoader itself hands over new memory with every batch. The system gives it to the worker page
    by page and takes it back from the main process page by page, which copies it to pinned memory
    in between: 5 ms for 6 MB, in the process that has steps to launch.

    Iterating gives batches in memory of their own, as with any loader; `lend` does not copy.
    Workers have to be forked.
    """

    def __init__(self, dataset: Dataset, slots: Slots, **options: Any):
        super().__init__(dataset, collate_fn=slots.fill, prefetch_factor=PREFETCH, **options)
        self.slots = slots

    def __iter__(self) -> Iterator[Batch]:
        return map(self.slots.copy, super().__iter__())

    def lend(self) -> Iterator[Batch]:
        """Batches in memory that is pinned where the system allows it, each to be read until the
        next one is asked for, or another pass begins. Only with CUDA."""
        batches = super().__iter__()
        self.slots.pin()  # while workers begin: that touches all of it
        return map(self.slots.read, batches)
