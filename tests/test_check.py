"""`python -m dataloaders.check` beyond what each layout is checked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from layouts import LAYOUTS, make_mapillary
from tiny import make_camvid

from dataloaders import check, file_datasets
from utils.class_weights import median_frequency_weights

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_folders_from_outside(monkeypatch):
    for kind in file_datasets().values():
        monkeypatch.delenv(kind.variable, raising=False)


def of(root: Path) -> list[str]:
    return [*LAYOUTS["camvid"].flags(root), "--num-workers", "0"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_bad_file_is_reported_image_and_label_alike(tmp_path, capsys, workers):
    root = make_camvid(tmp_path, train=3)
    bad = ["train/frame0.png", "trainannot/frame0.png", "train/frame2.png", "valannot/frame0.png"]
    for name in bad:
        (root / name).write_bytes(b"not an image")
    assert check.main([*of(root), "--num-workers", workers]) == 1
    report = capsys.readouterr().out
    found = [line.split(":")[0].strip() for line in report.splitlines() if "not an image" in line]
    assert found == [str(root / name) for name in bad]
    assert "faults: 3" in report
    assert "faults: 1" in report


def test_all_sizes_are_counted(tmp_path, capsys):
    flags = LAYOUTS["mapillary"].flags(make_mapillary(tmp_path))
    assert check.main([*flags, "--num-workers", "0"]) == 0
    report = capsys.readouterr().out
    assert "2 images: 160×96 (1), 120×160 (1)" in report
    assert "2 images: 256×192 (1), 96×160 (1)" in report


def test_only_the_splits_asked_for_are_read(tmp_path, capsys):
    root = make_camvid(tmp_path)
    (root / "valannot/frame0.png").unlink()
    assert check.main([*of(root), "--splits", "train"]) == 0
    assert "camvid/val" not in capsys.readouterr().out


def test_classes_without_a_pixel_are_named(tmp_path, capsys):
    flags = ["--dataset", "synthetic", "--synthetic-size", "32", "64"]
    flags += ["--synthetic-train-images", "1", "--synthetic-val-images", "1", "--num-workers", "0"]
    assert check.main(flags) == 0
    assert "never labelled: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--dataset", "camvid"], 2, "needs its folder: give --camvid-data-dir DIR"),
        (["--dataset", "imagenet"], 1, "unknown data set 'imagenet'; choose from cityscapes"),
        (["--dataset", "camvid", "--camvid-data-dir", "/no/where"], 1, "/no/where does not exist"),
        (["--dataset", "synthetic", "--json", "/no/where.json"], 2, "its folder does not exist"),
        (["--dataset", "synthetic", "--splits", "all"], 1, "has no split 'all'"),
    ],
)
def test_what_cannot_start_ends_in_one_line(capsys, flags, status, words):
    try:
        found = check.main(flags)
    except SystemExit as stopped:
        found = stopped.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (found, words in line) == (status, True), line


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "dataloaders.check", *of(make_camvid(tmp_path))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "segblocks")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("camvid/train\n  2 images: 128×96 (2)\n")


def test_median_frequency_weights_by_hand():
    pixels = {"road": 60, "pole": 3, "car": 20, "sky": 0}
    of_images = {"road": 100, "pole": 50, "car": 100, "sky": 0}
    weights = median_frequency_weights(pixels, of_images)  # frequencies 0.6, 0.06, 0.2
    assert weights == pytest.approx({"road": 1 / 3, "pole": 10 / 3, "car": 1.0, "sky": 1.0})
