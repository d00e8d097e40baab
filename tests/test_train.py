"""Training, validation and timing of the application, end to end on tiny data."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from tiny import (  # noqa: F401
    DEVICES,
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
from segblocks import SegBlocksModel
from segblocks.capture import capture
from utils.data import build_val_set
from utils.logger import RunLog
from utils.training.objective import Objective
from utils.training.trainer import Trainer
from utils.training.writer import Saver
from utils.validation.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("tiny_backbone")

SHORT = ("--epochs", "2", "--val-every", "0")


@pytest.mark.parametrize("policy", [[], REINFORCE], ids=["dense", "reinforce"])
def test_validation_repeats_the_last_one_of_training(tmp_path, policy):
    folder = run(tmp_path, *SHORT, *policy)
    trained = checkpoint(folder)["progress"]
    run(tmp_path, *policy, "--mode", "val", "--viz", "policy", "pred")
    found = figures(folder, "val.json")
    assert found["miou"] == trained["score_best"] > 0
    assert found["images"] == 2
    pictures = {p.relative_to(folder).as_posix() for p in folder.glob("viz/*/*.png")}
    assert pictures == {f"viz/{k}/00000{i}.png" for k in ("policy", "pred") for i in (0, 1)}


@pytest.mark.parametrize(
    ("flags", "stop"),
    [
        (REINFORCE, 2),
        ([*REINFORCE, "--segblocks-policy", "random"], 1),
        ([*REINFORCE, "--accumulate", "3", "--amp", "bf16", "--grad-clip", "1"], 1),
    ],
    ids=["reinforce", "random", "accumulate-amp"],
)
def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(tmp_path, flags, stop):
    whole = checkpoint(run(tmp_path / "whole", *SHORT, *flags))
    run(tmp_path / "parts", *SHORT, *flags, "--max-steps", str(stop))
    middle = checkpoint(tmp_path / "parts" / "default")["progress"]
    assert middle["total_steps"] == stop
    parts = checkpoint(run(tmp_path / "parts", *SHORT, *flags))
    for entry in ("state_dict", "optimizer", "scheduler", "scaler", "rng"):
        assert same(whole[entry], parts[entry]), entry
    assert whole["progress"]["total_steps"] == parts["progress"]["total_steps"] > stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, monkeypatch, number):
    whole = checkpoint(run(tmp_path / "whole", *SHORT, *REINFORCE))
    flags = arguments(tmp_path / "parts", *SHORT, *REINFORCE, "--num-workers", "1")
    step = Trainer._step

    def step_and_signal(self, *args):
        step(self, *args)
        if self.progress.total_steps == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step_and_signal)
        assert train.main(flags) == 128 + number
    assert checkpoint(tmp_path / "parts" / "default")["progress"]["total_steps"] == 4
    assert train.main(flags) == 0
    parts = checkpoint(tmp_path / "parts" / "default")
    assert same(whole["state_dict"], parts["state_dict"])


def test_the_number_of_workers_changes_nothing(tmp_path):
    alone = checkpoint(run(tmp_path / "0", *SHORT, *REINFORCE))
    helped = checkpoint(run(tmp_path / "2", *SHORT, *REINFORCE, "--num-workers", "2"))
    assert same(alone["state_dict"], helped["state_dict"])


def test_another_seed_gives_other_weights(tmp_path):
    weights = [
        checkpoint(run(tmp_path / seed, "--max-steps", "1", "--seed", seed))["state_dict"]
        for seed in ("0", "1")
    ]
    assert not same(*weights)


def test_a_finished_run_is_left_alone(tmp_path):
    folder = run(tmp_path, "--epochs", "1")
    before = (folder / "checkpoint.pth").read_bytes()
    run(tmp_path, "--epochs", "1")
    assert (folder / "checkpoint.pth").read_bytes() == before
    log = (folder / "run.log").read_text()
    assert "checkpoint.pth, of a run that has had its 1 epochs" in log
    assert "nothing left to train" in log


def test_validation_says_that_a_policy_was_trained_for_other_blocks(tmp_path):
    run(tmp_path, *REINFORCE, "--max-steps", "1", "--name", "learned")
    evaluated = [*REINFORCE, "--name", "learned", "--mode", "val"]
    log = tmp_path / "learned" / "run.log"
    run(tmp_path, *evaluated)
    assert "trained for blocks" not in log.read_text()
    run(tmp_path, *evaluated, "--segblocks-block-size", "128")
    assert "warning: the policy was trained for blocks of 64 pixels, not of 128" in log.read_text()


@pytest.mark.parametrize("mode", ["val", "speed"])
def test_a_budget_of_more_blocks_than_there_are_is_an_error(tmp_path, capsys, mode):
    run(tmp_path, *REINFORCE, "--max-steps", "1")
    capsys.readouterr()
    assert train.main(arguments(tmp_path, *REINFORCE, "--mode", mode, "--budget", "40")) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]  # after warnings of the compiler
    assert line.startswith("error: budget of 40 blocks: an image has 2; give 0 to 2, or a share")


def test_changed_flags_are_pointed_out_when_a_run_goes_on(tmp_path):
    run(tmp_path, "--max-steps", "1")
    folder = run(tmp_path, "--max-steps", "2", "--lr", "1e-3", "--num-workers", "1")
    log = (folder / "run.log").read_text()
    assert "epoch 1, step 1 of 3" in log
    assert "--lr was 0.0004, now 0.001" in log
    assert "--num-workers was" not in log


def test_resume_none_starts_afresh(tmp_path):
    run(tmp_path, "--max-steps", "2")
    folder = run(tmp_path, "--max-steps", "1", "--resume", "none")
    assert checkpoint(folder)["progress"]["total_steps"] == 1


def test_checkpoint_holds_everything_the_next_step_needs(tmp_path):
    state = checkpoint(run(tmp_path, "--max-steps", "2", *REINFORCE))
    entries = {"state_dict", "optimizer", "scheduler", "scaler", "reward", "progress", "rng"}
    assert state.keys() == entries | {"args"}
    assert state["progress"]["epoch"] == 0
    assert state["progress"]["step"] == 2
    assert state["args"]["segblocks_policy"] == "reinforce"


# ---- optimiser and schedule ----


@pytest.mark.parametrize(("pretrained", "factor"), [("yes", 0.25), ("no", 1.0)])
def test_parameter_groups(tmp_path, pretrained, factor):
    from utils.training.optim import build_optimizer

    flags = ["--segblocks-policy-lr-factor", "3", "--segblocks-policy-wd-factor", "0.5"]
    args = parse_args(arguments(tmp_path, *REINFORCE, *flags, "--pretrain-backbone", pretrained))
    model = train.build(args, build_val_set(args))
    groups = {g["name"]: g for g in build_optimizer(model, args).param_groups}
    rates = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {
        "decoder": (4e-4, 1e-4),
        "backbone": (4e-4 * factor, 1e-4 * factor),
        "policy": (4e-4 * 3, 1e-4 * 0.5),
    }
    assert {p for g in groups.values() for p in g["params"]} == set(model.parameters())
    assert set(groups["backbone"]["params"]) == set(model.net.backbone.parameters())
    assert groups["decoder"]["betas"] == (0.5, 0.999)


def test_the_best_checkpoint_is_that_of_the_highest_score(tmp_path, monkeypatch):
    scores = iter((0.2, 0.5, 0.4))
    monkeypatch.setattr(
        "utils.training.validations.evaluate",
        lambda *given, **options: replace(evaluate(*given, **options), miou=next(scores)),
    )
    folder = run(tmp_path, "--epochs", "3", "--synthetic-train-images", "2")
    latest, best = checkpoint(folder), checkpoint(folder, "checkpoint_best.pth")
    assert latest["progress"]["score_best"] == best["progress"]["score_best"] == 0.5
    assert latest["progress"]["score_best_epoch"] == 1
    assert (latest["progress"]["epoch"], best["progress"]["epoch"]) == (3, 2)
    assert not same(latest["state_dict"], best["state_dict"])


def test_learning_rate_follows_the_cosine_through_a_resume(tmp_path):
    flags = ("--epochs", "4", "--synthetic-train-images", "2", "--val-every", "0")
    seen = []
    for epochs_done in (1, 2, 3, 4):
        folder = run(tmp_path, *flags, "--max-steps", str(epochs_done))
        seen.append(checkpoint(folder)["optimizer"]["param_groups"][0]["lr"])
    steps = torch.arange(1, 5)
    expected = 1e-6 + (4e-4 - 1e-6) * (1 + torch.cos(torch.pi * steps / 4)) / 2
    assert seen == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_policy_that_learns_for_some_epochs_then_stays_as_it_is(tmp_path):
    flags = (*REINFORCE, "--epochs", "4", "--synthetic-train-images", "2", "--val-every", "0")
    seen, weights = [], []
    for epochs_done in (1, 2, 3, 4):
        policy = ("--segblocks-policy-epochs", "2", "--max-steps", str(epochs_done))
        state = checkpoint(run(tmp_path, *flags, *policy))
        rates = {g["name"]: g["lr"] for g in state["optimizer"]["param_groups"]}
        seen.append(rates["policy"])
        parameters = (v for k, v in state["state_dict"].items() if k.startswith("policy.policy"))
        weights.append([v for v in parameters if v.dim() == 4])
    assert seen == pytest.approx([1e-6 + (4e-4 - 1e-6) / 2, 0, 0, 0])
    assert not same(weights[0], weights[1])
    assert same(weights[1], weights[3])


def test_a_policy_learns_again_in_the_last_epochs_from_what_is_measured(tmp_path, monkeypatch):
    flags = (*REINFORCE, "--epochs", "5", "--synthetic-train-images", "2", "--val-every", "0")
    flags += ("--segblocks-policy-epochs", "1", "--segblocks-refine-epochs", "2")
    seen, weights, measured = [], [], []
    gain = SegBlocksModel.block_gain
    monkeypatch.setattr(
        SegBlocksModel, "block_gain", lambda *given: measured.append(gain(*given)) or measured[-1]
    )
    for epochs_done in (1, 2, 3, 4, 5):
        state = checkpoint(run(tmp_path, *flags, "--max-steps", str(epochs_done)))
        rates = {g["name"]: g["lr"] for g in state["optimizer"]["param_groups"]}
        seen.append(rates["policy"])
        assert len(measured) == max(0, epochs_done - 3)
        parameters = (v for k, v in state["state_dict"].items() if k.startswith("policy.policy"))
        weights.append([v for v in parameters if v.dim() == 4])
    # Of the epoch that comes next: half of a cosine over two epochs.
    assert seen == pytest.approx([0, 0, 4e-4, 1e-6 + (4e-4 - 1e-6) / 2, 1e-6])
    assert same(weights[0], weights[2])
    assert not same(weights[2], weights[3])
    assert not same(weights[3], weights[4])
    assert all(gain.abs().max() > 0 for gain in measured)
    before = state["policy_before"]  # which runs that go on have from the checkpoint
    assert same([v for v in before.values() if v.dim() == 4], weights[2])


# ---- writing, workers ----


@pytest.mark.parametrize("device", DEVICES)
def test_an_epoch_is_written_when_a_gpu_has_the_next_step(tmp_path, monkeypatch, device):
    """Of a CPU, which has done all by then, at once."""
    events, save, loss_of = [], Saver.save, Objective.__call__

    def noted_loss(self, *given):
        events.append("step")
        return loss_of(self, *given)

    def noted_save(self, path, *given):
        events.append("save")
        save(self, path, *given)

    monkeypatch.setattr(Objective, "__call__", noted_loss)
    monkeypatch.setattr(Saver, "save", noted_save)
    flags = ("--epochs", "2", "--val-every", "0", "--device", device, "--cuda-graphs", "no")
    run(tmp_path, *flags)
    ends = ["step", "save"] if device == "cuda" else ["save", "step"]
    assert events == [*["step"] * 3, *ends, *["step"] * 2, "save"]


def test_workers_of_validation_begin_before_the_first_step(tmp_path, monkeypatch):
    """Later they would keep a checkpoint open that is being written."""
    begun, step = [], Trainer._step

    def noted(self, means):
        begun.append(
            [loader._iterator is not None for loader in (self.train_loader, self.val_loader)]
        )
        step(self, means)

    monkeypatch.setattr(Trainer, "_step", noted)
    trainer = make_trainer(tmp_path, "--num-workers", "1")
    with RunLog(tmp_path / "run") as log:
        trainer.fit(log)
    assert begun[0] == [True, True]
    assert trainer.val_loader._iterator is None  # and they end


# ---- speed ----


@pytest.mark.gpu
def test_the_loop_on_cuda(tmp_path):
    flags = [*REINFORCE, "--device", "cuda", "--max-steps", "2", "--amp", "fp16"]
    folder = run(tmp_path, *flags)
    trained = checkpoint(folder)["progress"]
    run(tmp_path, *flags, "--mode", "val")
    assert figures(folder, "val.json")["miou"] == trained["score_best"]
    run(tmp_path, *flags, *SPEED)
    found = figures(folder, "speed.json")
    assert found["dtype"] == "float16"
    assert all(row["peak_memory_mib"] > 0 for row in found["rows"])


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_deterministic_runs_on_cuda_are_equal_to_the_last_bit(tmp_path, amp):
    flags = [*SHORT, *REINFORCE, "--device", "cuda", "--deterministic", "yes", "--amp", amp]
    try:
        first, second = (checkpoint(run(tmp_path / name, *flags)) for name in ("a", "b"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(first["state_dict"], second["state_dict"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        ("--loss", "crossentropy"),
        ("--loss", "bootstrap_ce"),
        ("--loss", "ohem"),
        ("--segblocks-calibrate", "val", "--segblocks-recolour", "yes"),
        ("--segblocks-refine-epochs", "1", "--segblocks-budgets", "0.25", "0.25"),
    ],
    ids=["crossentropy", "bootstrap_ce", "ohem", "recolour", "refined"],
)
def test_cuda_graphs_change_nothing_but_the_speed(tmp_path, monkeypatch, flags):
    flags = [*SHORT, *REINFORCE, "--device", "cuda", "--deterministic", "yes", *flags]
    captured = []
    monkeypatch.setattr(
        "segblocks.graphs.capture", lambda *given: captured.append(capture(*given)) or captured[-1]
    )
    try:
        found = [
            checkpoint(run(tmp_path / graphs, *flags, "--cuda-graphs", graphs))
            for graphs in ("yes", "no")
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(found[0]["state_dict"], found[1]["state_dict"])
    assert len(captured) >= 2  # the network and the policy


def test_a_run_too_short_for_a_profile_says_so(tmp_path):
    short, long = (
        run(tmp_path / steps, "--profiler", "yes", "--epochs", "2", "--max-steps", steps)
        for steps in ("2", "4")
    )
    assert (
        "no profile: that begins after 3 steps, and there were 2" in (short / "run.log").read_text()
    )
    assert not (short / "profile.json").exists()
    assert (long / "profile.json").is_file()
