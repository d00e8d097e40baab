"""Every experiment script: says what it should, and runs, train then val then speed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import figures, make_camvid, make_cityscapes

from argparser import parse_args

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("configs/*/*/*.sh"))
EXPERIMENTS = sorted({script.parent / script.stem.rpartition("_")[0] for script in SCRIPTS})
MODES = ("train", "val", "speed")
OF_TRAINING = ("factor", "weight", "budgets", "reward", "normalise", "warmup", "calibrate")
TINY = {
    "cityscapes": "--res 512 --crop-res 128",
    "camvid": "--res 128 --crop-res 64",
    "synthetic": "--synthetic-size 64 128 --synthetic-train-images 2 --synthetic-val-images 1 "
    "--res 128 --crop-res 64",
}


def called(script: Path, *flags: str, python: str = sys.executable, folder: Path = ROOT):
    """Run a script from `folder`."""
    environment = {
        **os.environ,
        "PYTHON": python,
        "PYTHONPATH": f"{ROOT / 'segblocks'}{os.pathsep}{ROOT}",
        "CXX": "no-such-compiler",  # compiling the dense baseline has a test of its own
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [script, *flags], env=environment, cwd=folder, capture_output=True, text=True
    )


def parsed(script: Path):
    """The arguments that a script gives to train.py."""
    words = called(script, python="echo").stdout.split()
    assert words[0] == str(ROOT / "train.py")
    return parse_args(words[1:])


@pytest.fixture(autouse=True)
def data_folders(monkeypatch):
    for name in ("CITYSCAPES", "CAMVID"):
        monkeypatch.setenv(f"SEGBLOCKS_{name}_DIR", "/nowhere")


@pytest.mark.parametrize(
    "script", SCRIPTS, ids=lambda s: s.relative_to(ROOT / "configs").as_posix()
)
def test_script_is_its_experiment(script):
    args, train = (
        parsed(script),
        parsed(script.with_name(f"{script.stem.rpartition('_')[0]}_train.sh")),
    )
    dataset, model = script.parts[-3:-1]
    experiment, _, mode = script.stem.rpartition("_")
    assert (args.mode, args.dataset) == (mode, dataset)
    assert args.name == f"{dataset}/{model}/{experiment}"
    assert args.exp_dir == str(ROOT / "exp")
    assert args.resume_best is (mode != "train")
    for name in vars(args):  # what builds the network agrees among the three scripts
        if name in ("backbone", "num_features", "synthetic_size") or name.startswith("segblocks"):
            if mode != "train" and any(word in name for word in OF_TRAINING):
                continue
            assert getattr(args, name) == getattr(train, name), name
    targets = {"baseline": 0.5, "reinforce40": 0.4, "reinforce20": 0.2, "reinforce_any": 0.4}
    target = targets[experiment]
    assert args.segblocks_percent_target == target
    assert args.segblocks_policy == ("disabled" if experiment == "baseline" else "reinforce")


def test_published_cityscapes_values():
    args = parsed(ROOT / "configs/cityscapes/swiftnet_rn18/reinforce40_train.sh")
    published = {
        "res": 2048, "crop_res": [1024], "epochs": 350, "batch_size": 8, "lr": 4e-4,
        "lr_end": 1e-6, "weight_decay": 1e-4, "lr_finetune_factor": 0.25, "jitter": 0.3,
        "pretrain_backbone": True, "segblocks_block_size": 128, "loss": "crossentropy",
        "scale_min": 0.5, "scale_max": 2.0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published


@pytest.mark.parametrize(
    "experiment", EXPERIMENTS, ids=lambda e: e.relative_to(ROOT / "configs").as_posix()
)
def test_script_runs_from_anywhere(experiment, tmp_path):
    dataset = experiment.parts[-3]
    flags = [*TINY[dataset].split(), "--exp-dir", "experiments", "--device", "cpu"]
    flags += ["--num-workers", "0", "--speed-repeats", "1", "--speed-images", "1"]
    if dataset != "synthetic":  # a relative folder, seen from where the script is called
        make = {"camvid": make_camvid, "cityscapes": make_cityscapes}[dataset]
        make(tmp_path / "data")
        flags += [f"--{dataset}-data-dir", "data"]
    training = ["--pretrain-backbone", "no", "--batch-size", "2", "--max-steps", "1"]
    for mode in MODES:
        script = experiment.with_name(f"{experiment.name}_{mode}.sh")
        done = called(script, *flags, *(training if mode == "train" else ()), folder=tmp_path)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "experiments" / experiment.relative_to(ROOT / "configs")
    assert {"run.log", "checkpoint.pth", "checkpoint_best.pth"} <= set(os.listdir(folder))
    if experiment.name == "reinforce_any":
        validated = figures(folder, "curve.json")["budgets"]
        timed = figures(folder, "speed.json")["budgets"]
        assert (len(validated), len(timed)) == (10, 3)
    else:
        validated = [figures(folder, "val.json")]
        timed = [figures(folder, "speed.json")]
    assert all(0 <= found["miou"] <= 1 for found in validated)
    engines = [row["engine"] for row in timed[-1]["rows"]]
    blocks = [] if experiment.name == "baseline" else ["blocks eager", "blocks fast"]
    assert engines == ["dense eager", "dense best", *blocks]
