"""Decoded images in memory, shared by every worker of a process."""

import mmap
from collections.abc import Callable

import torch
from torchvision import tv_tensors

Pair = tuple[tv_tensors.Image, tv_tensors.Mask]


def shared_bytes(n: int) -> torch.Tensor:
    """(n,) uint8 that forked workers share with this process, zeros at first. The system gives it
    page by page as it is written to, and no /dev/shm can be too small for it."""
    return torch.frombuffer(mmap.mmap(-1, n), dtype=torch.uint8)


class DecodedImages:
    """Keeps what `load(index)` returned, for samples of one size; others are loaded every time.

    The memory is anonymous and shared, so workers forked from this process fill it together, and
    nothing is taken from the system until a sample is there. A copy sent to a process that was not
    forked starts empty. What `get` returns is the memory itself: not to be written to.
    """

    def __init__(self, samples: int, height: int, width: int) -> None:
        self.samples, self.height, self.width = samples, height, width
        sizes = [samples * n for n in (3 * height * width, height * width, 1)]
        parts = shared_bytes(sum(sizes)).split(sizes)
        # Channels interleaved, as images arrive: crops and resizes are fastest on that.
        self._images = parts[0].view(samples, height, width, 3)
        self._labels = parts[1].view(samples, height, width)
        self._there = parts[2]

    @staticmethod
    def sample_bytes(height: int, width: int) -> int:
        """Three colours and a label for every pixel."""
        return 4 * height * width

    def __reduce__(self) -> tuple:
        return type(self), (self.samples, self.height, self.width)

    def get(self, index: int, load: Callable[[int], Pair]) -> Pair:
        """Image (3,H,W) and label (H,W), uint8, from memory or from `load`."""
        image, label = self._images[index], self._labels[index]  # H,W,3 and H,W
        if not self._there[index]:
            loaded = load(index)
            if loaded[1].shape != label.shape:
                return loaded
            image.copy_(loaded[0].permute(1, 2, 0))
            label.copy_(loaded[1])
            self._there[index] = 1
        return tv_tensors.Image(image.permute(2, 0, 1)), tv_tensors.Mask(label)
