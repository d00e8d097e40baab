"""The command line: published names and defaults, booleans, and refusals in one line."""

import pytest

from argparser import build_parser, parse_args
from utils.flags.types import boolean, budget

PUBLISHED = {
    "mode": "train",
    "name": "default",
    "resume": "",
    "resume_best": False,
    "viz": [],
    "num_viz_images": 5,
    "profiler": False,
    "dataset": "cityscapes",
    "num_workers": 7,
    "res": 2048,
    "crop_res": [1024],
    "jitter": 0.3,
    "rotate": 0,
    "epochs": 350,
    "batch_size": 8,
    "lr": 4e-4,
    "lr_finetune_factor": 0.25,
    "lr_end": 1e-6,
    "weight_decay": 1e-4,
    "loss": "crossentropy",
    "backbone": "resnet18",
    "pretrain_backbone": True,
    "num_features": None,  # the backbone's own: 128, 48 for EfficientNet-Lite
    "fp16": True,
    "seed": 0,
    "segblocks_policy": "disabled",
    "segblocks_block_size": 128,
    "segblocks_percent_target": 0.5,
    "segblocks_quantize_percentage": 1 / 16,
    "segblocks_sparsity_weight": 1,
    "segblocks_policy_lr_factor": 1,
    "segblocks_policy_wd_factor": 1,
}


