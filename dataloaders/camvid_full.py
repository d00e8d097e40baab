"""CamVid at full resolution: 960x720 frames with the 32 colours of the original release.

Two layouts, told apart by their folders. As the two archives unpack:

    <data dir>/701_StillsRaw_full/<name>.png
    <data dir>/LabeledApproved_full/<name>_L.png

or already divided:

    <data dir>/{train,val,test}/<name>.png
    <data dir>/{train,val,test}_labels/<name>_L.png

The release itself has no splits. Frames of the first layout go where the usual ones (367 train,
101 val, 233 test, Sturgess et al. 2009) put them, which follows from sequence and frame number.
`test` need not exist unless it is asked for. The data dir comes from `--camvid-full-data-dir` or
SEGBLOCKS_CAMVID_FULL_DIR.
"""

import re
from pathlib import Path

from dataloaders.decode import ColourLabels
from dataloaders.files import PairedFiles
from dataloaders.info import CAMVID, IGNORE_INDEX, DatasetInfo

# The 32 names and colours of the release, by the class of the 11 (or void) SegNet made of them.
GROUPS: dict[str, dict[str, tuple[int, int, int]]] = {
    "sky": {"Sky": (128, 128, 128)},
    "building": {
        "Archway": (192, 0, 128),
        "Bridge": (0, 128, 64),
        "Building": (128, 0, 0),
        "Tunnel": (64, 0, 64),
        "Wall": (64, 192, 0),
    },
    "pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "road": {
        "LaneMkgsDriv": (128, 0, 192),
        "LaneMkgsNonDriv": (192, 0, 64),
        "Road": (128, 64, 128),
    },
    "pavement": {
        "ParkingBlock": (64, 192, 128),
        "RoadShoulder": (128, 128, 192),
        "Sidewalk": (0, 0, 192),
    },
    "tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "sign symbol": {
        "Misc_Text": (128, 128, 64),
        "SignSymbol": (192, 128, 128),
        "TrafficLight": (0, 64, 64),
    },
    "fence": {"Fence": (64, 64, 128)},
    "car": {
        "Car": (64, 0, 128),
        "OtherMoving": (128, 64, 64),
        "SUVPickupTruck": (64, 128, 192),
        "Train": (192, 64, 128),
        "Truck_Bus": (192, 128, 192),
    },
    "pedestrian": {
        "Animal": (64, 128, 64),
        "CartLuggagePram": (64, 0, 192),
        "Child": (192, 128, 64),
        "Pedestrian": (64, 64, 0),
    },
    "bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
    "void": {"Void": (0, 0, 0)},
}
_IDS = {
    colour: IGNORE_INDEX if group == "void" else CAMVID.classes.index(group)
    for group, members in GROUPS.items()
    for colour in members.values()
}
_STILLS, _LABELS = "701_StillsRaw_full", "LabeledApproved_full"
_VAL_FRAMES = range(7959, 8160)  # of sequence 0016E5
_FIRST_TEST_FRAME = 8550  # of sequence 0001TP


def split_of(name: str) -> str | None:
    """The usual split of a frame of the release by its name; None if it is not one of them."""
    match = re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)", name)
    if match is None:
        return None
    sequence, frame = match[1], int(match[2])
    if sequence == "0001TP":
        return "test" if frame >= _FIRST_TEST_FRAME else "train"
    if sequence == "0016E5":
        return "val" if frame in _VAL_FRAMES else "train"
    return "train" if sequence == "0006R0" else "test"


class CamVidFull(PairedFiles):
    """Street scenes from a car in Cambridge; 32 colours become 11 classes, Void becomes 255.

    Raises ValueError for a folder with both layouts, and for frames of the undivided layout that
    the release does not have.
    """

    info = DatasetInfo("camvid_full", CAMVID.classes, CAMVID.colours, CAMVID.small_classes)
    splits = ("train", "val", "test")
    flag = "--camvid-full-data-dir"
    variable = "SEGBLOCKS_CAMVID_FULL_DIR"
    layout = (
        f"{_STILLS}/<name>.png and {_LABELS}/<name>_L.png, or {{train,val}}/<name>.png and "
        "{train,val}_labels/<name>_L.png"
    )
    labels = ColourLabels(_IDS, "the 32 colours of CamVid's label_colors.txt")

    def find_pairs(self) -> list[tuple[Path, Path]]:
        stills, divided = self.root / _STILLS, self.root / self.split
        if stills.is_dir() and divided.is_dir():
            raise ValueError(
                f"{self.root} holds both {_STILLS} and {self.split}; remove one, or name a folder "
                "with one of them"
            )
        if stills.is_dir():
            images = self._of_split(self.list_images(stills, "*", (".png",)))
            labels = self.root / _LABELS
        else:
            images = self.list_images(divided, "*", (".png",))
            labels = self.root / f"{self.split}_labels"
        return [(image, labels / f"{image.stem}_L.png") for image in images]

    def _of_split(self, images: list[Path]) -> list[Path]:
        if unknown := [image for image in images if split_of(image.stem) is None]:
            raise ValueError(
                f"{unknown[0]} is not a frame of the release (0001TP_<number>.png and the like; "
                f"{len(unknown)} of {len(images)} are not), so its split is unknown: sort the "
                "frames into train/, val/ and test/ with train_labels/ and so on"
            )
        chosen = [image for image in images if split_of(image.stem) == self.split]
        if not chosen:
            raise FileNotFoundError(
                f"none of the {len(images)} frames in {images[0].parent} belongs to split "
                f"{self.split}; expected the 701 frames of the release"
            )
        return chosen
