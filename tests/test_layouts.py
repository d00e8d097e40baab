"""Every data set in its official layout: trained, validated, checked, and broken on purpose."""

import json

import numpy as np
import pytest
from layouts import LAYOUTS
from PIL import Image
from tiny import arguments, figures, run, save, scene, tiny_backbone  # noqa: F401

import train
from argparser import build_parser
from dataloaders import DATASETS, DatasetInfo, build_dataset, check, file_datasets
from dataloaders.decode import IdLabels, label_table
from dataloaders.files import PairedFiles

pytestmark = pytest.mark.usefixtures("tiny_backbone")
SMALL = ("--res", "128", "--crop-res", "64", "--batch-size", "2", "--max-steps", "1")


@pytest.fixture(autouse=True)
def _no_folders_from_outside(monkeypatch):
    for kind in file_datasets().values():
        monkeypatch.delenv(kind.variable, raising=False)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture
def root(layout, tmp_path):
    return layout.make(tmp_path / "data")


def test_train_then_validate(layout, root, tmp_path):
    flags = [*SMALL, *layout.flags(root)]
    folder = run(tmp_path, *flags)
    run(tmp_path, *flags, "--mode", "val")
    found = figures(folder, "val.json")
    assert found["images"] == layout.images[1]
    assert 0 <= found["miou"] <= 1
    info = build_dataset(layout.dataset, "val", root).info
    assert list(found["iou"]) == list(info.classes)
    assert sum(value is not None for value in found["iou"].values()) == info.num_classes


def test_the_folder_may_come_from_the_environment(layout, root, monkeypatch):
    kind = file_datasets()[layout.dataset]
    monkeypatch.setenv(kind.variable, str(root))
    assert kind.variable == f"SEGBLOCKS_{layout.dataset.upper()}_DIR"
    assert len(build_dataset(layout.dataset, "train")) == layout.images[0]


def test_a_folder_that_has_moved_is_no_changed_flag(tmp_path):
    layout = LAYOUTS["custom"]
    root = layout.make(tmp_path / "data")
    run(tmp_path, *SMALL, *layout.flags(root))
    moved = root.rename(tmp_path / "moved")
    folder = run(tmp_path, *SMALL, *layout.flags(moved), "--max-steps", "2", "--val-res", "64")
    log = (folder / "run.log").read_text()
    assert "changed since the checkpoint: --val-res was 0, now 64" in log
    assert "data-dir was" not in log


class Mine(PairedFiles):
    """A data set as a user would add one: the module's part of it."""

    info = DatasetInfo("my_streets", ("a", "b"), ((1, 1, 1), (2, 2, 2)))
    splits = ("train", "val")
    flag, variable = "--my-streets-data-dir", "SEGBLOCKS_MY_STREETS_DIR"
    layout = "{train,val}/<name>.png and {train,val}/<name>.ids.png"
    labels = IdLabels(label_table({0: 0, 1: 1}), "0 or 1")

    def find_pairs(self):
        return [(self.root / self.split / "0.png", self.root / self.split / "0.ids.png")]


def test_a_data_set_is_a_class_and_a_line_in_the_registry(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "my_streets", Mine)
    for split in Mine.splits:
        image, label = scene(0, 64, 128, classes=2)
        save(tmp_path / "data" / split / "0.png", image)
        save(tmp_path / "data" / split / "0.ids.png", label)
    monkeypatch.setenv(Mine.variable, str(tmp_path / "data"))
    folder = run(tmp_path, "--dataset", "my_streets", *SMALL, "--batch-size", "1")
    run(tmp_path, "--dataset", "my_streets", *SMALL, "--mode", "val")
    assert list(figures(folder, "val.json")["iou"]) == ["a", "b"]
    assert check.main(["--dataset", "my_streets", "--num-workers", "0"]) == 0
    help_text = build_parser().format_help()
    assert Mine.flag in help_text
    assert "my_streets" in help_text


def refused(layout, root, tmp_path, capsys) -> tuple[str, str]:
    """What train.py says, in one line, and that `dataloaders.check` says it too."""
    capsys.readouterr()
    assert train.main(arguments(tmp_path / "exp", *SMALL, *layout.flags(root))) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert check.main([*layout.flags(root), "--num-workers", "0"]) == 1
    return line.removeprefix("error: "), capsys.readouterr().out


def test_missing_label(layout, root, tmp_path, capsys):
    for label in (layout.label, layout.val_label):
        (root / label).unlink()
    line, report = refused(layout, root, tmp_path, capsys)
    assert f"{root / layout.image} has no label: expected {root / layout.label}" in line
    for label in (layout.label, layout.val_label):  # the tool names every one
        assert f"{root / label}: cannot read this label" in report


def test_wrong_palette(layout, root, tmp_path, capsys):
    pixels = np.array(Image.open(root / layout.label))
    pixels[2, 3] = (1, 20, 255) if layout.colours else 200
    save(root / layout.label, pixels)
    line, report = refused(layout, root, tmp_path, capsys)
    wrong = (
        "colours (1, 20, 255) (r, g, b) are not in the palette, 1 pixels, the first at x 3, y 2"
        if layout.colours
        else "label ids [200] are not in the table"
    )
    assert line.startswith(f"{root / layout.label}: {wrong}; expected")
    assert line in report


def test_wrong_size(layout, root, tmp_path, capsys):
    pixels = np.array(Image.open(root / layout.label))
    save(root / layout.label, pixels[:-1, :-2])
    line, report = refused(layout, root, tmp_path, capsys)
    height, width = pixels.shape[:2]
    assert f"{root / layout.label}: label is {width - 2}x{height - 1} pixels but its image" in line
    assert line in report


def test_labels_of_the_other_kind(layout, root, tmp_path, capsys):
    pixels = np.array(Image.open(root / layout.label))
    other = pixels[..., 0] if layout.colours else np.repeat(pixels[..., None], 3, axis=2)
    save(root / layout.label, np.ascontiguousarray(other))
    line, _ = refused(layout, root, tmp_path, capsys)
    assert "label has pixel format" in line


def test_check_of_a_sound_data_set(layout, root, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert check.main([*layout.flags(root), "--num-workers", "1", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    for split, count in zip(("train", "val"), layout.images):
        found = report["splits"][split]
        data = build_dataset(layout.dataset, split, root)
        labels = [data[i][1].numpy() for i in range(count)]
        assert found["images"] == count == sum(found["sizes"].values())
        assert found["faults"] == []
        for i, (name, entry) in enumerate(found["classes"].items()):
            assert name == data.info.classes[i]
            assert entry["pixels"] == sum(int((label == i).sum()) for label in labels)
            assert entry["images"] == sum(bool((label == i).any()) for label in labels)
            assert name in printed
        assert found["ignored_pixels"] == sum(int((label == 255).sum()) for label in labels)
    # What it wrote is what --class-weights takes.
    flags = [*SMALL, *layout.flags(root), "--class-weights", str(file), "--loss", "ohem"]
    run(tmp_path, *flags)