@pytest.fixture(autouse=True)
def data_folder(monkeypatch):
    monkeypatch.setenv("SEGBLOCKS_CITYSCAPES_DIR", "/somewhere/cityscapes")
    for name in ("CAMVID", "CAMVID_FULL", "MAPILLARY"):
        monkeypatch.delenv(f"SEGBLOCKS_{name}_DIR", raising=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flag_and_default(name):
    assert f"--{name.replace('_', '-')}" in build_parser().format_help()
    assert getattr(parse_args([]), name) == PUBLISHED[name]


@pytest.mark.parametrize(
    "text", ["yes", "true", "t", "y", "1", "no", "false", "f", "n", "0", "YES"]
)
def test_booleans(text):
    assert parse_args(["--profiler", text]).profiler is boolean(text)
    assert boolean(text) is (text.lower() in ("yes", "true", "t", "y", "1"))


def test_every_flag_has_help_in_a_group():
    parser = build_parser()
    for action in parser._actions:
        assert action.help, action.option_strings
    grouped = [a for group in parser._action_groups[2:] for a in group._group_actions]
    assert len(grouped) == len(parser._actions) - 1  # all but --help


def test_batch_size_is_one_in_speed_mode_unless_given():
    assert parse_args(["--mode", "speed"]).batch_size == 1
    assert parse_args(["--mode", "speed", "--batch-size", "4"]).batch_size == 4


def test_data_folders_come_from_flag_before_environment(monkeypatch):
    monkeypatch.setenv("SEGBLOCKS_CAMVID_DIR", "/from/environment")
    assert parse_args(["--dataset", "camvid"]).camvid_data_dir == "/from/environment"
    args = parse_args(["--dataset", "camvid", "--camvid-data-dir", "/from/flag"])
    assert args.camvid_data_dir == "/from/flag"


@pytest.mark.parametrize(
    ("line", "resume", "best"),
    [
        ("--resume-best yes --resume a.pth", "a.pth", False),
        ("--resume a.pth --resume-best yes", "", True),
        ("--resume a.pth --resume b.pth", "b.pth", False),
        ("--resume a.pth --resume-best no", "a.pth", False),
        ("--resume-best yes --resume-best no", "", False),
    ],
)
def test_the_later_of_resume_and_resume_best_counts(line, resume, best):
    args = parse_args(line.split())
    assert (args.resume, args.resume_best) == (resume, best)


@pytest.mark.parametrize(
    ("text", "value"), [("0.4", 0.4), ("40%", 0.4), ("51", 51), ("1", 1), ("1.0", 1.0), ("0", 0)]
)
def test_budget(text, value):
    assert budget(text) == value
    assert type(budget(text)) is type(value)


@pytest.mark.parametrize("text", ["1/16", "0.0625"])
def test_shares_may_be_fractions(text):
    args = parse_args(["--segblocks-quantize-percentage", text])
    assert args.segblocks_quantize_percentage == 1 / 16


REFUSED = {
    "--mode val --segblocks-policy random --budget 0.2 1": "1 is one block; give 1.0",
    "--profiler maybe": "neither yes",
    "--mode val --profiler yes": "--mode train and speed",
    "--epochs 0": "at least 1",
    "--batch-size two": "not a number",
    "--jitter 1.5": "at most 1",
    "--lr 0": "above 0",
    "--lr nan": "out of range",
    "--segblocks-percent-target 40": "at most 1",
    "--segblocks-quantize-percentage 1/0": "not a number",
    "--segblocks-policy clever": "invalid choice",
    "--loss l2": "invalid choice",
    "--ema 1": "below 1",
    "--cache-images some": "invalid choice",
    "--loss ohem --ohem-threshold 0": "above 0",
    "--loss ohem --ohem-min-kept 0": "at least 1",
    "--val-res -1": "at least 0",
    "--dataset mapillary": "SEGBLOCKS_MAPILLARY_DIR",
    "--dataset camvid_full": "give --camvid-full-data-dir DIR or set SEGBLOCKS_CAMVID_FULL_DIR",
    "--mode sleep": "invalid choice",
    "--no-such-flag 1": "unrecognized",
    "--name ../outside": "relative path",
    "--name /outside": "relative path",
    "--mode val --resume none": "needs a checkpoint",
    "--scale-min 2 --scale-max 1": "larger than",
    "--crop-res 1 2 3": "one or two numbers",
    "--budget 0.4 --segblocks-policy reinforce": "--mode val and speed",
    "--mode val --budget 0.4": "--segblocks-policy",
    "--mode val --segblocks-policy reinforce --budget 1.5": "neither a share",
    "--mode val --segblocks-policy reinforce --budget -3": "neither a share",
    "--mode speed --segblocks-policy oracle": "labels",
    "--segblocks-policy reinforce --epochs 9 --segblocks-refine-epochs 9": "too few",
    "--segblocks-policy reinforce --epochs 9 --segblocks-policy-epochs 5 "
    "--segblocks-refine-epochs 5": "too few",
    "--segblocks-policy reinforce --segblocks-refine-epochs 5 --segblocks-calibrate no": "a share",
    "--segblocks-policy reinforce --segblocks-policy-epochs 1.5": "a share of them below 1",
    "--segblocks-policy reinforce --segblocks-refine-epochs -1": "a share of them below 1",
    "--segblocks-policy random --segblocks-budget-power 3": "needs --segblocks-budgets",
    "--segblocks-policy reinforce --segblocks-place-weight 2": "--segblocks-calibrate train or val",
    "--dataset camvid": "SEGBLOCKS_CAMVID_DIR",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line_with_status_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(line.split())
    assert stopped.value.code == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("train.py: error: ")
    assert REFUSED[line] in message


@pytest.mark.parametrize(
    ("given", "epochs", "learns", "refines"),
    [
        ("1/7", 300, 42, 42),
        ("0.1", 60, 6, 6),
        ("1/7", 7, 1, 1),
        ("0.29", 100, 29, 29),
        ("1/7", 3, 1, 0),  # 0 epochs of learning would mean all of them
        ("0.0", 3, 0, 0),
        ("15", 300, 15, 15),
    ],
)
def test_epochs_of_the_policy_may_be_a_share(given, epochs, learns, refines):
    line = (
        f"--segblocks-policy reinforce --epochs {epochs} --segblocks-policy-epochs {given} "
        f"--segblocks-refine-epochs {given}"
    )
    args = parse_args(line.split())
    assert (args.segblocks_policy_epochs, args.segblocks_refine_epochs) == (learns, refines)
    assert isinstance(args.segblocks_policy_epochs, int)
