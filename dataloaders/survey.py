"""A walk over every file of a split: sizes, classes, and all that cannot be used."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dataloaders.base import SegmentationDataset
from dataloaders.decode import DataError
from dataloaders.files import PairedFiles
from utils.logger import progress


class Seen(NamedTuple):
    """What one sample holds; `faults` alone where it cannot be used."""

    size: tuple[int, int] = (0, 0)  # width, height
    pixels: tuple[int, ...] = ()  # labelled as each class
    ignored: int = 0
    faults: tuple[str, ...] = ()


@dataclass
class Survey:
    """Sums over the samples of a split that can be used, and what is wrong with the others.

    By class name: `pixels`, `images` that show the class, `pixels_of_images`, the labelled pixels
    of those.
    """

    images: int
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height): images
    pixels: Counter[str] = field(default_factory=Counter)
    shown_in: Counter[str] = field(default_factory=Counter)
    pixels_of_images: Counter[str] = field(default_factory=Counter)
    ignored: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, seen: Seen, classes: tuple[str, ...]) -> None:
        if seen.faults:
            self.faults.extend(seen.faults)
            return
        self.sizes[seen.size] += 1
        self.ignored += seen.ignored
        labelled = sum(seen.pixels)
        for name, count in zip(classes, seen.pixels):
            self.pixels[name] += count
            self.shown_in[name] += count > 0
            self.pixels_of_images[name] += labelled if count else 0

    def to_json(self) -> dict[str, Any]:
        labelled = self.pixels.total()
        return {
            "images": self.images,
            "sizes": {f"{w}x{h}": count for (w, h), count in self.sizes.most_common()},
            "classes": {
                name: {
                    "pixels": count,
                    "frequency": count / labelled if labelled else 0.0,
                    "images": self.shown_in[name],
                }
                for name, count in self.pixels.items()
            },
            "ignored_pixels": self.ignored,
            "faults": self.faults,
        }


class _Inspected(Dataset):
    """Looks at a sample wherever a loader's worker runs."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Seen:
        try:
            image, label = self.dataset.load(index)
        except DataError as error:
            if not isinstance(self.dataset, PairedFiles):
                raise
            # The other file of the pair may be bad as well.
            return Seen(faults=tuple(self.dataset.faults(index)) or (str(error),))
        classes = self.dataset.info.num_classes
        counts = np.bincount(label.numpy().ravel(), minlength=classes)
        height, width = image.shape[-2:]
        pixels = tuple(counts[:classes].tolist())
        return Seen((width, height), pixels, int(counts[classes:].sum()))


def survey(dataset: SegmentationDataset, num_workers: int = 0) -> Survey:
    """Read every image and label of `dataset`, whose transform is not applied."""
    found = Survey(len(dataset))
    found.pixels.update(dict.fromkeys(dataset.info.classes, 0))
    loader = DataLoader(
        _Inspected(dataset), batch_size=None, num_workers=num_workers, collate_fn=_as_it_is
    )
    for seen in progress(loader, dataset.split, "img"):
        found.add(seen, dataset.info.classes)
    return found


def _as_it_is(seen: Seen) -> Seen:
    """Not the default, which would make tensors of the counts."""
    return seen
