"""Training within budgets, a threshold that is kept, and curves of one checkpoint."""

import sys

import pytest
import torch
from tiny import (  # noqa: F401
    REINFORCE,
    SPEED,
    arguments,
    checkpoint,
    figures,
    make_trainer,
    run,
    same,
    tiny_backbone,
)

import train
from argparser import parse_args
from dataloaders import to_network
from segblocks.policy import ReinforcePolicy
from utils.data import build_calibration_set
from utils.training.trainer import Trainer
from utils.validation.calibrate import calibrate
from utils.validation.curve import budget_text, each_budget

pytestmark = pytest.mark.usefixtures("tiny_backbone")

# Scenes of 2×4 blocks.
WIDE = (*REINFORCE, "--synthetic-size", "128", "256", "--res", "256", "--crop-res", "128")
LEARNING = (
    *("--segblocks-reward", "balanced", "--segblocks-normalise-advantage", "yes"),
    *("--segblocks-entropy-weight", "0.01", "--segblocks-warmup-epochs", "1.5"),
    *("--segblocks-warmup-share", "1", "--segblocks-recolour", "yes"),
)
SHORT = ("--epochs", "2", "--val-every", "0")


REFINED = (*LEARNING, "--segblocks-policy-epochs", "1", "--segblocks-refine-epochs", "1")


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ((*LEARNING, "--segblocks-calibrate", "train", "--segblocks-place-weight", "1"), 2),
        ((*LEARNING, "--segblocks-budgets", "0.25", "1"), 2),
        (REFINED, 2),
        (REFINED, 4),
        (("--segblocks-policy", "random", "--segblocks-budgets", "0", "1"), 2),
    ],
    ids=["own-share", "any-budget", "before-refining", "refining", "random"],
)
def test_training_stops_and_goes_on_equal_to_the_last_bit(tmp_path, flags, steps):
    whole = checkpoint(run(tmp_path / "whole", *SHORT, *WIDE, *flags))
    stopped = checkpoint(run(tmp_path / "parts", *SHORT, *WIDE, *flags, "--max-steps", str(steps)))
    assert ("policy_before" in stopped) == (flags == REFINED and steps == 4)
    parts = checkpoint(run(tmp_path / "parts", *SHORT, *WIDE, *flags))
    assert ("policy_before" in parts) == (flags == REFINED)
    for entry in ("state_dict", "optimizer", "rng", "reward", "policy_before"):
        assert same(whole.get(entry), parts.get(entry)), entry
    assert bool(whole["reward"]) == ("balanced" in flags)


def test_warm_up_ends_when_it_should(tmp_path, monkeypatch):
    seen = []
    step = Trainer._step

    def note(self, *args):
        step(self, *args)
        seen.append(self.model.policy.exploration)

    monkeypatch.setattr(Trainer, "_step", note)
    run(tmp_path, *SHORT, *WIDE, *LEARNING)
    assert seen == pytest.approx([max(0, 1 - i / 3 / 1.5) for i in range(6)])


def test_every_budget_in_training_is_within_its_bounds(tmp_path, monkeypatch):
    shares = []
    loss = ReinforcePolicy.loss

    def note(self, result, *args):
        shares.append(float(result.share))
        return loss(self, result, *args)

    monkeypatch.setattr(ReinforcePolicy, "loss", note)
    flags = ("--segblocks-budgets", "0.25", "0.75", "--segblocks-quantize-percentage", "0")
    run(tmp_path, "--epochs", "4", "--val-every", "0", *WIDE, *flags)
    assert set(shares) <= {0.25, 0.5, 0.75}
    assert len(set(shares)) > 1


# ---- the threshold ----


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 9)])
def test_threshold_is_fitted_on_images_of_a_split_and_kept(tmp_path, split, count):
    """Trained for half, all blocks would run at threshold 0."""
    flags = ("--segblocks-percent-target", "0.5", "--segblocks-calibrate", split)
    flags += (f"--synthetic-{split}-images", str(count))
    trainer = make_trainer(tmp_path, *WIDE, *flags)
    policy = trainer.model.policy
    policy.policy_net.layers[-1].bias.data.fill_(5.0)
    images = build_calibration_set(trainer.args)
    before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    told = calibrate(trainer.model, images, trainer.args, trainer.device)
    after = trainer.model.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"policy.threshold"}
    assert f"50.0 % of the blocks of {count} {split} images, target 50.0 %" in told
    policy.eval()
    batches = [to_network(*(x[None] for x in images[i]))[0] for i in range(len(images))]
    grids = torch.cat([trainer.model(batch).grid for batch in batches])
    assert float(grids.float().mean()) == pytest.approx(0.5, abs=0.02)


