"""Input that cannot work: one line that says what to do, status not 0, nothing half-written."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import REINFORCE, SYNTHETIC, arguments, make_camvid, run, tiny_backbone  # noqa: F401

import train

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("tiny_backbone")


class Call:
    """Calls train.py in this process and checks how it refuses."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture):
        self.folder, self.capsys = folder, capsys

    def refuses(self, *flags: str) -> str:
        """The message, after a check that it is one line and that no file is left behind."""
        self.capsys.readouterr()
        before = self._files()
        assert train.main(arguments(self.folder / "exp", *flags)) == 1
        (line,) = self.capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        left = self._files() - before
        # Data is read while the run is on, so its log exists then, and says what happened.
        assert all(name == "run.log" or "tfevents" in name for name in left), left
        return line

    def _files(self) -> set[str]:
        return {path.name for path in self.folder.glob("exp/**/*") if path.is_file()}


@pytest.fixture
def call(tmp_path, capsys):
    return Call(tmp_path, capsys)


@pytest.fixture
def camvid(tmp_path):
    return make_camvid(tmp_path / "data")


def of(camvid: Path) -> tuple[str, ...]:
    return ("--dataset", "camvid", "--camvid-data-dir", str(camvid))


# ---- flags and settings ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--backbone resnet19", "unknown backbone 'resnet19'"),
        ("--dataset imagenet", "unknown data set 'imagenet'; choose from cityscapes"),
        ("--device tpu", "accepted are auto, cpu, cuda"),
        ("--device cuda:99", "CUDA devices here; use --device cpu or auto"),
        ("--batch-size 7", "has 6 images, fewer than one"),
        ("--accumulate 4", "has 6 images, fewer than one step takes"),
        ("--segblocks-policy random --segblocks-block-size 96", "96: features at a stride of 32"),
        ("--segblocks-policy random --segblocks-block-size 33", "an even number of pixels"),
        ("--synthetic-size 16 16", "too small"),
        ("--num-features 2", "num_features is 2"),
        ("--class-weights 1 2", "--class-weights gives 2 class weights for 19 classes"),
        ("--class-weights gone.json", "gone.json is neither a number nor a file"),
    ],
)
def test_settings(call, flags, words):
    assert words in call.refuses(*flags.split())


# ---- data ----


def test_missing_data_folder(call, tmp_path):
    line = call.refuses(*of(tmp_path / "nowhere"))
    assert "nowhere does not exist" in line
    assert "--camvid-data-dir" in line


def test_no_images(call, camvid):
    for image in (camvid / "train").iterdir():
        image.unlink()
    assert "holds no images" in call.refuses(*of(camvid))


def test_image_without_label(call, camvid):
    (camvid / "valannot" / "frame0.png").unlink()
    line = call.refuses(*of(camvid))
    assert "frame0.png has no label" in line


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("split", ["train", "trainannot", "val"])
def test_truncated_file_is_named(call, camvid, split, workers):
    file = camvid / split / "frame0.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    line = call.refuses(*of(camvid), "--num-workers", workers)
    assert f"{split}/frame0.png: cannot read this" in line


def test_file_that_is_no_image(call, camvid):
    (camvid / "train" / "frame1.png").write_text("not an image")
    assert "train/frame1.png: cannot read this image" in call.refuses(*of(camvid))


def test_label_ids_outside_the_table(call, camvid):
    _write(camvid / "trainannot" / "frame0.png", np.full((96, 128), 77, np.uint8))
    assert "frame0.png: label ids [77] are not in the table" in call.refuses(*of(camvid))


def test_label_of_another_size(call, camvid):
    _write(camvid / "valannot" / "frame0.png", np.zeros((48, 64), np.uint8))
    line = call.refuses("--mode", "train", *of(camvid))
    assert "label is 64x48 pixels but its image" in line


def test_images_of_two_sizes_in_speed_mode(call, camvid):
    run(call.folder / "exp", *of(camvid), "--max-steps", "1")
    for part in ("val", "valannot"):
        _write(camvid / part / "frame1.png", np.zeros((64, 64), np.uint8))
    line = call.refuses("--mode", "speed", *of(camvid))
    assert "images of one size" in line


def _write(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


# ---- checkpoints ----


@pytest.mark.parametrize("mode", ["val", "speed"])
@pytest.mark.parametrize(
    ("flags", "name"), [((), "checkpoint.pth"), (("--resume-best", "y"), "checkpoint_best.pth")]
)
def test_missing_checkpoint_is_named(call, mode, flags, name):
    line = call.refuses("--mode", mode, "--name", "a/b", *flags)
    assert f"no checkpoint at {call.folder / 'exp' / 'a' / 'b' / name}" in line


def test_missing_checkpoint_file_in_training(call):
    assert "no checkpoint at gone.pth" in call.refuses("--resume", "gone.pth")


@pytest.fixture
def trained(call):
    return run(call.folder / "exp", "--max-steps", "1") / "checkpoint.pth"


@pytest.mark.parametrize("mode", ["train", "val", "speed"])
def test_checkpoint_of_another_architecture(call, trained, mode):
    line = call.refuses("--mode", mode, "--resume", str(trained), "--num-features", "24")
    assert f"{trained} does not fit this network" in line


def test_checkpoint_of_other_classes(call, trained, camvid):
    line = call.refuses("--mode", "val", "--resume", str(trained), *of(camvid))
    assert "trained for 19 classes, this network has 11" in line


def test_checkpoint_without_policy(call, trained):
    line = call.refuses("--mode", "val", "--resume", str(trained), *REINFORCE)
    assert "has no policy network" in line


def test_weights_alone_cannot_be_trained_further(call, trained):
    weights = torch.load(trained, weights_only=True)["state_dict"]
    torch.save(weights, trained.with_name("weights.pth"))
    line = call.refuses("--resume", str(trained.with_name("weights.pth")))
    assert "cannot be trained further: it lacks args" in line


def test_truncated_checkpoint(call, trained):
    trained.write_bytes(trained.read_bytes()[:5000])
    assert "truncated" in call.refuses("--mode", "val")


def test_file_that_is_no_checkpoint(call, tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    line = call.refuses("--mode", "val", "--resume", str(tmp_path / "note.txt"))
    assert "note.txt is not a checkpoint" in line


class Evil:
    def __reduce__(self):
        return os.system, ("echo ran > ran.txt",)


def test_checkpoint_that_runs_code_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth", pickle_module=pickle)
    line = call.refuses("--mode", "val", "--resume", str(tmp_path / "evil.pth"))
    assert "refused: it asks to run code" in line
    assert not (tmp_path / "ran.txt").exists()


def test_folder_that_cannot_be_written(call, tmp_path):
    (tmp_path / "exp").write_text("a file where the folder should be")
    assert "exp" in call.refuses()


# ---- how it ends ----


def test_process_ends_with_status_1_and_one_line(tmp_path):
    command = [sys.executable, ROOT / "train.py", *SYNTHETIC, "--exp-dir", tmp_path / "exp"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'segblocks'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [*command, "--backbone", "resnet19"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown backbone 'resnet19'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "exp").exists()


def test_debug_shows_the_traceback(call):
    with pytest.raises(train.UserError, match="unknown backbone"):
        train.main(arguments(call.folder / "exp", "--backbone", "resnet19", "--debug", "yes"))


def test_a_fault_of_ours_keeps_its_traceback(call, monkeypatch):
    monkeypatch.setattr(train.Trainer, "fit", lambda self, log: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(arguments(call.folder / "exp"))
