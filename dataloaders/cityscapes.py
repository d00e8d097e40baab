"""Cityscapes in its official folders, as the archives unpack.

    <data dir>/leftImg8bit/{train,val}/<city>/<city>_<seq>_<frame>_leftImg8bit.png
    <data dir>/gtFine/{train,val}/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png

The data dir comes from `--cityscapes-data-dir` or SEGBLOCKS_CITYSCAPES_DIR.
"""

from pathlib import Path

from dataloaders.decode import IdLabels, label_table
from dataloaders.files import PairedFiles
from dataloaders.info import CITYSCAPES, IGNORE_INDEX

# Ids of the labelIds files, in the order of the 19 classes (cityscapesScripts, labels.py).
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_DEFINED = (*range(34), 255)  # 255 is the table's -1 (licence plate) in an 8-bit file
_TO_CLASS = {i: _EVALUATED.index(i) if i in _EVALUATED else IGNORE_INDEX for i in _DEFINED}


class Cityscapes(PairedFiles):
    """2048x1024 street scenes, 19 classes; label ids that are not evaluated become 255."""

    info = CITYSCAPES
    splits = ("train", "val")
    flag = "--cityscapes-data-dir"
    variable = "SEGBLOCKS_CITYSCAPES_DIR"
    layout = (
        "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and "
        "gtFine/{train,val}/<city>/*_gtFine_labelIds.png"
    )
    labels = IdLabels(label_table(_TO_CLASS), "0..33 or 255, as in gtFine *_labelIds.png files")

    def find_pairs(self) -> list[tuple[Path, Path]]:
        images = self.list_images(
            self.root / "leftImg8bit" / self.split, "*/*_leftImg8bit.png", (".png",)
        )
        labels = self.root / "gtFine" / self.split
        return [
            (
                image,
                labels
                / image.parent.name
                / image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png"),
            )
            for image in images
        ]
