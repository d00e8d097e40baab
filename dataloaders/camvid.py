"""CamVid, the 480x360 version with 11 classes that came with SegNet.

    <data dir>/{train,val,test}/<name>.png or .jpg
    <data dir>/{train,val,test}annot/<name>.png      ids 0..10, 11 is void

`test` need not exist unless it is asked for. The data dir comes from `--camvid-data-dir` or
SEGBLOCKS_CAMVID_DIR.
"""

from pathlib import Path

from dataloaders.decode import IdLabels, label_table
from dataloaders.files import PairedFiles, one_per_label
from dataloaders.info import CAMVID, IGNORE_INDEX

_VOID = 11


class CamVid(PairedFiles):
    """Street scenes from a car in Cambridge, 11 classes; void becomes 255.

    Raises ValueError if a frame is there twice, as .png and .jpg.
    """

    info = CAMVID
    splits = ("train", "val", "test")
    flag = "--camvid-data-dir"
    variable = "SEGBLOCKS_CAMVID_DIR"
    layout = "{train,val}/<name>.png or .jpg and {train,val}annot/<name>.png"
    labels = IdLabels(
        label_table({**{i: i for i in range(CAMVID.num_classes)}, _VOID: IGNORE_INDEX}),
        "0..10 for the classes and 11 for void, as in the 11-class CamVid of SegNet",
    )

    def find_pairs(self) -> list[tuple[Path, Path]]:
        images = self.list_images(self.root / self.split, "*", (".png", ".jpg", ".jpeg"))
        labels = self.root / f"{self.split}annot"
        return one_per_label([(image, labels / f"{image.stem}.png") for image in images])
