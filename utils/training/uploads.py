"""Training batches on their way to the device."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dataloaders.lending import LendingLoader

Uploaded = tuple[tuple[Tensor, ...], Tensor]  # what a step computes with; the samples' indices


class Uploads(Iterator[Uploaded]):
    """Batches of a training loader on `device`, each as `(image, label, *changes), index`; the
    index stays on the host.

    `ahead` begins to copy the next batch, beside what the device is doing: between two steps it has
    nothing to wait for then.
    """

    def __init__(self, batches: Iterable, device: torch.device):
        self.device, self._stream = device, None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            if isinstance(batches, LendingLoader):
                batches = batches.lend()
        self._batches = iter(batches)
        self._copied: torch.cuda.Event | None = None  # the last batch
        self._waiting: Uploaded | None = None

    def ahead(self) -> None:
        """Fetch the next batch, if there is one and it is not fetched yet."""
        if self._waiting is not None:
            return
        if self._copied is not None:
            self._copied.synchronize()  # it is only lent
        batch = next(self._batches, None)
        if batch is None:
            return
        image, label, index, *changes = batch
        with torch.cuda.stream(self._stream):  # None: nothing
            copies = (x.to(self.device, non_blocking=True) for x in (image, label, *changes))
            self._waiting = tuple(copies), index
            if self._stream is not None:
                self._copied = self._stream.record_event()

    def __next__(self) -> Uploaded:
        self.ahead()
        if self._waiting is None:
            raise StopIteration
        (tensors, index), self._waiting = self._waiting, None
        if self._stream is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self._stream)
            for tensor in tensors:  # whose memory is the other stream's
                tensor.record_stream(here)
        return tensors, index
