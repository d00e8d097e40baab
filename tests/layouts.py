"""Miniature data sets in the layouts that their publishers, or users, give them."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import make_camvid, make_cityscapes, save, scene

from dataloaders.camvid_full import GROUPS

COLOURS_32 = np.array([c for members in GROUPS.values() for c in members.values()], np.uint8)
CLASSES_YAML = """\
labels: ids
ignore: [255, 9]
classes:
  - {name: road, colour: [128, 64, 128]}
  - {name: pole, colour: [153, 153, 153], small: true}
  - {name: car, colour: [0, 0, 142], id: 7}
"""


def make_camvid_full(root: Path) -> Path:
    """Both archives as they unpack: two frames of train, one of val, one of test."""
    for i, name in enumerate(("0001TP_006690", "0006R0_f00930", "0016E5_07959", "Seq05VD_f00000")):
        image, label = scene(i, height=96, width=128, classes=32)
        save(root / "701_StillsRaw_full" / f"{name}.png", image)
        save(root / "LabeledApproved_full" / f"{name}_L.png", COLOURS_32[label])
    return root


def make_camvid_divided(root: Path) -> Path:
    """The same frames, sorted into train/ and train_labels/ and so on."""
    make_camvid_full(root / "archives")
    for split, names in (("train", ("0001TP_006690", "0006R0_f00930")), ("val", ("0016E5_07959",))):
        for folder in (split, f"{split}_labels"):
            (root / folder).mkdir()
        for name in names:
            stills, labels = (
                root / "archives" / f for f in ("701_StillsRaw_full", "LabeledApproved_full")
            )
            shutil.move(stills / f"{name}.png", root / split)
            shutil.move(labels / f"{name}_L.png", root / f"{split}_labels")
    return root


def make_mapillary(root: Path, labels: str = "labels") -> Path:
    """Images of several sizes, with palette label files of ids 0..65."""
    sizes = {"training": [(96, 160), (160, 120)], "validation": [(192, 256), (160, 96)]}
    for split, shapes in sizes.items():
        for i, (height, width) in enumerate(shapes):
            image, label = scene(i, height, width, classes=66)
            save(root / split / "images" / f"frame{i}.jpg", image)
            picture = Image.fromarray(label).convert("P")
            picture.putdata(label.flatten().tolist())
            picture.putpalette([7 * i % 256 for i in range(768)])
            path = root / split / labels / f"frame{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return root


def make_custom(root: Path, coding: str = "ids") -> Path:
    """Split folders with a folder of their own below."""
    text = CLASSES_YAML
    if coding == "colours":
        text = text.replace("labels: ids", "labels: colours").replace(", id: 7", "")
        text = text.replace("[255, 9]", "[[0, 0, 0], [1, 2, 3]]")
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.yaml").write_text(text)
    ids = np.array([0, 1, 7, 255, 9], np.uint8)
    colours = np.array([[128, 64, 128], [153, 153, 153], [0, 0, 142], [0, 0, 0], [1, 2, 3]])
    table = ids if coding == "ids" else colours.astype(np.uint8)
    for split, count in (("train", 2), ("val", 1)):
        for i in range(count):
            image, label = scene(i, height=96, width=128, classes=5)
            save(root / "images" / split / "town" / f"frame{i}.jpg", image)
            save(root / "labels" / split / "town" / f"frame{i}.png", table[label])
    return root


@dataclass(frozen=True)
class Layout:
    """How to make one, and where the files of one training and one validation sample lie."""

    dataset: str
    make: Callable[[Path], Path]
    image: str
    label: str
    val_label: str
    colours: bool = False  # in the label files
    images: tuple[int, int] = (2, 1)  # train, val

    def flags(self, root: Path) -> list[str]:
        flag = f"--{self.dataset.replace('_', '-')}-data-dir"
        return ["--dataset", self.dataset, flag, str(root)]


_TOWN = "train/town/town_000000_000019"
LAYOUTS = {
    "cityscapes": Layout(
        "cityscapes",
        make_cityscapes,
        f"leftImg8bit/{_TOWN}_leftImg8bit.png",
        f"gtFine/{_TOWN}_gtFine_labelIds.png",
        f"gtFine/{_TOWN}_gtFine_labelIds.png".replace("train/", "val/"),
    ),
    "camvid": Layout(
        "camvid",
        make_camvid,
        "train/frame0.png",
        "trainannot/frame0.png",
        "valannot/frame0.png",
    ),
    "camvid_full": Layout(
        "camvid_full",
        make_camvid_full,
        "701_StillsRaw_full/0001TP_006690.png",
        "LabeledApproved_full/0001TP_006690_L.png",
        "LabeledApproved_full/0016E5_07959_L.png",
        colours=True,
    ),
    "camvid_full-divided": Layout(
        "camvid_full",
        make_camvid_divided,
        "train/0001TP_006690.png",
        "train_labels/0001TP_006690_L.png",
        "val_labels/0016E5_07959_L.png",
        colours=True,
    ),
    "mapillary": Layout(
        "mapillary",
        make_mapillary,
        "training/images/frame0.jpg",
        "training/labels/frame0.png",
        "validation/labels/frame0.png",
        images=(2, 2),
    ),
    "mapillary-v1.2": Layout(
        "mapillary",
        lambda root: make_mapillary(root, "v1.2/labels"),
        "training/images/frame0.jpg",
        "training/v1.2/labels/frame0.png",
        "validation/v1.2/labels/frame0.png",
        images=(2, 2),
    ),
    "custom": Layout(
        "custom",
        make_custom,
        "images/train/town/frame0.jpg",
        "labels/train/town/frame0.png",
        "labels/val/town/frame0.png",
    ),
    "custom-colours": Layout(
        "custom",
        lambda root: make_custom(root, "colours"),
        "images/train/town/frame0.jpg",
        "labels/train/town/frame0.png",
        "labels/val/town/frame0.png",
        colours=True,
    ),
}
