"""Every experiment script: says what it should, and runs, train then val then speed."""

import os
import shutil
import subprocess
import sys

import pytest
from experiments import EXPERIMENTS, MODES, ROOT, SCRIPTS, called, command_line, label, run_script
from layouts import make_mapillary
from PIL import Image
from tiny import figures, make_camvid, make_cityscapes

from argparser import parse_args
from utils.speed import benchmark

OF_TRAINING = (
    "factor", "weight", "budget", "reward", "normalise", "warmup", "calibrate", "epochs",
    "recolour",
)  # fmt: skip
TINY = {
    "cityscapes": "--res 256 --crop-res 128",
    "camvid": "--res 128 --crop-res 64",
    "mapillary": "--res 256 --crop-res 128 --val-res 128",
    "synthetic": "--synthetic-size 64 128 --synthetic-train-images 2 --synthetic-val-images 1 "
    "--res 128 --crop-res 64",
}


def make_small_cityscapes(root):
    for path in make_cityscapes(root).rglob("*.png"):
        Image.open(path).resize((256, 128), Image.Resampling.NEAREST).save(path)


MAKE = {
    "camvid": make_camvid,
    "cityscapes": make_small_cityscapes,
    "mapillary": make_mapillary,
}
# One checkpoint for every budget.
ANY = {(data, "rn18"): ["reinforce_any"] for data in ("camvid", "cityscapes", "synthetic")}
BACKBONES = {"rn18": "resnet18", "rn50": "resnet50", "effl1": "efficientnet_lite1"}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    for dataset in MAKE:
        monkeypatch.setenv(f"SEGBLOCKS_{dataset.upper()}_DIR", "/nowhere")
    monkeypatch.setenv("CXX", "no-such-compiler")  # compiling the dense baseline has its own test
    monkeypatch.setattr(benchmark, "WARM_UP", 1)


def parsed(script):
    return parse_args(list(command_line(script)))


@pytest.mark.parametrize("script", SCRIPTS, ids=label)
def test_script_is_its_experiment(script):
    experiment, _, mode = script.stem.rpartition("_")
    args, train = parsed(script), parsed(script.with_name(f"{experiment}_train.sh"))
    dataset, model = script.parts[-3:-1]
    assert (args.mode, args.dataset) == (mode, dataset)
    assert args.backbone == BACKBONES[model.removeprefix("swiftnet_")]
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
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("dataset", sorted({script.parts[-3] for script in SCRIPTS}))
def test_every_experiment_has_its_three_scripts(dataset):
    models = {"cityscapes": ["rn18", "rn50", "effl1"], "synthetic": ["rn18"]}
    expected = {
        f"{dataset}/swiftnet_{model}/{experiment}_{mode}.sh"
        for model in models.get(dataset, ["rn18", "rn50"])
        for experiment in ("baseline", "reinforce20", "reinforce40", *ANY.get((dataset, model), ()))
        for mode in MODES
    }
    assert expected == {label(script) for script in SCRIPTS if script.parts[-3] == dataset}


@pytest.mark.parametrize("model", BACKBONES)
def test_published_cityscapes_values(model):
    args = parsed(ROOT / f"configs/cityscapes/swiftnet_{model}/reinforce40_train.sh")
    published = {
        "res": 2048, "crop_res": [1024], "epochs": 350, "batch_size": 8, "lr": 4e-4,
        "lr_end": 1e-6, "weight_decay": 1e-4, "lr_finetune_factor": 0.25, "jitter": 0.3,
        "pretrain_backbone": True, "segblocks_block_size": 128, "num_features": None,
        "loss": "bootstrap_ce" if model == "effl1" else "crossentropy",
        "scale_min": 0.5, "scale_max": 2.0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published


def tiny_flags(experiment, tmp_path) -> list[str]:
    """What makes a script quick, with data in a folder relative to where it is called."""
    dataset = experiment.parts[-3]
    flags = [*TINY[dataset].split(), "--exp-dir", "experiments", "--device", "cpu"]
    flags += ["--num-workers", "0", "--speed-repeats", "1", "--speed-images", "1"]
    if dataset in MAKE:
        MAKE[dataset](tmp_path / "data")
        flags += [f"--{dataset}-data-dir", "data"]
    return flags


TRAINING = ("--pretrain-backbone", "no", "--batch-size", "2", "--max-steps", "1")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=label)
def test_scripts_run(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = tiny_flags(experiment, tmp_path)
    for mode in MODES:
        script = experiment.with_name(f"{experiment.name}_{mode}.sh")
        assert run_script(script, *flags, *(TRAINING if mode == "train" else ())) == 0
    folder = tmp_path / "experiments" / label(experiment)
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
    blocks = [] if experiment.name == "baseline" else ["all high", "blocks eager", "blocks fast"]
    assert engines == ["dense eager", "dense best", *blocks]


def test_a_script_says_that_there_is_no_torch_yet(tmp_path):
    """A clone without .venv, and a python3 without packages."""
    script = "configs/camvid/swiftnet_rn18/baseline_val.sh"
    for name in (script, "configs/common.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    bare = tmp_path / "bin" / "python3"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    environment = {"PATH": f"{bare.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", tmp_path / script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "python3 has no PyTorch: run scripts/setup.sh" in done.stderr


def test_a_script_runs_from_anywhere_in_a_process_of_its_own(tmp_path):
    script = ROOT / "configs/camvid/swiftnet_rn18/reinforce40_train.sh"
    done = called(script, *tiny_flags(script, tmp_path), *TRAINING, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "experiments/camvid/swiftnet_rn18/reinforce40/checkpoint.pth").is_file()
