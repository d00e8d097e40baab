"""What the label files of the larger data sets, and of your own, mean."""

import json
import shutil

import numpy as np
import pytest
from layouts import (
    CLASSES_YAML,
    make_camvid_divided,
    make_camvid_full,
    make_custom,
    make_mapillary,
)
from PIL import Image
from tiny import save

from dataloaders import DataError, build_dataset
from dataloaders.camvid_full import GROUPS, split_of
from dataloaders.class_file import read_class_file
from dataloaders.decode import ColourLabels
from dataloaders.info import CAMVID
from dataloaders.mapillary import Mapillary

# ---- colours ----


def test_colours_become_ids_in_rgb_and_in_palette_files(tmp_path):
    colours = {(0, 0, 0): 255, (255, 255, 255): 0, (1, 2, 3): 7, (1, 3, 2): 8}
    rng = np.random.default_rng(0)
    at = rng.integers(0, 4, (9, 13))
    pixels = np.array(list(colours), np.uint8)[at]
    expected = np.array(list(colours.values()))[at]
    code = ColourLabels(colours, "four colours")
    for name, picture in (
        ("rgb", Image.fromarray(pixels)),
        ("palette", Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE)),
    ):
        path = tmp_path / f"{name}.png"
        picture.save(path)
        assert Image.open(path).mode == {"rgb": "RGB", "palette": "P"}[name]
        assert np.array_equal(code.read(path).numpy(), expected)


def test_wrong_colours_are_listed_by_how_often_they_occur(tmp_path):
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[4, 1:4] = (9, 9, 9)
    pixels[1, 2] = (255, 255, 254)
    path = save(tmp_path / "bad.png", pixels)
    with pytest.raises(DataError, match="expected one colour") as error:
        ColourLabels({(0, 0, 0): 255}, "one colour").read(path)
    assert str(error.value).startswith(
        f"{path}: colours (9, 9, 9), (255, 255, 254) (r, g, b) are not in the palette, 4 pixels, "
        "the first at x 1, y 4;"
    )


# ---- CamVid at full size ----


def test_the_32_colours_of_camvid():
    colours = [colour for members in GROUPS.values() for colour in members.values()]
    assert len(colours) == len(set(colours)) == 32
    assert list(GROUPS) == [*CAMVID.classes, "void"]
    for name, colour in zip(CAMVID.classes, CAMVID.colours):
        if name != "pavement":  # SegNet drew it in a colour of its own
            assert colour in GROUPS[name].values()


def test_camvid_frames_go_where_the_usual_splits_put_them():
    splits = {
        "train": "0001TP_006690 0001TP_008520 0006R0_f03930 0016E5_00390 0016E5_08160 0016E5_07957",
        "val": "0016E5_07959 0016E5_07961 0016E5_08159",
        "test": "0001TP_008550 0001TP_010380 Seq05VD_f00000 Seq05VD_f05100",
    }
    for split, names in splits.items():
        assert {split_of(name) for name in names.split()} == {split}
    assert {split_of(name) for name in ("frame0", "0001TP", "0001TP_008550_L")} == {None}


@pytest.mark.parametrize("make", [make_camvid_full, make_camvid_divided])
def test_camvid_colours_become_eleven_classes(make, tmp_path):
    data = build_dataset("camvid_full", "train", make(tmp_path))
    frames = [data.name_of(i).rpartition("/")[2] for i in range(len(data))]
    assert frames == ["0001TP_006690.png", "0006R0_f00930.png"]
    label = data[0][1]
    groups = [group for group, members in GROUPS.items() for _ in members]
    expected = [255 if g == "void" else CAMVID.classes.index(g) for g in groups]
    assert label[0, ::4].tolist() == expected  # 32 stripes of 4 pixels


def test_camvid_test_split_of_the_archives(tmp_path):
    assert len(build_dataset("camvid_full", "test", make_camvid_full(tmp_path))) == 1


def test_camvid_with_both_layouts_is_ambiguous(tmp_path):
    root = make_camvid_divided(tmp_path)
    shutil.move(root / "archives" / "701_StillsRaw_full", root)
    with pytest.raises(ValueError, match="holds both 701_StillsRaw_full and train; remove one"):
        build_dataset("camvid_full", "train", root)


