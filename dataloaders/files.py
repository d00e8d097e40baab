"""Data sets that are folders of image and label files: finding, pairing, checking."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from torchvision import tv_tensors

from dataloaders.base import SegmentationDataset, Transform
from dataloaders.decode import DataError, LabelCode, read_image


def find_root(data_dir: str | os.PathLike | None, flag: str, variable: str, layout: str) -> Path:
    """The data set's folder, from the argument or else from the environment variable.

    Raises FileNotFoundError that names the flag, the variable and the layout.
    """
    how = f"give {flag} or set {variable} to the folder that holds {layout}"
    root = data_dir or os.environ.get(variable)
    if not root:
        raise FileNotFoundError(f"no data folder given: {how}")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} does not exist: {how}")
    return root


def one_per_label(pairs: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """The pairs as they are. Raises ValueError if two images share a label: .png and .jpg of one
    frame, or a name listed twice."""
    images: dict[Path, Path] = {}
    for image, label in pairs:
        if label in images:
            raise ValueError(f"{image} and {images[label].name} are the same frame; remove one")
        images[label] = image
    return pairs


class PairedFiles(SegmentationDataset):
    """A data set of (image file, label file) pairs; subclasses say how to find and read them.

    Class attributes: `flag` and `variable` name where the folder comes from, `layout` what it must
    hold (one line), `labels` reads label files.

    Raises FileNotFoundError for a missing folder, no images, or, unless `allow_missing`, an image
    without a label; `allow_missing` leaves that to `load`.
    """

    flag: str
    variable: str
    layout: str
    labels: LabelCode

    def __init__(
        self,
        split: str,
        data_dir: str | os.PathLike | None = None,
        transform: Transform | None = None,
        seed: int = 0,
        allow_missing: bool = False,
    ) -> None:
        super().__init__(split, transform, seed)
        self.root = find_root(data_dir, self.flag, self.variable, self.layout)
        self.pairs = self.find_pairs()
        missing = [pair for pair in self.pairs if not pair[1].is_file()]
        if missing and not allow_missing:
            image, label = missing[0]
            raise FileNotFoundError(
                f"{image} has no label: expected {label} ({len(missing)} of {len(self.pairs)} "
                f"images of split {split} lack theirs); add the labels or remove the images"
            )

    @classmethod
    def options(cls, args: Namespace, split: str) -> dict[str, Any]:
        return {"data_dir": getattr(args, cls.flag.removeprefix("--").replace("-", "_"))}

    def find_pairs(self) -> list[tuple[Path, Path]]:
        """(image, label) paths of the split, sorted; need not check that the labels exist."""
        raise NotImplementedError

    def list_images(self, folder: Path, pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
        """Sorted images of a folder. Raises FileNotFoundError if it is absent or has none."""
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} does not exist: {self.flag} or {self.variable} must name the folder "
                f"that holds {self.layout}"
            )
        images = sorted(p for p in folder.glob(pattern) if p.suffix.lower() in suffixes)
        if not images:
            raise FileNotFoundError(
                f"{folder} holds no images named {pattern} ({', '.join(suffixes)}); "
                f"expected {self.layout}"
            )
        return images

    def __len__(self) -> int:
        return len(self.pairs)

    def name_of(self, index: int) -> str:
        return str(self.pairs[index][0])

    def load(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, label_path = self.pairs[index]
        image = read_image(image_path)  # 3,H,W
        label = self.labels.read(label_path)  # H,W
        if image.shape[-2:] != label.shape[-2:]:
            (h, w), (lh, lw) = image.shape[-2:], label.shape[-2:]
            raise DataError(
                f"{label_path}: label is {lw}x{lh} pixels but its image {image_path} is {w}x{h}; "
                "they must have the same size"
            )
        return image, label

    def faults(self, index: int) -> list[str]:
        """What is wrong with the files of one sample, each by itself; `load` stops at the first."""
        image_path, label_path = self.pairs[index]
        found = []
        for read, path in ((read_image, image_path), (self.labels.read, label_path)):
            try:
                read(path)
            except DataError as error:
                found.append(str(error))
        return found