def test_threshold_travels_in_the_checkpoint_and_can_be_fitted_later(tmp_path):
    folder = run(tmp_path, *WIDE, "--segblocks-calibrate", "train", "--max-steps", "1")
    kept = checkpoint(folder)["state_dict"]["policy.threshold"]
    assert kept != 0
    assert same(kept, checkpoint(folder, "checkpoint_best.pth")["state_dict"]["policy.threshold"])
    run(tmp_path, *WIDE, "--mode", "val")
    assert figures(folder, "val.json")["miou"] == checkpoint(folder)["progress"]["score_best"]
    run(tmp_path, *WIDE, "--max-steps", "1", "--name", "plain")
    flags = ("--mode", "val", "--segblocks-calibrate", "train", "--segblocks-percent-target", "0")
    plain = run(tmp_path, *WIDE, *flags, "--name", "plain")
    assert figures(plain, "val.json")["share"] == 0
    assert checkpoint(plain)["state_dict"]["policy.threshold"] == 0  # validation writes no weights


def test_imposed_budgets_ask_for_a_threshold():
    flags = ["--segblocks-budgets", "0.1", "1"]
    synthetic = ["--dataset", "synthetic", "--segblocks-policy"]
    for words, split in (
        (["reinforce", *flags], "train"),
        (["random", *flags], "no"),
        (["reinforce"], "no"),
        (["reinforce", "--mode", "val", *flags], "no"),
    ):
        assert parse_args([*synthetic, *words]).segblocks_calibrate == split


# ---- curves ----


def test_a_curve_of_one_checkpoint(tmp_path):
    folder = run(tmp_path, *WIDE, "--segblocks-budgets", "0", "1", "--max-steps", "2")
    run(tmp_path, *WIDE, "--mode", "val", "--budget", "0.0", "25%", "8", "--policy-metrics", "yes")
    found = figures(folder, "curve.json")
    assert found["checkpoint"].endswith("checkpoint.pth")
    assert [row["budget"] for row in found["budgets"]] == [0.0, 0.25, 8]
    assert [row["share"] for row in found["budgets"]] == [0.0, 0.25, 1.0]
    macs = [row["gmacs"] for row in found["budgets"]]
    assert macs == sorted(macs)
    assert all(row["policy_metrics"] for row in found["budgets"])
    assert not (folder / "val.json").exists()
    run(tmp_path, *WIDE, "--mode", "val", "--budget", "0.25")
    alone = figures(folder, "val.json")
    assert {k: alone[k] for k in ("budget", "miou", "share", "gmacs")} == {
        k: found["budgets"][1][k] for k in ("budget", "miou", "share", "gmacs")
    }
    table = [line.split()[3:] for line in (folder / "run.log").read_text().splitlines()]
    assert ["budget", "high", "mIoU", "GMACs", "boundary", "rank"] in table
    assert any(words[:3] == ["8", "blocks", "100.0%"] for words in table)


def test_the_picture_of_a_curve(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures of curves need requirements-study.txt")
    folder = run(tmp_path, *WIDE, "--max-steps", "1")
    run(tmp_path, *WIDE, "--mode", "val", "--budget", "0.0", "1.0")
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_without_matplotlib_says_how_to_get_its_picture(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = run(tmp_path, *WIDE, "--max-steps", "1")
    run(tmp_path, *WIDE, "--mode", "val", "--budget", "0.0", "1.0")
    assert (folder / "curve.json").exists()
    assert not (folder / "curve.png").exists()
    assert "pip install -r requirements-study.txt" in (folder / "run.log").read_text()


def test_speed_at_several_budgets(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = run(tmp_path, *WIDE, "--max-steps", "1")
    run(tmp_path, *WIDE, *SPEED, "--budget", "0.25", "0.5", "--speed-repeats", "1")
    found = figures(folder, "speed.json")["budgets"]
    assert [one["budget"] for one in found] == [0.25, 0.5]
    for one in found:
        shares = {row["engine"]: row["share"] for row in one["rows"]}
        assert shares["blocks fast"] == shares["blocks eager"] == one["budget"]


def test_each_budget_is_a_run_of_its_own():
    flags = ["--dataset", "synthetic", "--mode", "val", "--segblocks-policy", "reinforce"]
    args = parse_args([*flags, "--budget", "0.1", "3"])
    assert args.budget is None
    assert [one.budget for one in each_budget(args)] == [0.1, 3]
    args = parse_args([*flags, "--budget", "0.1"])
    assert (args.budget, args.budgets) == (0.1, [0.1])
    assert [one.budget for one in each_budget(parse_args(flags))] == [None]
    assert [budget_text(b) for b in (0.25, 3, None)] == ["25 %", "3 blocks", "own"]


def test_an_untrained_curve_is_refused_in_one_line(tmp_path, capsys):
    flags = arguments(tmp_path, *WIDE, "--mode", "val", "--budget", "0.1", "0.2")
    assert train.main(flags) == 1
    assert "no checkpoint" in capsys.readouterr().err