def test_camvid_frame_that_the_release_does_not_have(tmp_path):
    root = make_camvid_full(tmp_path)
    save(root / "701_StillsRaw_full/mine.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"mine\.png is not a frame of the release .*1 of 5"):
        build_dataset("camvid_full", "train", root)


def test_camvid_without_any_frame_of_the_split(tmp_path):
    root = make_camvid_full(tmp_path)
    (root / "701_StillsRaw_full/0016E5_07959.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the 3 frames .* belongs to split val"):
        build_dataset("camvid_full", "val", root)


# ---- Mapillary ----


def test_mapillary_keeps_65_ids_and_ignores_the_last(tmp_path):
    root = make_mapillary(tmp_path)
    save(root / "training/images/frame0.jpg", np.zeros((6, 11, 3), np.uint8))
    ids = np.arange(66, dtype=np.uint8).reshape(6, 11)
    save(root / "training/labels/frame0.png", ids)
    assert build_dataset("mapillary", "train", root)[0][1].flatten().tolist() == [*range(65), 255]
    assert Mapillary.info.num_classes == len(set(Mapillary.info.colours)) == 65
    known = {"curb": 2, "road": 13, "sky": 27, "car": 55, "ego vehicle": 64}
    assert {name: Mapillary.info.classes.index(name) for name in known} == known


def test_mapillary_labels_of_version_2(tmp_path):
    root = make_mapillary(tmp_path, labels="v2.0/labels")
    with pytest.raises(FileNotFoundError, match=r"frame0\.jpg has no label: expected .*/labels/"):
        build_dataset("mapillary", "train", root)
    root = make_mapillary(tmp_path)
    save(root / "training/labels/frame0.png", np.full((96, 160), 123, np.uint8))
    with pytest.raises(ValueError, match=r"ids \[123\].*expected 0\.\.65.*version 2\.0 are others"):
        build_dataset("mapillary", "train", root)[0]


# ---- a data set of one's own ----


@pytest.mark.parametrize("coding", ["ids", "colours"])
def test_custom_labels(tmp_path, coding):
    data = build_dataset("custom", "train", make_custom(tmp_path, coding))
    assert data.info.classes == ("road", "pole", "car")
    assert data.info.small_classes == ("pole",)
    assert data.info.colours[2] == (0, 0, 142)
    label = data[0][1][0]
    assert label.unique_consecutive().tolist() == [0, 1, 2, 255]  # both ignored values are void


def test_custom_images_may_be_listed(tmp_path):
    root = make_custom(tmp_path)
    (root / "train.txt").write_text("train/town/frame1.jpg\n\nval/town/frame0.jpg\n")
    data = build_dataset("custom", "train", root)
    listed = ("train/town/frame1.jpg", "val/town/frame0.jpg")
    assert [data.name_of(i) for i in range(len(data))] == [f"{root}/images/{n}" for n in listed]
    assert data.pairs[1][1] == root / "labels/val/town/frame0.png"
    assert len(build_dataset("custom", "val", root)) == 1  # without a list, by folder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n", "lists no images"),
        ("train/town/frame0.jpg\ngone.jpg\n", "train.txt line 2: there is no "),
        ("train/town/frame0\n", "line 1: 'train/town/frame0' does not end in .png, .jpg"),
        ("../images/train/town/frame0.jpg", "is not a path below images/"),
        ("/etc/frame0.jpg", "is not a path below images/"),
        ("train/town/frame0.jpg\ntrain/town/frame0.jpg\n", "are the same frame; remove one"),
    ],
)
def test_custom_list_that_cannot_be_used(tmp_path, text, words):
    root = make_custom(tmp_path)
    (root / "train.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        build_dataset("custom", "train", root)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_custom_without_images_or_split(tmp_path):
    root = make_custom(tmp_path)
    with pytest.raises(FileNotFoundError, match="images/test does not exist: --custom-data-dir"):
        build_dataset("custom", "test", root)
    (root / "classes.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.yaml does not exist: write one"):
        build_dataset("custom", "train", root)


def test_class_file_may_hold_json(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(json.dumps({"classes": [{"name": "a", "colour": [1, 2, 3]}]}))
    info, labels = read_class_file(path, "mine")
    assert (info.name, info.classes, info.colours) == ("mine", ("a",), ((1, 2, 3),))
    assert labels.table[[0, 255]].tolist() == [0, 255]


A, B = "{name: a, colour: [1, 2, 3]}", "{name: b, colour: [4, 5, 6]}"
REFUSED = {
    "[": "is not YAML",
    "": "the file must be a mapping",
    f"classes: [{A}]\ncolors: 3": "unknown 'colors'; known are classes, ignore, labels",
    "labels: ids": "the file lacks 'classes'",
    "classes: []": "a list of 1 to 254 entries",
    "classes: [road]": "class 1 must be a mapping of colour, id, name, small; got 'road'",
    f"classes: [{A}, {{name: b}}]": "class 2 lacks 'colour'",
    "classes: [{name: a, colour: [1, 2]}]": "colour [1, 2] is not [red, green, blue]",
    "classes: [{name: a, colour: [1, 2, 256]}]": "colour [1, 2, 256] is not",
    "classes: [{name: a, colour: [1, 2, 3], small: 1}]": "class 1: small is 1",
    f"classes: [{A}, {A}]": "name 'a' occurs twice",
    f"classes: [{A}, {{name: b, colour: [1, 2, 3]}}]": "colour (1, 2, 3) occurs twice",
    f"classes: [{A}, {{name: b, colour: [4, 5, 6], id: 0}}]": "id 0 occurs twice",
    "classes: [{name: a, colour: [1, 2, 3], id: 256}]": "id 256 is not a whole number",
    "classes: [{name: a, colour: [1, 2, 3], id: yes}]": "id True is not a whole number",
    f"classes: [{A}, {B}]\nignore: 1": "id 1 is ignored and belongs to a class",
    f"classes: [{A}]\nlabels: rgb": "labels is 'rgb'; choose ids or colours",
    f"classes: [{A}]\nlabels: colours\nignore: 255": "give a colour or a list",
    f"classes: [{A}]\nlabels: colours\nignore: [1, 2, 3]": "colour [1, 2, 3] is ignored and",
    "classes: [{name: a, colour: [1, 2, 3], id: 4}]\nlabels: colours": "'a' has an id, which",
}


@pytest.mark.parametrize("text", REFUSED)
def test_class_file_that_cannot_be_used(tmp_path, text):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"classes\.yaml") as error:
        read_class_file(path, "mine")
    assert str(error.value).startswith(str(path))
    assert REFUSED[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_message_about_ids_says_which_there_are(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(CLASSES_YAML)
    _, labels = read_class_file(path, "mine")
    assert "(0..1, 7) or its ignored ones (9, 255)" in labels.expected
