"""Mapillary Vistas 1.2: street scenes of many sizes from all over the world.

    <data dir>/{training,validation}/images/<name>.jpg
    <data dir>/{training,validation}/labels/<name>.png          as version 1.2 unpacks
    <data dir>/{training,validation}/v1.2/labels/<name>.png     as version 2.0 carries it along

Label files hold 66 ids; the last, "Unlabeled", is not evaluated. Most images have 6 to 12
megapixels: `--res` sets the width for training, `--val-res` that of the network's input in
validation; scores are at the size of the labels. The data dir comes from `--mapillary-data-dir` or
SEGBLOCKS_MAPILLARY_DIR.
"""

from pathlib import Path

from dataloaders.decode import IdLabels, label_table
from dataloaders.files import PairedFiles
from dataloaders.info import IGNORE_INDEX, DatasetInfo

# The 65 evaluated classes in the order of their ids (config.json of the release, version 1.2).
_COLOURS = {
    "bird": (165, 42, 42),
    "ground animal": (0, 192, 0),
    "curb": (196, 196, 196),
    "fence": (190, 153, 153),
    "guard rail": (180, 165, 180),
    "barrier": (90, 120, 150),
    "wall": (102, 102, 156),
    "bike lane": (128, 64, 255),
    "crosswalk - plain": (140, 140, 200),
    "curb cut": (170, 170, 170),
    "parking": (250, 170, 160),
    "pedestrian area": (96, 96, 96),
    "rail track": (230, 150, 140),
    "road": (128, 64, 128),
    "service lane": (110, 110, 110),
    "sidewalk": (244, 35, 232),
    "bridge": (150, 100, 100),
    "building": (70, 70, 70),
    "tunnel": (150, 120, 90),
    "person": (220, 20, 60),
    "bicyclist": (255, 0, 0),
    "motorcyclist": (255, 0, 100),
    "other rider": (255, 0, 200),
    "lane marking - crosswalk": (200, 128, 128),
    "lane marking - general": (255, 255, 255),
    "mountain": (64, 170, 64),
    "sand": (230, 160, 50),
    "sky": (70, 130, 180),
    "snow": (190, 255, 255),
    "terrain": (152, 251, 152),
    "vegetation": (107, 142, 35),
    "water": (0, 170, 30),
    "banner": (255, 255, 128),
    "bench": (250, 0, 30),
    "bike rack": (100, 140, 180),
    "billboard": (220, 220, 220),
    "catch basin": (220, 128, 128),
    "CCTV camera": (222, 40, 40),
    "fire hydrant": (100, 170, 30),
    "junction box": (40, 40, 40),
    "mailbox": (33, 33, 33),
    "manhole": (100, 128, 160),
    "phone booth": (142, 0, 0),
    "pothole": (70, 100, 150),
    "street light": (210, 170, 100),
    "pole": (153, 153, 153),
    "traffic sign frame": (128, 128, 128),
    "utility pole": (0, 0, 80),
    "traffic light": (250, 170, 30),
    "traffic sign (back)": (192, 192, 192),
    "traffic sign (front)": (220, 220, 0),
    "trash can": (140, 140, 20),
    "bicycle": (119, 11, 32),
    "boat": (150, 0, 255),
    "bus": (0, 60, 100),
    "car": (0, 0, 142),
    "caravan": (0, 0, 90),
    "motorcycle": (0, 0, 230),
    "on rails": (0, 80, 100),
    "other vehicle": (128, 64, 64),
    "trailer": (0, 0, 110),
    "truck": (0, 0, 70),
    "wheeled slow": (0, 0, 192),
    "car mount": (32, 32, 32),
    "ego vehicle": (120, 10, 10),
}
_UNLABELED = len(_COLOURS)
_FOLDERS = {"train": "training", "val": "validation"}


class Mapillary(PairedFiles):
    """65 classes; Unlabeled becomes 255."""

    info = DatasetInfo(
        name="mapillary",
        classes=tuple(_COLOURS),
        colours=tuple(_COLOURS.values()),
        small_classes=(
            "bird",
            "ground animal",
            "person",
            "bicyclist",
            "motorcyclist",
            "other rider",
            "bench",
            "CCTV camera",
            "fire hydrant",
            "mailbox",
            "street light",
            "pole",
            "traffic sign frame",
            "utility pole",
            "traffic light",
            "traffic sign (back)",
            "traffic sign (front)",
            "trash can",
            "bicycle",
            "motorcycle",
        ),
    )
    splits = ("train", "val")
    flag = "--mapillary-data-dir"
    variable = "SEGBLOCKS_MAPILLARY_DIR"
    layout = (
        "{training,validation}/images/<name>.jpg and {training,validation}/labels/<name>.png "
        "(or v1.2/labels/)"
    )
    labels = IdLabels(
        label_table({**{i: i for i in range(_UNLABELED)}, _UNLABELED: IGNORE_INDEX}),
        f"0..{_UNLABELED}, as in Mapillary Vistas 1.2 (the labels of version 2.0 are others)",
    )

    def find_pairs(self) -> list[tuple[Path, Path]]:
        folder = self.root / _FOLDERS[self.split]
        labels = folder / "v1.2" / "labels"
        if not labels.is_dir():
            labels = folder / "labels"
        images = self.list_images(folder / "images", "*.jpg", (".jpg",))
        return [(image, labels / f"{image.stem}.png") for image in images]
