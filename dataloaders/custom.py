"""A data set of your own: images, labels and a file that says what the labels mean.

    <data dir>/classes.yaml                    see dataloaders/class_file.py
    <data dir>/images/{train,val}/<name>.png   or .jpg, in any folders below
    <data dir>/labels/{train,val}/<name>.png   in the same folders

Instead of split folders, train.txt and val.txt may list the images of a split, one a line, as paths
below images/. Where there is such a file, it decides. The data dir comes from `--custom-data-dir`
or SEGBLOCKS_CUSTOM_DIR.
"""

import os
from pathlib import Path
from typing import Any

from dataloaders.class_file import read_class_file
from dataloaders.files import PairedFiles, find_root, one_per_label

CLASS_FILE = "classes.yaml"
_SUFFIXES = (".png", ".jpg", ".jpeg")


class Custom(PairedFiles):
    """Classes and label format are those of classes.yaml.

    Raises FileNotFoundError for missing files, and ValueError for a classes.yaml or a list that
    cannot be used, or an image that is there twice, as .png and .jpg.
    """

    splits = ("train", "val", "test")
    flag = "--custom-data-dir"
    variable = "SEGBLOCKS_CUSTOM_DIR"
    layout = f"{CLASS_FILE}, images/{{train,val}}/ and labels/{{train,val}}/"

    def __init__(
        self, split: str, data_dir: str | os.PathLike | None = None, **options: Any
    ) -> None:
        root = find_root(data_dir, self.flag, self.variable, self.layout)
        self.info, self.labels = read_class_file(root / CLASS_FILE, "custom")
        super().__init__(split, root, **options)

    def find_pairs(self) -> list[tuple[Path, Path]]:
        images, listed = self.root / "images", self.root / f"{self.split}.txt"
        found = (
            self._listed(listed, images)
            if listed.is_file()
            else self.list_images(images / self.split, "**/*", _SUFFIXES)
        )
        labels = self.root / "labels"
        return one_per_label(
            [(path, (labels / path.relative_to(images)).with_suffix(".png")) for path in found]
        )

    def _listed(self, listed: Path, images: Path) -> list[Path]:
        lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
        names = [line for line in lines if line]
        if not names:
            raise ValueError(f"{listed} lists no images; give one path below images/ a line")
        for number, name in enumerate(lines, 1):
            if name and (Path(name).is_absolute() or ".." in Path(name).parts):
                raise ValueError(f"{listed} line {number}: {name!r} is not a path below images/")
            if name and Path(name).suffix.lower() not in _SUFFIXES:
                raise ValueError(
                    f"{listed} line {number}: {name!r} does not end in {', '.join(_SUFFIXES)}; "
                    "give the image's path below images/ with its suffix"
                )
            if name and not (images / name).is_file():
                raise FileNotFoundError(
                    f"{listed} line {number}: there is no {images / name}; give the image's path "
                    "below images/"
                )
        return sorted(images / name for name in names)
