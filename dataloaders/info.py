"""What a data set's label ids mean: names, colours, and which classes need resolution."""

from dataclasses import dataclass

IGNORE_INDEX = 255  # void: takes no part in losses and scores


@dataclass(frozen=True)
class DatasetInfo:
    """Classes of a data set; label id i is `classes[i]`, drawn in `colours[i]` (r, g, b in 0..255).

    `small_classes` names the classes made of small or thin things, which suffer first at half
    resolution. They only select blocks for reports: training never sees them.

    Raises ValueError if the lengths differ or a small class is not in `classes`.
    """

    name: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    small_classes: tuple[str, ...] = ()
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.colours):
            raise ValueError(
                f"{self.name}: {len(self.classes)} classes but {len(self.colours)} colours; "
                "give one colour per class"
            )
        if unknown := set(self.small_classes) - set(self.classes):
            raise ValueError(
                f"{self.name}: small classes {sorted(unknown)} are not among its classes"
            )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def small_ids(self) -> tuple[int, ...]:
        """Label ids of `small_classes`."""
        return tuple(self.classes.index(name) for name in self.small_classes)


# The 19 evaluated classes, in train-id order, as in the official cityscapesScripts table.
CITYSCAPES = DatasetInfo(
    name="cityscapes",
    classes=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    colours=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
    small_classes=(
        "pole",
        "traffic light",
        "traffic sign",
        "person",
        "rider",
        "motorcycle",
        "bicycle",
    ),
)

# The 11 classes and colours of the SegNet version of CamVid.
CAMVID = DatasetInfo(
    name="camvid",
    classes=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    colours=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    small_classes=("pole", "sign symbol", "pedestrian", "bicyclist"),
)
