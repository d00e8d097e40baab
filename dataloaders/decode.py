"""Image and label files to tensors; whatever is wrong with a file is an error that names it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import tv_tensors

NOT_A_LABEL = 254  # table entry of ids that the data set does not define; never a class id
MAX_CLASSES = NOT_A_LABEL
_SHOWN = 3  # wrong values named in a message

Colour = tuple[int, int, int]


class DataError(ValueError):
    """A file of a data set cannot be used; the message is one line that names it.

    A DataLoader rebuilds a worker's exception from its formatted traceback. Keeping what follows
    the class name restores the one line, so the message is the same for any number of workers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


class LabelCode(Protocol):
    """How class ids are written in label files."""

    def read(self, path: Path) -> tv_tensors.Mask:
        """(H,W) uint8 class ids, void 255. Raises DataError naming a file that cannot be used."""


@dataclass(frozen=True)
class IdLabels:
    """One 8-bit id per pixel, mapped by `table` (see `label_table`).

    `expected` says in words which ids the data set has.
    """

    table: np.ndarray
    expected: str

    def read(self, path: Path) -> tv_tensors.Mask:
        image = _decode(path, "label")
        if image.mode not in ("L", "P"):  # P: the pixels are ids all the same, colours are for show
            raise DataError(
                f"{path}: label has pixel format {image.mode}; expected one 8-bit id per pixel "
                "(modes L or P), not a colour picture"
            )
        ids = np.array(image)
        label = self.table[ids]
        if (label == NOT_A_LABEL).any():
            bad = np.unique(ids[label == NOT_A_LABEL]).tolist()
            raise DataError(
                f"{path}: label ids {bad} are not in the table; expected {self.expected}"
            )
        return tv_tensors.Mask(torch.from_numpy(label))


class ColourLabels:
    """One colour per class, or several: `ids` maps (r, g, b) to a class id or 255.

    Reads RGB pictures, and palette pictures by the colours of their palette. `expected` says in
    words which colours the data set has.
    """

    def __init__(self, ids: Mapping[Colour, int], expected: str) -> None:
        codes = sorted((_code(np.array(colour)), class_id) for colour, class_id in ids.items())
        self._codes = np.array([code for code, _ in codes], dtype=np.int32)
        self._ids = np.array([class_id for _, class_id in codes], dtype=np.uint8)
        self.expected = expected

    def read(self, path: Path) -> tv_tensors.Mask:
        image = _decode(path, "label")
        if image.mode not in ("RGB", "P"):
            raise DataError(
                f"{path}: label has pixel format {image.mode}; expected a colour picture "
                "(mode RGB, or P with the colours in its palette)"
            )
        codes = _code(np.array(image.convert("RGB")))  # H,W
        at = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        wrong = self._codes[at] != codes
        if wrong.any():
            raise DataError(f"{path}: {_wrong_colours(codes, wrong)}; expected {self.expected}")
        return tv_tensors.Mask(torch.from_numpy(self._ids[at]))


def label_table(ids: Mapping[int, int]) -> np.ndarray:
    """(256,) uint8: id in the file -> class id or 255; ids not in `ids` -> NOT_A_LABEL."""
    table = np.full(256, NOT_A_LABEL, dtype=np.uint8)
    for file_id, class_id in ids.items():
        table[file_id] = class_id
    return table


def read_image(path: Path) -> tv_tensors.Image:
    """(3,H,W) uint8 RGB. Raises DataError naming a file that is missing, truncated or no image, or
    that has more than 8 bits a channel."""
    image = _decode(path, "image")
    if image.mode[0] in "IF":  # PIL would cut these off at 255
        raise DataError(
            f"{path}: image has pixel format {image.mode}, more than 8 bits a channel; convert it "
            "to 8-bit grey or RGB"
        )
    image = image if image.mode == "RGB" else image.convert("RGB")  # would copy in any case
    pixels = np.array(image)  # H,W,3
    # A permuted view: crops and resizes are fastest on interleaved channels.
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))  # 3,H,W


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


def _code(colours: np.ndarray) -> np.ndarray:
    """(...,3) colours -> (...) int32, one number per colour."""
    r, g, b = np.moveaxis(colours.astype(np.int32), -1, 0)
    return (r << 16) | (g << 8) | b


def _wrong_colours(codes: np.ndarray, wrong: np.ndarray) -> str:
    """Which colours are wrong, most frequent first, and where the first one is."""
    values, counts = np.unique(codes[wrong], return_counts=True)
    most = values[np.argsort(-counts, kind="stable")][:_SHOWN].tolist()
    y, x = np.argwhere(wrong & (codes == most[0]))[0].tolist()
    colours: Sequence[Colour] = [(c >> 16, c >> 8 & 255, c & 255) for c in most]
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return (
        f"colours {', '.join(map(str, colours))}{more} (r, g, b) are not in the palette, "
        f"{int(wrong.sum())} pixels, the first at x {x}, y {y}"
    )
