"""Data sets that are folders of image and label files: finding, pairing, decoding, checking."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import tv_tensors

from dataloaders.base import SegmentationDataset, Transform

NOT_A_LABEL = 254  # table entry of ids that the data set does not define; never a class id


class DataError(ValueError):
    """A file of a data set cannot be used; the message is one line that names it.

    A DataLoader rebuilds a worker's exception from its formatted traceback. Keeping what follows
    the class name restores the one line, so the message is the same for any number of workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


def label_table(ids: Mapping[int, int]) -> np.ndarray:
    """(256,) uint8: id in the file -> class id or 255; ids not in `ids` -> NOT_A_LABEL."""
    table = np.full(256, NOT_A_LABEL, dtype=np.uint8)
    for file_id, class_id in ids.items():
        table[file_id] = class_id
    return table


def _decode(path: Path, what: str) -> Image.Image:
    """Read a whole image file with PIL. torchvision's decoders are no choice: they accept truncated
    JPEG files, and a damaged PNG file ends the process."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        known = isinstance(error, UnidentifiedImageError)  # its text only repeats the path
        reason = "not an image file" if known else " ".join(str(error).split())
        raise DataError(f"{path}: cannot read this {what} ({reason}); replace it") from error
    return image


def read_image(path: Path) -> tv_tensors.Image:
    """(3,H,W) uint8 RGB. Raises DataError naming a file that is missing, truncated or no image."""
    image = _decode(path, "image")
    image = image if image.mode == "RGB" else image.convert("RGB")  # would copy in any case
    pixels = np.array(image)  # H,W,3
    # A permuted view: crops and resizes are fastest on interleaved channels.
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))  # 3,H,W


def read_label(path: Path, table: np.ndarray, expected: str) -> tv_tensors.Mask:
    """(H,W) uint8 class ids, mapped by `table` (see `label_table`); void is 255.

    Raises DataError naming a file that cannot be read, has several channels, or holds ids outside
    the table; `expected` says which ids the data set has.
    """
    image = _decode(path, "label")
    if image.mode not in ("L", "P"):  # P: the pixels are ids all the same, the palette is for show
        raise DataError(
            f"{path}: label has pixel format {image.mode}; expected one 8-bit id per pixel "
            "(modes L or P), not a colour picture"
        )
    ids = np.array(image)
    label = table[ids]
    if (label == NOT_A_LABEL).any():
        bad = np.unique(ids[label == NOT_A_LABEL]).tolist()
        raise DataError(f"{path}: label ids {bad} are not in the table; expected {expected}")
    return tv_tensors.Mask(torch.from_numpy(label))


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


class PairedFiles(SegmentationDataset):
    """A data set of (image file, label file) pairs; subclasses say how to find and read them.

    Class attributes: `flag` and `variable` name where the folder comes from, `layout` what it must
    hold (one line), `table` maps ids (see `label_table`), `expected_ids` describes them in words.

    Raises FileNotFoundError for a missing folder, no images, or an image without a label.
    """

    flag: str
    variable: str
    layout: str
    table: np.ndarray
    expected_ids: str

    def __init__(
        self,
        split: str,
        data_dir: str | os.PathLike | None = None,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(split, transform, seed)
        self.root = find_root(data_dir, self.flag, self.variable, self.layout)
        self.pairs = self.find_pairs()
        missing = [pair for pair in self.pairs if not pair[1].is_file()]
        if missing:
            image, label = missing[0]
            raise FileNotFoundError(
                f"{image} has no label: expected {label} ({len(missing)} of {len(self.pairs)} "
                f"images of split {split} lack theirs); add the labels or remove the images"
            )

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
        label = read_label(label_path, self.table, self.expected_ids)  # H,W
        if image.shape[-2:] != label.shape[-2:]:
            (h, w), (lh, lw) = image.shape[-2:], label.shape[-2:]
            raise DataError(
                f"{label_path}: label is {lw}x{lh} pixels but its image {image_path} is {w}x{h}; "
                "they must have the same size"
            )
        return image, label
